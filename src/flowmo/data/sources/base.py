"""The interface of an image source, and what all sources share: labels, hidden files, errors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from PIL import Image

from flowmo.errors import FlowMoError

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
