"""Training losses of each stage, and the perceptual distances that they use."""
