"""Training images: where they come from, how they are cropped, and in which order they are seen."""

from flowmo.data.loader import batches, epoch_order
from flowmo.data.sources import open_source
from flowmo.data.sources.base import DataError, Source, evenly_spread
from flowmo.data.sources.folder import FolderSource
from flowmo.data.sources.tar import TarSource, build_index, default_index
from flowmo.data.transforms import ImageDataset

__all__ = [
    "DataError",
    "FolderSource",
    "ImageDataset",
    "Source",
    "TarSource",
    "batches",
    "build_index",
    "default_index",
    "epoch_order",
    "evenly_spread",
    "open_source",
]
