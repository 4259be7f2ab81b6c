"""Image sources, one per file. To add one, write a class with the methods of ``Source`` and a line in ``SOURCES``.

A registry entry takes (path, index) and returns a source, or ``None`` if the path is not of its kind. The first source
wins.
"""

from collections.abc import Callable
from pathlib import Path

from flowmo.data.sources.base import DataError, Source
from flowmo.data.sources.folder import FolderSource
from flowmo.data.sources.huggingface import HuggingFaceSource
from flowmo.data.sources.tar import TarSource
from flowmo.data.sources.webdataset import find_shards

Index = str | Path | None
SOURCES: tuple[Callable[[str, Index], Source | None], ...] = (
    lambda path, index: HuggingFaceSource(path) if path.startswith("hf:") else None,
    lambda path, index: TarSource(shards) if (shards := find_shards(path)) else None,
    lambda path, index: TarSource([path], index) if Path(path).is_file() and Path(path).suffix == ".tar" else None,
    lambda path, index: FolderSource(path) if not Path(path).is_file() else None,
)


def open_source(path: str | Path, index: Index = None) -> Source:
    """Open the source that ``path`` names.

    Args:
        path: a folder of images; a ``.tar``, with its index if it is large; WebDataset shards, as a folder of
            ``.tar`` files, a pattern (``train-*.tar``) or a range (``train-{000..146}.tar``); or a Hugging Face
            dataset, ``hf:OWNER/NAME:SPLIT`` or ``hf:FOLDER:SPLIT`` for one saved to disk.
        index: index of a single tar; by default the file that ``flowmo data index`` writes beside it.

    Raises:
        DataError: the source is missing or contains no images.
    """
    for open_kind in SOURCES:
        source = open_kind(str(path), index or None)
        if source is not None:
            return source
    raise DataError(f"{path}: neither a folder of images nor a .tar file.")
