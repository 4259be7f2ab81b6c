"""Pictures inside uncompressed tars, read in place through an index of their offsets.

ImageNet's training set is a tar of one tar a class; the index points through both, so that nothing is unpacked. It is
the authors' format: a JSON list of ``{"name", "offset", "size"}``, with a ``"label"`` where the tar has one.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from PIL import Image

from flowmo.data.source import DataError, class_labels
from flowmo.pictures import EXTENSIONS, ImageError, read_image

MAX_NESTING = 3
MAX_LABEL_BYTES = 20
MAX_LABELS = 1_000_000
MAX_HEADER_BYTES = 1 << 20
"""Of a member's header with its extensions: a header may claim any length for these, and all of it would be read."""
MAX_PICTURE_BYTES = 1 << 28
WORDNET = re.compile(r"n\d{8}(?=_)")
"""ImageNet's class at the start of a file name, which is all that the authors' index keeps of it."""


def default_index(tar: str | Path) -> Path:
    """The file beside ``tar`` that its index is written to: ``train.tar`` has ``train.index.json``."""
    return Path(tar).with_suffix(".index.json")


def build_index(tar: str | Path) -> list[dict]:
    """Name, offset and size of every picture in ``tar`` and in the tars inside it. Reads headers and labels only.

    Raises:
        DataError: no such file, compressed, damaged, or without pictures.
    """
    try:
        with open(tar, "rb") as file:
            entries = list(_pictures(_Headers(file), 0, "", 0))
    except (OSError, MemoryError) as error:
        raise DataError(f"{tar}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except (tarfile.TarError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{tar}: not an uncompressed tar, or a damaged one ({_short(error)})") from None
    if not entries:
        raise DataError(f"{tar}: holds no pictures ({', '.join(EXTENSIONS)})")
    return entries


class _Headers:
    """A file of which only short pieces may be read at a time."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _pictures(file: IO[bytes] | _Headers, start: int, prefix: str, depth: int) -> Iterator[dict]:
    found: list[dict[str, Any]] = []
    labels: dict[str, int] = {}
    last = -1
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as tar:
        for member in tar:
            if member.size < 0 or member.offset_data <= last:  # it would be read again and again
                raise tarfile.ReadError(f"{member.name} has a negative size")
            last = member.offset_data
            name, offset = prefix + member.name, start + member.offset_data
            if not member.isreg() or member.issparse():  # a sparse file's bytes lie in pieces
                continue
            if name.lower().endswith(EXTENSIONS):
                found.append({"name": name, "offset": offset, "size": member.size})
            elif name.endswith(".cls") and member.size <= MAX_LABEL_BYTES:
                text = _opened(tar, member).read().decode("ascii", "replace").strip()
                if text.isdigit():
                    labels[_key(name)] = int(text)
            elif name.endswith(".tar") and depth < MAX_NESTING:
                inner = _Headers(_opened(tar, member))
                yield from _pictures(inner, offset, f"{name.removesuffix('.tar')}/", depth + 1)
    for entry in found:
        label = labels.get(_key(entry["name"]))
        yield entry if label is None else {**entry, "label": label}


def _opened(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    if file is None:
        raise tarfile.ReadError(f"{member.name} is no file")
    return file


def _key(name: str) -> str:
    """What the files of one WebDataset sample share: the name up to the first dot after its folder."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


class Entry(NamedTuple):
    tar: Path
    name: str
    offset: int
    size: int
    label: int | None


def read_index(tar: Path, rows: Any, name: str | Path) -> list[Entry]:
    """Entries of an index of ``tar``, from file ``name``.

    Raises:
        DataError: it is not an index, or not of this tar.
    """
    try:
        entries = [
            Entry(
                tar,
                str(row["name"]),
                int(row["offset"]),
                int(row["size"]),
                int(row["label"]) if row.get("label") is not None else None,
            )
            for row in rows
        ]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(f"{name}: not an index, a list of name, offset and size ({_short(repr(error))})") from None
    if not entries:
        raise DataError(f"{name}: an index of no pictures")
    total = tar.stat().st_size
    outside = next((e.name for e in entries if e.offset < 0 or e.size < 0 or e.offset + e.size > total), None)
    if outside is not None:
        raise DataError(f"{name}: {_short(outside)} lies outside {tar}; the index is of another file")
    for entry in entries:
        if entry.size > MAX_PICTURE_BYTES:
            raise DataError(f"{name}: {_short(entry.name)} has {entry.size} bytes, more than {MAX_PICTURE_BYTES}")
        if entry.label is not None and not 0 <= entry.label < MAX_LABELS:
            raise DataError(f"{name}: {_short(entry.name)} has a label that is not from 0 to {MAX_LABELS - 1}")
    _refuse_overlaps(entries, name)
    return entries


def _refuse_overlaps(entries: Sequence[Entry], name: str | Path) -> None:
    """Two entries may be of one picture, and so draw it more often, but not of parts of each other."""
    last: Entry | None = None
    for entry in sorted(entries, key=lambda e: (e.offset, e.size)):
        if last is not None and entry.offset < last.offset + last.size and entry[2:4] != last[2:4]:
            raise DataError(f"{name}: {_short(last.name)} and {_short(entry.name)} overlap; the index is damaged")
        last = entry


def _short(value: object) -> str:
    line = " ".join(str(value).split())
    return line if len(line) <= 100 else f"{line[:99]}…"


def load_index(tar: Path, index: str | Path | None) -> list[Entry]:
    """Entries of ``tar`` by its index file, by default the one beside it."""
    path = Path(index or default_index(tar))
    if not path.is_file():
        raise DataError(f"{path}: no such index of {tar}; make it with: flowmo data index {tar}")
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path}: not an index, a list of name, offset and size ({_short(repr(error))})") from None
    return read_index(tar, rows, path)


class TarSource:
    """Pictures of one or more tars in the order of their file names, which is the authors'.

    Classes are the folders inside the tar, the inner tars of a tar of tars, the ``n01440764_`` of ImageNet's file
    names, or the ``.cls`` files of a WebDataset.

    Args:
        tars: files, each indexed by ``index``, or by the file beside it.
        entries: the pictures, where they are known already.

    Raises:
        DataError: a tar or its index is missing, the index is damaged, or is not of this tar.
    """

    def __init__(
        self, tars: Sequence[str | Path], index: str | Path | None = None, entries: Sequence[Entry] | None = None
    ):
        missing = next((tar for tar in tars if not Path(tar).is_file()), None)
        if missing is not None:
            raise DataError(f"{missing}: no such file")
        if entries is None:
            entries = [entry for tar in tars for entry in load_index(Path(tar), index)]
        self.entries = sorted(entries, key=lambda e: (e.name.rpartition("/")[2], str(e.tar), e.name))
        self.classes, self.labels = self._classes()
        self._descriptors: dict[Path, int] = {}

    def _classes(self) -> tuple[tuple[str, ...], list[int]]:
        given = [entry.label for entry in self.entries if entry.label is not None]
        if len(given) == len(self.entries):
            return tuple(str(label) for label in range(max(given) + 1)), given
        folders = []
        for entry in self.entries:
            parts = entry.name.removeprefix("./").split("/")
            wordnet = WORDNET.match(parts[-1])
            folders.append(parts[:-1] or ([wordnet.group()] if wordnet else []))
        return class_labels(folders)

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return f"{self.entries[index].tar}:{self.entries[index].name}"

    def label(self, index: int) -> int | None:
        return self.labels[index] if self.classes else None

    def read(self, index: int, side: int | None = None) -> Image.Image:
        entry = self.entries[index]
        try:
            if entry.tar not in self._descriptors:
                self._descriptors[entry.tar] = os.open(entry.tar, os.O_RDONLY)
            # pread has no file position, so that forked workers may share the descriptor
            content = os.pread(self._descriptors[entry.tar], entry.size, entry.offset)
        except OSError as error:  # the file has gone, or the disk fails
            raise ImageError(f"{self.name(index)}: cannot be read ({error.strerror})") from None
        return read_image(io.BytesIO(content), self.name(index), side)

    def __getstate__(self) -> Mapping:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)
