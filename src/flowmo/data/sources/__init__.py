"""Image sources, one per file. A new one is a class with the methods of ``Source``, called in ``open_source``."""

import os
from pathlib import Path

from flowmo.data.sources.base import DataError, Source
from flowmo.data.sources.folder import FolderSource
from flowmo.data.sources.huggingface import HuggingFaceSource
from flowmo.data.sources.tar import TarSource
from flowmo.data.sources.webdataset import find_shards


def open_source(path: str | Path, index: str | Path | None = None) -> Source:
    """Open the source that ``path`` names.

    Args:
        path: a folder of images; a ``.tar``, with its index if it is large; WebDataset shards, as a folder of
            ``.tar`` files, a pattern (``train-*.tar``) or a range (``train-{000..146}.tar``); or a Hugging Face
            dataset, ``hf:OWNER/NAME:SPLIT`` or ``hf:FOLDER:SPLIT`` for one saved to disk.
        index: index of a single tar; by default the file that ``flowmo data index`` writes beside it.

    Raises:
        DataError: the source is missing or contains no images, or ``index`` is given for anything but one tar.
    """
    name, path = str(path), Path(path)
    if not name:
        raise DataError("The name of the images is empty.")
    shards = () if name.startswith("hf:") else find_shards(path)
    if index and not shards and (name.startswith("hf:") or path.is_dir()):
        raise DataError(f"{index}: an index is of a single tar, and {name} is none.")
    if name.startswith("hf:"):
        return HuggingFaceSource(name)
    if shards:
        return TarSource(shards, index or None)
    if not os.path.isfile(path):
        return FolderSource(path)
    if path.suffix.lower() == ".tar":
        return TarSource([path], index or None)
    raise DataError(f"{path}: neither a folder of images nor a .tar file.")


def release_source(split: str) -> tuple[str, str]:
    """Tar and index that the authors' release reads where no images are named. Both are in the working directory.

    Args:
        split: ``train`` or ``val``.

    Returns:
        Their names. A name is empty if there is no such tar; the index also if there is no such index.
    """
    tar, index = f"ILSVRC2012_img_{split}.tar", f"imagenet_{split}_index_overall.json"
    if not os.path.isfile(tar):
        return "", ""
    return tar, index if os.path.isfile(index) else ""
