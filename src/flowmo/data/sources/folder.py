"""A folder of image files."""

import os
from collections.abc import Iterator
from pathlib import Path

from flowmo.data.sources.base import HIDDEN, NO_IMAGE, DataError, Source, class_labels, file_version, is_hidden
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
        self.root = root = Path(folder)
        if not os.path.isdir(root):  # Path.is_dir raises for a name that is too long
            raise DataError(f"{folder}: no such folder of images.")
        found = dict(walk(root))
        if all(found.values()):
            arrays = [path for path, reason in found.items() if is_array(path.name) and reason == NO_IMAGE]
            found |= {path: "" for path in arrays if os.path.isfile(path)}
        self.files = sorted(path for path, reason in found.items() if not reason)
        left_out = {str(path): reason for path, reason in found.items() if reason}
        if root in found:
            raise DataError(f"{folder}: {found[root]}.")
        if not self.files:
            raise DataError(f"{folder}: contains no images ({', '.join((*EXTENSIONS, ARRAY))}).")
        parts = [path.relative_to(root).parts for path in self.files]
        self.classes, self.labels = class_labels([first if rest else None for first, *rest in parts])
        empty = (str(path) for path in root.iterdir() if os.path.isdir(path) and path.name not in self.classes)
        self.left_out = dict.fromkeys(empty, "a folder without images is no class") | left_out

    def name(self, index: int) -> str:
        return str(self.files[index])

    def key(self, index: int) -> str:
        return self.files[index].relative_to(self.root).as_posix()

    def file(self, index: int) -> Path:
        return self.files[index]

    def version(self, index: int) -> str:
        return file_version(self.files[index])


def walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield (path, "") for every image file below a folder, and (path, reason) for everything left out."""
    folders = [(root, {*root.resolve().parents})]  # with the real paths of the folders around each
    while folders:
        folder, around = folders.pop()
        around = around | {folder.resolve()}
        try:
            entries = [*os.scandir(folder)]
        except OSError as error:
            yield folder, f"cannot be listed ({error.strerror})"
            continue
        for entry in entries:
            path = folder / entry.name
            linked = entry.is_symlink()  # with a target whose name is too long, DirEntry raises and os.path does not
            isdir, isfile = (os.path.isdir(path), os.path.isfile(path)) if linked else (entry.is_dir(), entry.is_file())
            if is_hidden(path.name):
                yield path, HIDDEN
            elif isdir:
                if linked and path.resolve() in around:
                    yield path, "a link to a folder around it"
                else:
                    folders.append((path, around))
            elif path.suffix.lower() not in EXTENSIONS:
                yield path, NO_IMAGE
            else:
                yield path, "" if isfile else "not a file, or a broken link"
