"""The interface of an image source, and helpers that all sources share."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from torch import Tensor

from flowmo.errors import FlowMoError
from flowmo.images.pixels import PixelFormat

SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
"""Folders of copies and thumbnails that macOS, Synology and Windows add."""
HIDDEN = "hidden"
NO_IMAGE = "not an image by its name"


class DataError(FlowMoError, ValueError):
    """A data source is missing, empty or damaged."""


class Source:
    """Images in a fixed order, identical in every process. A source sets the attributes, and has ``name`` and ``file``.

    Attributes:
        classes: class names by label; empty if no image has a class.
        labels: class of each image, ``None`` without one.
        left_out: {file: reason} for files that are not items.
    """

    classes: Sequence[str]
    labels: Sequence[int | None]
    left_out: Mapping[str, str] = {}

    def name(self, index: int) -> str:
        """Human-readable name of image ``index``, for messages."""
        raise NotImplementedError

    def key(self, index: int) -> str:
        """Name of image ``index`` that stays when the source is moved, or copied to another machine."""
        return self.name(index)

    def file(self, index: int) -> Path | BinaryIO:
        """Path or content of image ``index``. Raises ``ImageError``."""
        raise NotImplementedError

    def version(self, index: int) -> str:
        """Return a text that changes when the file of image ``index`` is replaced; empty if that is not known."""
        return ""

    def read(self, index: int, side: int | None = None, pixels: PixelFormat = PixelFormat()) -> Image.Image | Tensor:
        """Read image ``index`` as ``pixels.read`` does, by default as RGB. Raises ``ImageError``."""
        return pixels.read(self.file(index), self.name(index), side)

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int | None:
        return self.labels[index]


def identity_of(source: Source, labels: bool) -> str:
    """Hash the images' keys, and labels, to 16 hex digits."""
    items = hashlib.sha256()
    for index in range(len(source)):
        item = f"{source.key(index)} {source.label(index) if labels else ''}\n"
        items.update(item.encode(errors="surrogateescape"))
    return items.hexdigest()[:16]


def file_version(path: Path) -> str:
    """Return size and time of change of a file; empty if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def is_hidden(name: str) -> bool:
    """True if any part of the path begins with a dot or is a system folder."""
    return any(part in SYSTEM_FOLDERS or (part[:1] == "." and part not in (".", "..")) for part in name.split("/"))


def class_order(name: str) -> tuple[int, int, str, str]:
    """Sort key for class names: numbers by value, then all others as text."""
    digits = name.lstrip("0")
    return (0, len(digits), digits, name) if re.fullmatch("[0-9]+", name) else (1, 0, name, name)


def class_labels(names: Sequence[str | None]) -> tuple[tuple[str, ...], list[int | None]]:
    """Turn the class name of each image into sorted class names and one label per image."""
    classes = tuple(sorted({name for name in names if name is not None}, key=class_order))
    label = {name: i for i, name in enumerate(classes)}
    return classes, [None if name is None else label[name] for name in names]


def require_labels(source: Source) -> None:
    """Raise ``DataError`` if some images have a class and others have none."""
    without = [index for index in range(len(source)) if source.label(index) is None] if source.classes else []
    if without:
        raise DataError(
            f"{source.name(without[0])} has no label; {len(without)} of {len(source)} images have none. "
            "Label every image, or tokenize without labels (--no-labels)."
        )


def class_difference(classes: Sequence[str], expected: Sequence[str]) -> str:
    """Describe the first class that differs between two lists; empty if they are equal."""
    for index, (name, other) in enumerate(zip_longest(classes, expected)):
        if name is None:
            return f"class {index}, {other!r}, is missing"
        if name != other:
            return (
                f"class {index} is {name!r}, not {other!r}" if other is not None else f"class {index}, {name!r}, is new"
            )
    return ""


def evenly_spread(count: int, total: int) -> list[int]:
    """``count`` indices spread evenly over 0 … ``total`` − 1, or all of them if there are fewer."""
    count = min(count, total)
    return [i * total // count for i in range(count)]
