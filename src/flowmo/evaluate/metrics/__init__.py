"""Metrics of image pairs and of image sets."""
