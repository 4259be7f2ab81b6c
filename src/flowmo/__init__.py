"""FlowMo: images to a short string of bits and back (Flow to the Mode, arXiv 2503.11056)."""

from flowmo.checkpoint import CheckpointError
from flowmo.config import Config, ConfigError, preset
from flowmo.images import ImageError, PictureError, read_image
from flowmo.pixels import read_tensor
from flowmo.tokenizer import Codes, FlowMo, load, save

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Codes",
    "Config",
    "ConfigError",
    "FlowMo",
    "ImageError",
    "PictureError",
    "load",
    "preset",
    "read_image",
    "read_tensor",
    "save",
]
