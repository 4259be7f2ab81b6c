"""Training pictures: where they come from, how they are cropped, and in which order they are seen."""

from flowmo.data.loader import batches, epoch_order
from flowmo.data.source import DataError, FolderSource, Source, evenly_spread, open_source
from flowmo.data.tar import TarSource, build_index, default_index
from flowmo.data.views import Views

__all__ = [
    "DataError",
    "FolderSource",
    "Source",
    "TarSource",
    "Views",
    "batches",
    "build_index",
    "default_index",
    "epoch_order",
    "evenly_spread",
    "open_source",
]
