"""Weights in files: the project's ``.safetensors``, training checkpoints, the authors' files, the Hub."""
