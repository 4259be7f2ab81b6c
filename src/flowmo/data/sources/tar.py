"""Pictures inside uncompressed tars, read in place through an index of their offsets.

ImageNet's training set is a tar of one tar a class; the index points through both, so that nothing is unpacked. It is
the authors' format: a JSON list of ``{"name", "offset", "size"}``, with a ``"label"`` where the tar has one.

A tar whose images share their keys with other files is a WebDataset: a key ends at the first dot of the base name, and
the files of one key are a sample. The image of sample ``000`` is ``000.jpg``; ``000.seg.png`` is something else.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from PIL import Image

from flowmo.data.sources.base import HIDDEN, NO_IMAGE, DataError, class_labels, is_hidden
from flowmo.images import EXTENSIONS, ImageError, read_image

MAX_NESTING = 3
MAX_LABEL_BYTES = 200
MAX_LABELS = 1_000_000
MAX_HEADER_BYTES = 1 << 20
"""Of a member's header with its extensions: a header may claim any length for these, and all of it would be read."""
MAX_PICTURE_BYTES = 1 << 28
MAX_UNINDEXED_BYTES = 1 << 34
"""A larger tar is not looked through whenever it is opened; it needs an index."""
KEY_RULE = "in a WebDataset a key ends at the base name's first dot"
WORDNET = re.compile(r"n\d{8}(?=_)")
"""ImageNet's class at the start of a file name, which is all that the authors' index keeps of it."""


def default_index(tar: str | Path) -> Path:
    """The file beside ``tar`` that its index is written to: ``train.tar`` has ``train.index.json``."""
    return Path(tar).with_suffix(".index.json")


def build_index(tar: str | Path) -> list[dict]:
    """Name, offset and size of every image in ``tar`` and in the tars inside it. Reads headers and labels only.

    Raises:
        DataError: no such file, compressed, damaged, without images, or a WebDataset with a sample of several images.
    """
    return look_through(tar)[0]


def look_through(tar: str | Path) -> tuple[list[dict], dict[str, str]]:
    """The index of ``tar``, see ``build_index``, and the members that are no items, with the reason of each."""
    left_out: dict[str, str] = {}
    try:
        with open(tar, "rb") as file:
            entries = list(_images(_Headers(file), 0, "", 0, left_out))
    except (OSError, MemoryError) as error:
        raise DataError(f"{tar}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except DataError as error:
        raise DataError(f"{tar}: {error}") from None
    except (tarfile.TarError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{tar}: not an uncompressed tar, or a damaged one ({_short(error)})") from None
    if not entries:
        raise DataError(f"{tar}: holds no pictures ({', '.join(EXTENSIONS)})")
    return entries, left_out


class _Headers:
    """A file of which only short pieces may be read at a time."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _images(
    file: IO[bytes] | _Headers, start: int, prefix: str, depth: int, left_out: dict[str, str]
) -> Iterator[dict]:
    found: list[dict[str, Any]] = []
    labels: dict[str, str] = {}
    companions: set[str] = set()
    last = -1
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as tar:
        for member in tar:
            if member.size < 0 or member.offset_data <= last:  # it would be read again and again
                raise tarfile.ReadError(f"{member.name} has a negative size")
            last = member.offset_data
            name, offset = prefix + member.name, start + member.offset_data
            if member.isdir():
                continue
            if is_hidden(name):
                left_out[name] = HIDDEN
            elif not member.isreg() or member.issparse():  # a sparse file's bytes lie in pieces
                left_out[name] = "a link or another member without bytes of its own"
            elif name.lower().endswith(EXTENSIONS):
                found.append({"name": name, "offset": offset, "size": member.size})
            elif name.endswith(".tar") and depth < MAX_NESTING:
                inner = _Headers(_opened(tar, member))
                yield from _images(inner, offset, f"{name.removesuffix('.tar')}/", depth + 1, left_out)
            elif name.lower().endswith(".cls") and member.size <= MAX_LABEL_BYTES:
                labels[name] = _opened(tar, member).read().decode("utf-8", "replace").strip()
            else:
                left_out[name] = NO_IMAGE
                companions.add(_key(name))
    others = not_of_their_sample([entry["name"] for entry in found], companions | {_key(name) for name in labels})
    left_out |= others | not_of_their_sample(list(labels))
    of_sample = {_key(name): text for name, text in labels.items() if name not in left_out and text}
    for entry in found:
        if entry["name"] not in others:
            label = of_sample.get(_key(entry["name"]))
            yield entry if label is None else {**entry, "label": _as_label(label)}


def not_of_their_sample(names: Sequence[str], companions: Collection[str] | None = None) -> dict[str, str]:
    """Those of a tar's images, or of its labels, that are not the one of their sample, with the reason of each.

    ``000.jpg`` goes before ``000.seg.png``. A name with several dots counts where none of the tar has one.

    Args:
        companions: keys of the files that are not images. Without them all images of a tar are its items, but those
            that lie beside a plain one.

    Raises:
        DataError: a sample of a WebDataset has several, and no rule chooses among them.
    """
    samples: dict[str, list[str]] = {}
    for name in names:
        samples.setdefault(_key(name), []).append(name)
    strict = companions is None or not samples.keys().isdisjoint(companions)
    plain = {key: [name for name in group if name.count(".", len(key)) == 1] for key, group in samples.items()}
    some_plain = companions is not None and any(plain.values())
    left_out: dict[str, str] = {}
    for key, group in samples.items():
        chosen = plain[key] or ([] if strict and some_plain else group)
        if strict and len(chosen) > 1:
            raise DataError(
                f"{_short(chosen[0])} and {_short(chosen[1])} are of one sample, {_short(key)!r}: {KEY_RULE}; "
                "give each sample a key without dots, one image KEY.jpg and one label KEY.cls"
            )
        if plain[key] and len(plain[key]) > 1:
            chosen = group
        reason = f"beside {_short(chosen[0])}, the one of its sample" if chosen else f"its sample has no {key}.jpg"
        left_out |= dict.fromkeys([name for name in group if name not in chosen], reason)
    return left_out


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
    label: int | str | None


def _as_label(value: Any) -> int | str:
    """A label of an index or of a ``.cls`` file: a number, or a class name."""
    if isinstance(value, str):
        return int(value) if re.fullmatch("[0-9]+", value) else value
    if int(value) != value:
        raise ValueError(f"label {value}")
    return int(value)


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
                _as_label(row["label"]) if row.get("label") is not None else None,
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
        if isinstance(entry.label, int) and not 0 <= entry.label < MAX_LABELS:
            raise DataError(f"{name}: {_short(entry.name)} has a label that is not from 0 to {MAX_LABELS - 1}")
    _refuse_overlaps(entries, name)
    # An index may be older than these rules, or not ours.
    entries = [entry for entry in entries if not is_hidden(entry.name)]
    labelled = {_key(entry.name) for entry in entries if entry.label is not None}
    try:
        others = not_of_their_sample([entry.name for entry in entries], labelled)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    return [entry for entry in entries if entry.name not in others]


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
    """Entries of ``tar`` by its index file, by default the one beside it; looked for in the tar where there is none."""
    path = Path(index or default_index(tar))
    if not path.is_file():
        if index is None and tar.stat().st_size <= MAX_UNINDEXED_BYTES:
            return read_index(tar, build_index(tar), tar)
        raise DataError(f"{path}: no such index of {tar}; make it with: flowmo data index {tar}")
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path}: not an index, a list of name, offset and size ({_short(repr(error))})") from None
    return read_index(tar, rows, path)


class TarSource:
    """Images of one or more tars in the order of their file names, which is the authors'.

    Classes are the ``.cls`` files of a WebDataset; where there are none the folders inside the tar, the inner tars of
    a tar of tars, or the ``n01440764_`` of ImageNet's file names. A folder around all others is no class.

    Args:
        tars: files, each indexed by ``index``, or by the file beside it. A tar without an index is looked through.
        entries: the images, where they are known already.

    Raises:
        DataError: a tar is missing, its index is damaged or of another tar, or some labels are numbers and others are
            words.
    """

    def __init__(
        self, tars: Sequence[str | Path], index: str | Path | None = None, entries: Sequence[Entry] | None = None
    ):
        missing = next((tar for tar in tars if not Path(tar).is_file()), None)
        if missing is not None:
            raise DataError(f"{missing}: no such file")
        if entries is None:
            entries = [entry for tar in tars for entry in load_index(Path(tar), index)]
        self.tars = [Path(tar) for tar in tars]
        self.entries = sorted(entries, key=lambda e: (e.name.rpartition("/")[2], str(e.tar), e.name))
        self.classes, self.labels = self._classes()
        self._descriptors: dict[Path, int] = {}

    def _classes(self) -> tuple[tuple[str, ...], list[int | None]]:
        numbers = [entry.label if isinstance(entry.label, int) else None for entry in self.entries]
        words = [entry.label if isinstance(entry.label, str) else None for entry in self.entries]
        number, word = (next((i for i, x in enumerate(some) if x is not None), None) for some in (numbers, words))
        if number is not None and word is not None:
            raise DataError(
                f"{self.name(number)} has the label {numbers[number]}, {self.name(word)} has {words[word]!r}; "
                "give all images numbers, or all of them names"
            )
        if number is not None:
            return tuple(str(label) for label in range(max(n for n in numbers if n is not None) + 1)), numbers
        if word is not None:
            return class_labels(words)
        names = [[part for part in entry.name.split("/") if part != "."] for entry in self.entries]
        while len({parts[0] for parts in names}) == 1 and all(len(parts) > 2 for parts in names):
            names = [parts[1:] for parts in names]  # `tar cf train.tar train` puts one folder around all
        folders: list[str | None] = []
        for first, *rest in names:
            wordnet = WORDNET.match(first)
            folders.append(first if rest else wordnet.group() if wordnet else None)
        return class_labels(folders)

    @property
    def left_out(self) -> dict[str, str]:
        """Members that are no items. Tars are looked through for them, but for very large ones."""
        small = [tar for tar in self.tars if tar.stat().st_size <= MAX_UNINDEXED_BYTES]
        known = {(entry.tar, entry.name) for entry in self.entries}
        left_out: dict[str, str] = {}
        for tar in small:
            entries, others = look_through(tar)
            others |= {row["name"]: "not in the index" for row in entries if (tar, row["name"]) not in known}
            left_out |= {f"{tar}:{name}": reason for name, reason in others.items()}
        return left_out

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return f"{self.entries[index].tar}:{self.entries[index].name}"

    def label(self, index: int) -> int | None:
        return self.labels[index]

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
