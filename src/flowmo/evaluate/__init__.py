"""Evaluation of reconstructions and of generated images."""
