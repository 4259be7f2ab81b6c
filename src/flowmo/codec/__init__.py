"""The ``.flowmo`` file, its context models and its range coder."""
