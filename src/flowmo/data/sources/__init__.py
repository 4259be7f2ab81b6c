"""Image sources, one a file. To add one, write a class with the methods of ``Source`` and a line in ``open_source``."""

from __future__ import annotations

from pathlib import Path

from flowmo.data.sources.base import DataError, Source
from flowmo.data.sources.folder import FolderSource
from flowmo.data.sources.huggingface import PREFIX, HuggingFaceSource
from flowmo.data.sources.tar import TarSource
from flowmo.data.sources.webdataset import find_shards


def open_source(path: str | Path, index: str | Path | None = None) -> Source:
    """The source that ``path`` names.

    Args:
        path: a folder of pictures; a ``.tar``, with its index where it is large; WebDataset shards, as a folder of
            ``.tar`` files, a pattern (``train-*.tar``) or a range (``train-{000..146}.tar``); or a Hugging Face
            dataset, ``hf:OWNER/NAME:SPLIT`` or ``hf:FOLDER:SPLIT`` of one saved to disk.
        index: index of a single tar; by default the file that ``flowmo data index`` writes beside it.

    Raises:
        DataError: it is not there, or holds no pictures.
    """

    if str(path).startswith(PREFIX):
        return HuggingFaceSource(str(path))
    shards = find_shards(path)
    if shards:
        return TarSource(shards)
    if Path(path).is_file() and Path(path).suffix == ".tar":
        return TarSource([path], index or None)
    if Path(path).is_file():
        raise DataError(f"{path}: neither a folder of pictures nor a .tar file")
    return FolderSource(path)
