"""WebDataset shards: many tars of one dataset, seen as one source with random access.

A sample is the files of a tar that share a name up to its first dot; its image and its ``.cls`` label are read, see
``flowmo.data.sources.tar``.
Shuffling stays exact, every picture once an epoch, because the shards are indexed, not streamed.
"""

from __future__ import annotations

import glob
import itertools
import math
import re
from pathlib import Path

from flowmo.data.sources.base import DataError, is_hidden
from flowmo.data.sources.folder import walk

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SHARDS = 1_000_000


def find_shards(path: str | Path) -> list[Path]:
    """The shards that a range, a pattern or a folder of tars names; empty where ``path`` is something else.

    Raises:
        DataError: a range or pattern of ``.tar`` files that names none, or lacks one; a folder of both shards and
            folders of images.
    """
    text = str(path)
    if Path(path).is_dir():
        tars = sorted(tar for tar in Path(path).glob("*.tar") if not is_hidden(tar.name))
        images = [file for file, reason in walk(Path(path)) if not reason] if tars else []
        if any(file.parent == Path(path) for file in images):
            return []
        if images:
            raise DataError(f"{path}: holds shards and folders of images, such as {images[0].parent}; name one of them")
        return tars
    if not text.endswith(".tar") or Path(path).is_file():
        return []
    if RANGE.search(text):
        shards = expand(text)
        missing = next((shard for shard in shards if not shard.is_file()), None)
        if missing is not None:
            raise DataError(f"{missing}: no such file, of {len(shards)} that {text} names")
        return shards
    if any(mark in text for mark in "*?["):
        shards = sorted(map(Path, glob.glob(text)))
        if not shards:
            raise DataError(f"{text}: no file of that pattern")
        return shards
    return []


def expand(pattern: str) -> list[Path]:
    """``train-{000..002}.tar`` -> its three files; several ranges give every combination."""
    parts = RANGE.split(pattern)  # text, first, last, text, first, last, …, text
    choices: list[range] = []
    widths: list[int] = []
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        if max(len(first), len(last)) > 9 or not int(first) <= int(last) < int(first) + MAX_SHARDS:
            raise DataError(f"{pattern[:100]}: {{{first[:20]}..{last[:20]}}} is no range of shards")
        choices.append(range(int(first), int(last) + 1))
        widths.append(len(first))
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise DataError(f"{pattern[:100]}: names more than {MAX_SHARDS} shards")
    names = []
    for chosen in itertools.product(*choices):
        numbers = [f"{i:0{width}d}" for i, width in zip(chosen, widths, strict=True)]
        names.append("".join(itertools.chain.from_iterable(zip(parts[::3], (*numbers, ""), strict=True))))
    return [Path(name) for name in names]
