"""Pictures inside an uncompressed tar, read in place through an index of their offsets.

ImageNet's training set is a tar of one tar a class; the index points through both, so that nothing is unpacked. It is
the authors' format: a JSON list of ``{"name", "offset", "size"}``.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from PIL import Image

from flowmo.data.source import DataError
from flowmo.pictures import EXTENSIONS, read_picture

MAX_NESTING = 3


def default_index(tar: str | Path) -> Path:
    """The file beside ``tar`` that its index is written to: ``train.tar`` has ``train.index.json``."""
    return Path(tar).with_suffix(".index.json")


def build_index(tar: str | Path) -> list[dict]:
    """Name, offset and size of every picture in ``tar`` and in the tars inside it. Reads headers only.

    Raises:
        DataError: no such file, compressed, damaged, or without pictures.
    """
    try:
        with open(tar, "rb") as file:
            entries = list(_pictures(file, 0, "", 0))
    except tarfile.TarError as error:
        raise DataError(f"{tar}: not an uncompressed tar, or a damaged one ({error})") from None
    except OSError as error:
        raise DataError(f"{tar}: cannot be read ({error.strerror or error})") from None
    if not entries:
        raise DataError(f"{tar}: holds no pictures ({', '.join(EXTENSIONS)})")
    return entries


def _pictures(file: IO[bytes], start: int, prefix: str, depth: int) -> Iterator[dict]:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            name, offset = prefix + member.name, start + member.offset_data
            if not member.isreg():
                continue
            if name.lower().endswith(EXTENSIONS):
                yield {"name": name, "offset": offset, "size": member.size}
            elif name.endswith(".tar") and depth < MAX_NESTING:
                yield from _pictures(tar.extractfile(member), offset, f"{name.removesuffix('.tar')}/", depth + 1)


class TarSource:
    """Pictures of a tar in the order of their file names, which is the authors'.

    Raises:
        DataError: the tar or its index is missing, the index is damaged, or is not of this tar.
    """

    def __init__(self, tar: str | Path, index: str | Path | None = None):
        self.tar = Path(tar)
        if not self.tar.is_file():
            raise DataError(f"{tar}: no such file")
        path = Path(index or default_index(tar))
        if not path.is_file():
            raise DataError(f"{path}: no such index of {tar}; make it with: flowmo index {tar}")
        try:
            rows = json.loads(path.read_bytes())
            entries = [(str(row["name"]), int(row["offset"]), int(row["size"])) for row in rows]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: not an index, a list of name, offset and size ({error!r})") from None
        if not entries:
            raise DataError(f"{path}: an index of no pictures")
        total = self.tar.stat().st_size
        outside = next(
            (name for name, offset, size in entries if offset < 0 or size < 0 or offset + size > total), None
        )
        if outside is not None:
            raise DataError(f"{path}: {outside} lies outside {tar}; the index is of another file")
        self.entries = sorted(entries, key=lambda entry: (entry[0].rpartition("/")[2], entry[0]))
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return f"{self.tar}:{self.entries[index][0]}"

    def read(self, index: int) -> Image.Image:
        _, offset, size = self.entries[index]
        if self._descriptor is None:
            self._descriptor = os.open(self.tar, os.O_RDONLY)
        # pread has no file position, so that forked workers may share the descriptor
        return read_picture(io.BytesIO(os.pread(self._descriptor, size, offset)), self.name(index))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)
