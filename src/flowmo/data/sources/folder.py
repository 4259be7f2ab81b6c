"""A folder of image files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from flowmo.data.sources.base import HIDDEN, NO_IMAGE, DataError, class_labels, is_hidden
from flowmo.images import EXTENSIONS, read_image


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
