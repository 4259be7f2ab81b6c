"""A folder of image files."""

import os
from collections.abc import Iterator
from pathlib import Path

from flowmo.data.sources.base import HIDDEN, NO_IMAGE, DataError, Source, class_labels, is_hidden
from flowmo.images import EXTENSIONS
from flowmo.images.pixels import ARRAY, is_array


class FolderSource(Source):
    """Every image file below a folder, sorted by path. Links are followed; hidden files and folders are left out.

    ``.npy`` files are images if there are no others.

    The class of an image is its first-level sub-folder. Images directly in the root have no class.

    Raises:
        DataError: the folder does not exist or contains no images.
    """

    def __init__(self, folder: str | Path):
        root = Path(folder)
        if not root.is_dir():
            raise DataError(f"{folder}: no such folder of images.")
        found = dict(walk(root))
        if all(found.values()):
            found |= {path: "" for path in found if is_array(path.name) and found[path] == NO_IMAGE and path.is_file()}
        self.files = sorted(path for path, reason in found.items() if not reason)
        left_out = {str(path): reason for path, reason in found.items() if reason}
        if not self.files:
            raise DataError(f"{folder}: contains no images ({', '.join((*EXTENSIONS, ARRAY))}).")
        parts = [path.relative_to(root).parts for path in self.files]
        self.classes, self.labels = class_labels([first if rest else None for first, *rest in parts])
        empty = (str(path) for path in root.iterdir() if path.is_dir() and path.name not in self.classes)
        self.left_out = dict.fromkeys(empty, "a folder without images is no class") | left_out

    def name(self, index: int) -> str:
        return str(self.files[index])

    def file(self, index: int) -> Path:
        return self.files[index]


def walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield (path, "") for every image file below a folder, and (path, reason) for everything left out."""
    failures: list[OSError] = []
    # For each folder still to visit: its real path and those of its parents, to detect cycles of links.
    real = {str(root): (root.resolve(), *root.resolve().parents)}
    for folder, folders, files in os.walk(root, onerror=failures.append, followlinks=True):
        parents = real.pop(folder)
        for name in [*folders]:
            path = Path(folder, name)
            target = path.resolve() if path.is_symlink() else parents[0] / name
            reason = HIDDEN if is_hidden(name) else "a link to a folder around it" if target in parents else ""
            if reason:
                folders.remove(name)
                yield path, reason
            else:
                real[os.path.join(folder, name)] = (target, *parents)
        for name in files:
            path = Path(folder, name)
            if is_hidden(name):
                yield path, HIDDEN
            elif path.suffix.lower() not in EXTENSIONS:
                yield path, NO_IMAGE
            else:
                yield path, "" if path.is_file() else "not a file, or a broken link"
    for failure in failures:
        yield Path(failure.filename), f"cannot be listed ({failure.strerror})"
