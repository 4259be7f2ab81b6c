"""What training minimises: the losses of stages 1A, 1B and 1C, and the perceptual distances in them."""
