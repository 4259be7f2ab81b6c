"""The index of a tar: name, offset, size and label of each image, made from headers alone, and checked when it is read.

It has the authors' format: a JSON list of ``{"name", "offset", "size"}``, with a ``"label"`` if the tar has one, and a
``"link"`` if the member is a hard link. ImageNet's training set is a tar with one tar per class, and its index points
through both.
"""

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from flowmo.data.sources.base import (
    HIDDEN,
    NO_IMAGE,
    DataError,
    evenly_spread,
    is_hidden,
)
from flowmo.errors import one_line
from flowmo.images import EXTENSIONS
from flowmo.images.pixels import ARRAY, is_array

MAX_NESTING = 3
MAX_LABEL_BYTES = 200
CHECKED_HEADERS = 5
SHORTENED = 90
"""Names of so many bytes may be shortened in a header."""
STALE_INDEX = "The index belongs to another file. Make it again with: flowmo data index"
MAX_LABELS = 1_000_000
NO_LABEL = ("", "-1")
"""Contents of a ``.cls`` file that name no class."""
MAX_HEADER_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 28
MAX_UNINDEXED_BYTES = 1 << 34
"""A larger tar needs an index, because scanning it takes too long."""


class Entry(NamedTuple):
    tar: Path
    name: str
    offset: int
    size: int
    label: int | str | None


class Member(NamedTuple):
    """A file in a tar or in a tar inside it.

    Attributes:
        tar: offset of the tar that holds it; 0 for the outer one.
        row: its row of the index.
        label: label that the file holds.
        reason: why it is left out.
    """

    tar: int
    row: dict[str, Any]
    label: str | None
    reason: str


def default_index(tar: str | Path) -> Path:
    """Path of a tar's index: ``train.tar`` has ``train.index.json``."""
    return Path(tar).with_suffix(".index.json")


def build_index(
    tar: str | Path, progress: Callable[[int, int], None] | None = None
) -> tuple[list[dict], dict[str, str]]:
    """Return the index of ``tar``, and {member: reason} for members that are not items. Read only headers and labels.

    The index has name, offset and size of every image in ``tar`` and in the tars inside it.

    Args:
        progress: callback with (MiB done, MiB in total).

    Raises:
        DataError: the file is missing, compressed, damaged, without images, or a WebDataset in which a sample has
            several images.
    """
    members = []
    try:
        with open(tar, "rb") as file:
            total = os.fstat(file.fileno()).st_size >> 20
            for member in _members(_LimitedReader(file), 0, "", 0):
                members.append(member)
                if progress:
                    progress(member.row["offset"] >> 20, total)
        images, left_out = _items(members)
    except DataError as error:
        raise DataError(f"{tar}: {error}") from None
    except Exception as error:  # a damaged header makes tarfile raise anything
        raise DataError(f"{tar}: cannot be read as an uncompressed tar ({one_line(error)}).") from None
    if not images:
        raise DataError(f"{tar}: contains no images ({', '.join((*EXTENSIONS, ARRAY))}).")
    return images, left_out


class _LimitedReader:
    """A file from which each read is short: a damaged header may claim any length for its extensions."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _members(file: _LimitedReader, start: int, prefix: str, depth: int) -> Iterator[Member]:
    last, files = -1, dict[str, tuple[int, int]]()
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as tar:
        for member in tar:
            if member.size < 0 or member.offset_data <= last:  # tarfile would read it forever
                raise tarfile.ReadError(f"{member.name} has a negative size")
            last = member.offset_data
            name, label, reason = prefix + member.name, None, ""
            linked = files.get(member.linkname) if member.islnk() else None  # a file that was packed before
            position, size = linked or (member.offset_data, member.size)
            offset = start + position
            if linked or (member.isreg() and not member.issparse()):  # a sparse file's bytes are not contiguous
                files[member.name] = position, size
            if member.isdir():
                continue
            if is_hidden(name):
                reason = HIDDEN
            elif member.name not in files:
                reason = "a link or another member without bytes of its own"
            elif name.endswith(".tar") and depth < MAX_NESTING and not linked:
                inner = _LimitedReader(cast(IO[bytes], tar.extractfile(member)))
                yield from _members(inner, offset, f"{name.removesuffix('.tar')}/", depth + 1)
                continue
            elif name.lower().endswith(".cls") and size <= MAX_LABEL_BYTES:
                file.seek(position)
                label = file.read(size).decode("utf-8", "replace").strip()
            elif not name.lower().endswith((*EXTENSIONS, ARRAY)):
                reason = NO_IMAGE
            elif size > MAX_IMAGE_BYTES:
                reason = f"has {size} bytes, more than {MAX_IMAGE_BYTES}"
            row = {"name": name, "offset": offset, "size": size, **({"link": True} if linked else {})}
            yield Member(start, row, label, reason)
        _check_end(file, tar.offset, start)


def _check_end(file: _LimitedReader, offset: int, start: int) -> None:
    """Raise ``ReadError`` unless an archive ends at ``offset``. ``tarfile`` takes any damaged header for its end."""
    file.seek(offset)
    header = file.read(tarfile.BLOCKSIZE)
    if header.strip(b"\0") or 0 < len(header) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"a damaged header at byte {start + offset}")
    while piece := file.read(MAX_HEADER_BYTES):
        if piece.strip(b"\0"):
            raise tarfile.ReadError(f"data behind the end of the archive at byte {start + offset}")


def _items(members: Sequence[Member]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Split the files of a tar and of its inner tars into the rows of its index, and {name: reason} for the others."""
    candidates = [member.row["name"] for member in members if member.label is None and not member.reason]
    only_arrays = all(map(is_array, candidates))
    tars: dict[int, list[Member]] = {}
    for member in members:
        if is_array(member.row["name"]) and not member.reason and not only_arrays:
            member = member._replace(reason=NO_IMAGE)
        tars.setdefault(member.tar, []).append(member)
    images: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for group in tars.values():  # one inner tar may be a WebDataset, and another not
        rows, others = _items_of_one_tar(group)
        images += rows
        left_out |= others
    return images, left_out


def _items_of_one_tar(members: Sequence[Member]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    last = {member.row["name"]: member for member in members}
    items = [member for member in members if not member.reason]
    twice = [member.row["name"] for member in items if last[member.row["name"]] is not member]
    members = list(last.values())  # as tar, which extracts the last of a name
    labels = {member.row["name"]: member.label for member in members if member.label is not None}
    left_out = {member.row["name"]: member.reason for member in members if member.reason}
    images = [member.row for member in members if member.label is None and not member.reason]
    others = [*labels, *(name for name, reason in left_out.items() if reason == NO_IMAGE)]
    names = [row["name"] for row in images]
    webdataset = not {*map(_key, others)}.isdisjoint(map(_key, names))
    if webdataset and twice:
        raise DataError(f"{one_line(twice[0])} is there twice. In a WebDataset, give each sample a key of its own.")
    not_items = extra_images(names, webdataset)
    left_out |= not_items | extra_files(list(labels), webdataset=True)
    known = {name: text for name, text in labels.items() if name not in left_out and text not in NO_LABEL}
    label_of = {_key(name): _as_label(text) for name, text in known.items()}
    images = [row for row in images if row["name"] not in not_items]
    for row in images:
        if _key(row["name"]) in label_of:
            row["label"] = label_of[_key(row["name"])]
    return images, left_out


def extra_images(names: Sequence[str], webdataset: bool) -> dict[str, str]:
    """Return {name: reason} for the images of a tar that are not items.

    If ``000.jpg`` exists, ``000.seg.png`` is left out. In a WebDataset, names with several dots are items only if no
    name in the tar has the form ``KEY.jpg``.

    Raises:
        DataError: a sample of a WebDataset has several images.
    """
    complete = {_key(name) for name in names if _is_plain(name)}
    incomplete = [name for name in names if webdataset and complete and _key(name) not in complete]
    left_out = {name: f"its sample has no {_key(name)}.jpg" for name in incomplete}
    return left_out | extra_files([name for name in names if name not in left_out], webdataset)


def extra_files(names: Sequence[str], webdataset: bool) -> dict[str, str]:
    """Return {name: reason} for the images (or labels) beside the ``KEY.jpg`` (or ``KEY.cls``) of their key.

    None is left out if a tar that is no WebDataset has several such files of one key, ``000.jpg`` and ``000.png``.

    Raises:
        DataError: a sample of a WebDataset has several candidates.
    """
    samples: dict[str, list[str]] = {}
    for name in names:
        samples.setdefault(_key(name), []).append(name)
    left_out: dict[str, str] = {}
    for key, group in samples.items():
        plain = [name for name in group if _is_plain(name)]
        if len(plain) == 1:
            reason = f"beside {one_line(plain[0])}, the one of its sample"
            left_out |= {name: reason for name in group if name != plain[0]}
        elif webdataset and len(group) > 1:
            first, second, *_ = plain or group
            raise DataError(
                f"{one_line(first)} and {one_line(second)} are of one sample, {one_line(key)!r}: in a WebDataset a key "
                "ends at the base name's first dot. Give each key one image KEY.jpg and one KEY.cls."
            )
    return left_out


def _is_plain(name: str) -> bool:
    return name.rpartition("/")[2].count(".") == 1


def _key(name: str) -> str:
    """Key of a WebDataset sample: the path up to the first dot of the base name."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _as_label(value: Any) -> int | str:
    """Parse a label of an index or a ``.cls`` file: a number, or a class name."""
    if isinstance(value, str):
        return int(value) if re.fullmatch("[0-9]+", value) else value
    if int(value) != value:
        raise ValueError(f"label {value}")
    return int(value)


def load_index(tar: Path, index: str | Path | None) -> list[Entry]:
    """Read and check the index file of ``tar``, by default the one beside it. Without one, scan the tar.

    Raises:
        DataError: the file is not an index, or belongs to another tar; or the tar is large and has none.
    """
    path, entries = Path(index or default_index(tar)), []
    if not os.path.isfile(path) and (index is not None or tar.stat().st_size > MAX_UNINDEXED_BYTES):
        raise DataError(f"{path}: no such index of {tar}. Make it with: flowmo data index {tar}")
    name, rows = (path, None) if os.path.isfile(path) else (tar, build_index(tar)[0])
    try:
        links = set[int]()
        for row in json.loads(path.read_bytes()) if rows is None else rows:
            links |= {int(row["offset"])} if row.get("link") else set()
            label = None if row.get("label") is None else _as_label(row["label"])
            entries.append(Entry(tar, str(row["name"]), int(row["offset"]), int(row["size"]), label))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RecursionError) as error:
        message = f"{name}: not an index, a list of name, offset and size ({one_line(repr(error))})."
        raise DataError(message) from None
    _check_offsets(entries, tar, name)
    if name == path:
        _check_headers(entries, links, tar, name)
    # An index may be older than these rules, or not ours.
    entries = [entry for entry in entries if not is_hidden(entry.name)]
    if not entries:
        raise DataError(f"{name}: the index contains no images.")
    folders: dict[str, list[Entry]] = {}  # an index does not tell inner tars from folders
    for entry in entries:
        folders.setdefault(entry.name.rpartition("/")[0], []).append(entry)
    not_items: dict[str, str] = {}
    try:
        for group in folders.values():
            webdataset = any(entry.label is not None for entry in group)
            not_items |= extra_images([entry.name for entry in group], webdataset)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    return [entry for entry in entries if entry.name not in not_items]


def _check_offsets(entries: Sequence[Entry], tar: Path, name: Path) -> None:
    total = tar.stat().st_size
    for e in entries:
        problem = ""
        if e.offset < 0 or e.size < 0 or e.offset + e.size > total:
            problem = f"lies outside {tar}. The index belongs to another file"
        elif e.size > MAX_IMAGE_BYTES:
            problem = f"has {e.size} bytes, more than {MAX_IMAGE_BYTES}"
        elif isinstance(e.label, int) and not 0 <= e.label < MAX_LABELS:
            problem = f"has a label that is not from 0 to {MAX_LABELS - 1}"
        if problem:
            raise DataError(f"{name}: {one_line(e.name)} {problem}.")
    for a, b in pairwise(sorted(entries, key=lambda e: (e.offset, e.size))):
        # The same image twice is allowed: it is drawn more often.
        if b.offset < a.offset + a.size and (a.offset, a.size) != (b.offset, b.size):
            raise DataError(f"{name}: {one_line(a.name)} and {one_line(b.name)} overlap. The index is damaged.")


def _check_headers(entries: Sequence[Entry], links: set[int], tar: Path, name: Path) -> None:
    """Compare some entries, spread over a tar, with the headers before their bytes.

    Args:
        links: offsets of hard links, which have the names of other files.
    """
    in_order = sorted(entries, key=lambda e: e.offset)
    chosen = [in_order[i] for i in evenly_spread(CHECKED_HEADERS, len(in_order))]
    others = []
    for entry in chosen:
        try:
            with open(tar, "rb") as file:
                file.seek(max(entry.offset - tarfile.BLOCKSIZE, 0))
                header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except (OSError, tarfile.HeaderError):
            header = tarfile.TarInfo()
        last, found = (text.rpartition("/")[2] for text in (entry.name, header.name))
        if header.size != entry.size:
            raise DataError(f"{name}: {one_line(entry.name)} is not at byte {entry.offset} of {tar}. {STALE_INDEX}")
        # a long or special name is in another header, and shortened in this one
        known = last.isascii() and len(header.name) < SHORTENED and entry.offset not in links
        others += [entry] if last != found and known else []
    if 2 * len(others) > len(chosen):
        raise DataError(f"{name}: {one_line(others[0].name)} has another name in {tar}. {STALE_INDEX}")
