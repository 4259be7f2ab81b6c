"""Where pictures come from, behind one interface: how many there are, and the n-th by its number.

A new kind of source is one class with ``__len__``, ``name`` and ``read``, and one line in ``open_source``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from PIL import Image

from flowmo.errors import FlowMoError
from flowmo.pictures import EXTENSIONS, read_picture


class DataError(FlowMoError, ValueError):
    """A source of pictures that is missing, empty or damaged."""


class Source(Protocol):
    """Pictures in a fixed order, the same in every process; ``read`` may be called in any of them."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call picture ``index``."""

    def read(self, index: int) -> Image.Image:
        """Picture ``index`` as RGB. Raises ``PictureError``."""


def open_source(path: str | Path, index: str | Path | None = None) -> Source:
    """The source that ``path`` names: a folder, or a ``.tar`` file with its index.

    Args:
        index: index of the tar; by default the file that ``flowmo index`` writes beside it.

    Raises:
        DataError: it is not there, or holds no pictures.
    """
    from flowmo.data.tar import TarSource

    if Path(path).is_file() and Path(path).suffix == ".tar":
        return TarSource(path, index or None)
    if Path(path).is_file():
        raise DataError(f"{path}: neither a folder of pictures nor a .tar file")
    return FolderSource(path)


class FolderSource:
    """Every picture file below a folder, sorted by its path.

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

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def read(self, index: int) -> Image.Image:
        return read_picture(self.files[index])
