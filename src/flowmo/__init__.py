"""FlowMo: images to a short string of bits and back (Flow to the Mode, arXiv 2503.11056)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowmo.checkpoint import CheckpointError
    from flowmo.config import Config, ConfigError, preset
    from flowmo.images import ImageError, read_image
    from flowmo.images.pixels import read_tensor
    from flowmo.model.codes import Codes
    from flowmo.tokenizer import FlowMo, load, save

__version__ = "0.2.0"
__all__ = [
    "CheckpointError",
    "Codes",
    "Config",
    "ConfigError",
    "FlowMo",
    "ImageError",
    "load",
    "preset",
    "read_image",
    "read_tensor",
    "save",
]
_MODULES = {
    "checkpoint": ("CheckpointError",),
    "config": ("Config", "ConfigError", "preset"),
    "images": ("ImageError", "read_image"),
    "images.pixels": ("read_tensor",),
    "model.codes": ("Codes",),
    "tokenizer": ("FlowMo", "load", "save"),
}
"""Modules, which import torch, and what they hold of the public names."""


def __getattr__(name: str) -> Any:
    """Import a public name, or one of the modules above, when it is first used."""
    for module, names in _MODULES.items():
        if name == module or name in names:
            found = import_module(f"flowmo.{module}")
            globals()[name] = found if name == module else getattr(found, name)
            return globals()[name]
    raise AttributeError(f"module 'flowmo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
