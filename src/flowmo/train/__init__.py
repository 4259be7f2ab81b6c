"""Training: the trainer, the task of each stage, and their parts."""
