"""Training data: where images come from, how they are cropped, in which order they are seen, and folders of tokens."""

from flowmo.data.loader import batches, epoch_order
from flowmo.data.sources import open_source, release_source
from flowmo.data.sources.base import DataError, Source, evenly_spread
from flowmo.data.sources.folder import FolderSource
from flowmo.data.sources.tar import TarSource
from flowmo.data.sources.tar_index import build_index, default_index
from flowmo.data.tokens import TokenDataset
from flowmo.data.transforms import ImageDataset

__all__ = [
    "DataError",
    "FolderSource",
    "ImageDataset",
    "Source",
    "TarSource",
    "TokenDataset",
    "batches",
    "build_index",
    "default_index",
    "epoch_order",
    "evenly_spread",
    "open_source",
    "release_source",
]
