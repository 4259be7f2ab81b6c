"""Where pictures come from, behind one interface: how many there are, and the n-th by its number.

A new kind of source is one class with what ``Source`` lists, and one line in ``open_source``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from flowmo.errors import FlowMoError
from flowmo.pictures import EXTENSIONS, read_image


class DataError(FlowMoError, ValueError):
    """A source of pictures that is missing, empty or damaged."""


class Source(Protocol):
    """Pictures in a fixed order, the same in every process; ``read`` may be called in any of them."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes by label; empty where the source has none."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call picture ``index``."""

    def label(self, index: int) -> int | None:
        """Class of picture ``index``, ``None`` where the source has no classes."""

    def read(self, index: int, side: int | None = None) -> Image.Image:
        """Picture ``index`` as RGB; with ``side``, see ``read_image``. Raises ``ImageError``."""


def open_source(path: str | Path, index: str | Path | None = None) -> Source:
    """The source that ``path`` names.

    Args:
        path: a folder of pictures; a ``.tar`` with its index; WebDataset shards, as a folder of ``.tar`` files, a
            pattern (``train-*.tar``) or a range (``train-{000..146}.tar``); or a Hugging Face dataset,
            ``hf:OWNER/NAME:SPLIT`` or ``hf:FOLDER:SPLIT`` of one saved to disk.
        index: index of a single tar; by default the file that ``flowmo data index`` writes beside it.

    Raises:
        DataError: it is not there, or holds no pictures.
    """
    from flowmo.data.huggingface import PREFIX, HuggingFaceSource
    from flowmo.data.tar import TarSource
    from flowmo.data.webdataset import find_shards, open_shards

    if str(path).startswith(PREFIX):
        return HuggingFaceSource(str(path))
    shards = find_shards(path)
    if shards:
        return open_shards(shards)
    if Path(path).is_file() and Path(path).suffix == ".tar":
        return TarSource([path], index or None)
    if Path(path).is_file():
        raise DataError(f"{path}: neither a folder of pictures nor a .tar file")
    return FolderSource(path)


class FolderSource:
    """Every picture file below a folder, sorted by its path.

    Where each lies in a sub-folder, the first level of these are the classes, by name.

    Raises:
        DataError: no such folder, or no pictures in it.
    """

    def __init__(self, folder: str | Path):
        root = Path(folder)
        if not root.is_dir():
            raise DataError(f"{folder}: no such folder of pictures")
        self.files = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
        if not self.files:
            raise DataError(f"{folder}: holds no pictures ({', '.join(EXTENSIONS)})")
        self.classes, self.labels = class_labels([path.relative_to(root).parts[:-1] for path in self.files])

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def label(self, index: int) -> int | None:
        return self.labels[index] if self.classes else None

    def read(self, index: int, side: int | None = None) -> Image.Image:
        return read_image(self.files[index], side=side)


def class_labels(folders: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], list[int]]:
    """Class names and labels from the folders that each picture lies in; none where one lies in no folder."""
    if not all(folders):
        return (), []
    classes = tuple(sorted({parts[0] for parts in folders}))
    number = {name: i for i, name in enumerate(classes)}
    return classes, [number[parts[0]] for parts in folders]


def evenly_spread(count: int, total: int) -> list[int]:
    """``count`` of the numbers 0 … ``total`` − 1, or all of them where there are no more."""
    count = min(count, total)
    return [i * total // count for i in range(count)]
