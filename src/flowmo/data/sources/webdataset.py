"""WebDataset shards: many tars of one dataset, used as one source with random access.

Samples and labels are read as ``flowmo.data.sources.tar`` describes. Shuffling is exact, because shards are indexed and
not streamed.
"""

import glob
import os
import re
from pathlib import Path

from flowmo.data.sources.base import DataError, is_hidden
from flowmo.data.sources.folder import walk

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SHARDS = 1_000_000
WILDCARDS = "*?["


def find_shards(path: str | Path) -> list[Path]:
    """Return the shards of a brace range, a glob pattern or a folder; empty if ``path`` is none of these.

    A folder with images directly beside its tars is a folder of images, and its tars are not shards.

    Raises:
        DataError: a pattern of ``.tar`` files matches nothing, or a folder contains both shards and folders of images.
    """
    text = str(path)
    if os.path.isdir(path):
        tars = sorted(tar for tar in Path(path).glob("*.tar") if not is_hidden(tar.name))
        images = [file for file, reason in walk(Path(path)) if not reason] if tars else []
        if any(file.parent == Path(path) for file in images):
            return []
        if images:
            raise DataError(f"{path}: contains shards and folders of images ({images[0].parent}). Name one of them.")
        return tars
    if not text.endswith(".tar") or os.path.isfile(path):
        return []
    if RANGE.search(text):
        return expand(text)
    if any(wildcard in text for wildcard in WILDCARDS):
        shards = sorted(map(Path, glob.glob(text)))
        if not shards:
            raise DataError(f"{text}: no file matches this pattern.")
        return shards
    return []


def expand(pattern: str) -> list[Path]:
    """``train-{000..002}.tar`` -> its three files; several ranges give every combination. Wildcards are matched."""
    text, *rest = RANGE.split(pattern)  # text, first, last, text, first, last, …, text
    names = [text]
    for first, last, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        if max(len(first), len(last)) > 9 or int(first) > int(last):
            raise DataError(f"{pattern[:100]}: {{{first[:20]}..{last[:20]}}} is not a valid range.")
        if len(names) * (int(last) + 1 - int(first)) > MAX_SHARDS:
            raise DataError(f"{pattern[:100]}: names more than {MAX_SHARDS} shards.")
        numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        names = [name + number + text for name in names for number in numbers]
    shards = []
    for name in names:
        plain = os.path.isfile(name) or not any(wildcard in name for wildcard in WILDCARDS)
        found = [Path(name)] if plain else sorted(map(Path, glob.glob(name)))
        if not found:
            raise DataError(f"{name}: no file matches this pattern.")
        shards += found
    return shards
