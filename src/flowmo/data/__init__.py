"""Training pictures: where they come from, how they are cropped, and in which order they are seen."""

from flowmo.data.folder import DataError, PictureFolder, list_pictures
from flowmo.data.loader import batches, epoch_order

__all__ = ["DataError", "PictureFolder", "batches", "epoch_order", "list_pictures"]
