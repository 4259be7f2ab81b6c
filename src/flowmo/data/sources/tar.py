"""Images inside uncompressed tars, which are not unpacked: ``tar_index`` has the offset of each.

A tar whose images share keys with other files is a WebDataset. A key ends at the first dot of the base name, and the
files of one key are a sample. The image of sample ``000`` is ``000.jpg``; ``000.seg.png`` is not. Each inner tar is
a WebDataset or not by its own files.

The images of a tar are its ``.npy`` files if it holds no others.
"""

import io
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

from flowmo.data.sources.base import DataError, Source, class_labels, file_version
from flowmo.data.sources.tar_index import MAX_UNINDEXED_BYTES, build_index, load_index
from flowmo.images import ImageError

WORDNET = re.compile(r"n\d{8}(?=_)")
"""ImageNet's class in a file name. The authors' index has no other trace of it."""


class TarSource(Source):
    """Images of one or more tars, sorted by file name as in the authors' code.

    Classes are the ``.cls`` files of a WebDataset. Without those they are the folders inside the tar, the inner tars
    of a tar of tars, or the ``n01440764_`` of ImageNet's file names. A folder around everything is no class.

    Args:
        tars: files. Each is indexed by the file beside it; a tar without an index is scanned.
        index: index of a single tar; the default is ``default_index``.

    Raises:
        DataError: a tar is missing, its index is damaged or belongs to another tar, ``index`` is given for several
            tars, or labels mix numbers and names.
    """

    def __init__(self, tars: Sequence[str | Path], index: str | Path | None = None):
        self.tars = [Path(tar) for tar in tars]
        if index is not None and len(self.tars) > 1:
            raise DataError(
                f"{index}: one index is given for {len(self.tars)} tars. Leave it out, and write an index beside each "
                "tar with: flowmo data index TAR..."
            )
        missing = next((tar for tar in self.tars if not os.path.isfile(tar)), None)
        if missing is not None:
            raise DataError(f"{missing}: no such file.")
        entries = [entry for tar in self.tars for entry in load_index(tar, index)]
        self.entries = sorted(entries, key=lambda e: (e.name.rpartition("/")[2], str(e.tar), e.name))
        self.classes, self.labels = self._classes()

    def _classes(self) -> tuple[tuple[str, ...], list[int | None]]:
        labels = [entry.label for entry in self.entries]
        example = {type(labels[i]): i for i in reversed(range(len(labels)))}
        if int in example and str in example:
            number, word = example[int], example[str]
            raise DataError(
                f"{self.name(number)} has the label {labels[number]}, {self.name(word)} has {labels[word]!r}. "
                "Give all images numbers, or all of them names."
            )
        if int in example:
            numbers = cast(list[int | None], labels)
            return tuple(map(str, range(max(n for n in numbers if n is not None) + 1))), numbers
        if str in example:
            return class_labels(cast(list[str | None], labels))
        parts = [[part for part in entry.name.split("/") if part not in ("", ".")] or [""] for entry in self.entries]
        # `tar cf train.tar train` puts one folder around all classes, and perhaps around some images without a class
        while (
            len({first for first, *_ in parts}) == 1
            and min(map(len, parts)) > 1
            and sum(len(path) > 2 for path in parts) > len(parts) / 2
        ):
            parts = [path[1:] for path in parts]
        wordnet = [WORDNET.match(first) for first, *_ in parts]
        names = [path[0] if path[1:] else match and match.group() for path, match in zip(parts, wordnet, strict=True)]
        return class_labels(names)

    @cached_property
    def left_out(self) -> Mapping[str, str]:  # type: ignore[override]
        """{member: reason} for members that are not items. Tars that need an index are not scanned for them.

        For a tar that cannot be scanned by our rules, though its index is sound, {tar: reason}.
        """
        known = {(entry.tar, entry.name) for entry in self.entries}
        left_out: dict[str, str] = {}
        for tar in self.tars:
            if tar.stat().st_size <= MAX_UNINDEXED_BYTES:
                try:
                    entries, others = build_index(tar)
                except DataError as error:
                    reason = str(error).removeprefix(f"{tar}: ")
                    left_out[str(tar)] = f"members outside its index are unknown: {reason}"
                    continue
                others |= {row["name"]: "not in the index" for row in entries if (tar, row["name"]) not in known}
                left_out |= {f"{tar}:{name}": why for name, why in others.items() if (tar, name) not in known}
        return left_out

    def name(self, index: int) -> str:
        return f"{self.entries[index].tar}:{self.entries[index].name}"

    def key(self, index: int) -> str:
        """Path inside the tar, whose own name counts only among several."""
        entry = self.entries[index]
        return f"{entry.tar.name}:{entry.name}" if len(self.tars) > 1 else entry.name

    def version(self, index: int) -> str:
        entry = self.entries[index]
        return f"{entry.offset} {file_version(entry.tar)}"

    def file(self, index: int) -> io.BytesIO:
        entry = self.entries[index]
        try:
            with open(entry.tar, "rb") as tar:
                tar.seek(entry.offset)
                return io.BytesIO(tar.read(entry.size))
        except OSError as error:
            raise ImageError(f"{self.name(index)}: cannot be read ({error.strerror}).") from None
