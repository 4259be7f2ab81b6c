"""Where pictures come from, behind one interface: how many there are, and the n-th by its number.

A new kind of source is one class with what ``Source`` lists, and one line in ``open_source``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from flowmo.errors import FlowMoError
from flowmo.pictures import EXTENSIONS, read_image

SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
"""Folders of copies and thumbnails that macOS, Synology and Windows add to people's files."""
HIDDEN = "hidden"
NO_IMAGE = "not an image by its name"


class DataError(FlowMoError, ValueError):
    """A source of pictures that is missing, empty or damaged."""


class Source(Protocol):
    """Pictures in a fixed order, the same in every process; ``read`` may be called in any of them."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes by label; empty where no image has a class."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """Files that are no items, with the reason of each."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call picture ``index``."""

    def label(self, index: int) -> int | None:
        """Class of picture ``index``, ``None`` where it has none."""

    def read(self, index: int, side: int | None = None) -> Image.Image:
        """Picture ``index`` as RGB; with ``side``, see ``read_image``. Raises ``ImageError``."""


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
    from flowmo.data.huggingface import PREFIX, HuggingFaceSource
    from flowmo.data.tar import TarSource
    from flowmo.data.webdataset import find_shards

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


class FolderSource:
    """Every image file below a folder, sorted by its path. Links to files and folders are followed.

    An image's class is its first-level sub-folder; an image that lies in none has no class. Hidden files and folders
    are left out.

    Raises:
        DataError: no such folder, or no images in it.
    """

    def __init__(self, folder: str | Path):
        root = Path(folder)
        if not root.is_dir():
            raise DataError(f"{folder}: no such folder of pictures")
        self.files: list[Path] = []
        self.left_out: dict[str, str] = {}
        for path, reason in walk(root):
            if reason:
                self.left_out[str(path)] = reason
            else:
                self.files.append(path)
        if not self.files:
            raise DataError(f"{folder}: holds no pictures ({', '.join(EXTENSIONS)})")
        self.files.sort()
        parts = [path.relative_to(root).parts for path in self.files]
        self.classes, self.labels = class_labels([first if rest else None for first, *rest in parts])
        for path in root.iterdir():
            if path.is_dir() and str(path) not in self.left_out and path.name not in self.classes:
                self.left_out[str(path)] = "a folder without images is no class"

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def label(self, index: int) -> int | None:
        return self.labels[index]

    def read(self, index: int, side: int | None = None) -> Image.Image:
        return read_image(self.files[index], side=side)


def walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the image files below a folder with an empty reason, and all that is left out with the reason."""
    failures: list[OSError] = []
    real = {str(root): (root.resolve(), *root.resolve().parents)}  # of each folder: where it and those around it lie
    for place, folders, files in os.walk(root, onerror=failures.append, followlinks=True):
        around = real.pop(place)
        for name in [*folders]:
            path = Path(place, name)
            target = path.resolve() if path.is_symlink() else around[0] / name
            reason = HIDDEN if is_hidden(name) else "a link to a folder around it" if target in around else ""
            if reason:
                folders.remove(name)
                yield path, reason
            else:
                real[os.path.join(place, name)] = (target, *around)
        for name in files:
            path = Path(place, name)
            if is_hidden(name):
                yield path, HIDDEN
            elif path.suffix.lower() not in EXTENSIONS:
                yield path, NO_IMAGE
            else:
                yield path, "" if path.is_file() else "not a file, or a broken link"
    for failure in failures:
        yield Path(failure.filename), f"cannot be listed ({failure.strerror})"


def is_hidden(name: str) -> bool:
    """True if a part of a path begins with a dot or is a folder that only an operating system looks into."""
    parts = name.split("/")
    return any(part in SYSTEM_FOLDERS or (part[:1] == "." and part not in (".", "..")) for part in parts)


def class_order(name: str) -> tuple[int, int, str, str]:
    """Sort key of class names: numbers by their value, then all others as text."""
    digits = name.lstrip("0")
    return (0, len(digits), digits, name) if re.fullmatch("[0-9]+", name) else (1, 0, name, name)


def class_labels(names: Sequence[str | None]) -> tuple[tuple[str, ...], list[int | None]]:
    """Class names in order, and the label of each image, from the class name of each image."""
    classes = tuple(sorted({name for name in names if name is not None}, key=class_order))
    label = {name: i for i, name in enumerate(classes)}
    return classes, [None if name is None else label[name] for name in names]


def require_labels(source: Source) -> None:
    """Raise ``DataError`` where some images have a class and others have none."""
    if source.classes:
        without = [index for index in range(len(source)) if source.label(index) is None]
        if without:
            raise DataError(
                f"{source.name(without[0])} has no label, as {len(without)} of {len(source)} images; give each "
                "image one, or tokenize without labels (--no-labels)"
            )


def class_difference(classes: Sequence[str], expected: Sequence[str]) -> str:
    """Name the first class that two lists disagree on; empty where they are equal."""
    for index, (name, other) in enumerate(zip(classes, expected, strict=False)):
        if name != other:
            return f"class {index} is {name!r}, not {other!r}"
    if len(classes) < len(expected):
        return f"class {len(classes)}, {expected[len(classes)]!r}, is missing"
    return f"class {len(expected)}, {classes[len(expected)]!r}, is new" if len(classes) > len(expected) else ""


def evenly_spread(count: int, total: int) -> list[int]:
    """``count`` of the numbers 0 … ``total`` − 1, or all of them where there are no more."""
    count = min(count, total)
    return [i * total // count for i in range(count)]
