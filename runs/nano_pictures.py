"""Writes the training pictures of the bundled preset: each photograph whole at 128 pixels, and a closer square of it.

    python runs/nano_pictures.py OUT PICTURES [PICTURES ...] --without HELD_OUT [HELD_OUT ...]

A tokenizer meets whole pictures and tiles of large ones, which are smoother; the closer squares, 128 pixels of the same
photograph at a larger scale, stand for the latter. Photographs that look like a held-out one are left out and listed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Sequence
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

from flowmo.data import FolderSource
from flowmo.images import ImageError, read_image

SIDE = 128
LARGEST_SCALE = 2.0
"""Of a closer square: the short side it is cut from, over ``SIDE``."""
QUALITY = 93
THUMB = 12
ALIKE = 4.0
"""Root-mean-square difference of two thumbnails, in grey levels of 255, under which two pictures count as one."""


def files(folders: Iterable[Path]) -> list[Path]:
    return sorted(p for folder in folders for p in FolderSource(folder).files)


def square(picture: Image.Image, short: int, across: float, down: float) -> Image.Image:
    """``SIDE`` pixels of the picture at a short side of ``short``, at a place of 0 to 1 across and down."""
    scale = short / min(picture.size)
    picture = picture.resize([max(round(n * scale), SIDE) for n in picture.size], Image.Resampling.BICUBIC)
    left, top = round(across * (picture.width - SIDE)), round(down * (picture.height - SIDE))
    return picture.crop((left, top, left + SIDE, top + SIDE))


def thumb(path: Path) -> np.ndarray | None:
    try:
        picture = read_image(path)
    except ImageError:
        return None
    middle = square(picture, SIDE, 0.5, 0.5).convert("L").resize((THUMB, THUMB), Image.Resampling.BOX)
    return np.asarray(middle, np.float32).ravel()


def unlike(photographs: Sequence[Path], held_out: Sequence[Path]) -> list[Path]:
    """The readable photographs that look like none of the held-out ones. Prints the others, each with its reason."""
    with Pool() as pool:
        thumbs = pool.map(thumb, photographs, 64)
        pairs = zip(held_out, pool.map(thumb, held_out, 64), strict=True)
        known = {path: small for path, small in pairs if small is not None}
    names, seen = list(known), np.stack([*known.values(), np.full(THUMB * THUMB, np.inf, np.float32)])
    chosen = []
    for path, small in zip(photographs, thumbs, strict=True):
        if small is None:
            print(f"unreadable: {path}")
            continue
        distance = np.sqrt(np.square(seen - small).mean(axis=1))
        if distance.min() < ALIKE:
            print(f"held out: {path} looks like {names[int(distance.argmin())]} ({distance.min():.1f})")
            continue
        chosen.append(path)
    return chosen


def write(job: tuple[int, Path, Path]) -> None:
    number, path, folder = job
    draw = random.Random(f"{number} {path.name}")
    picture = read_image(path)
    largest = min(LARGEST_SCALE * SIDE, min(picture.size))
    views = [square(picture, SIDE, draw.random(), draw.random())]
    if largest > SIDE:
        views.append(square(picture, round(draw.uniform(SIDE, largest)), draw.random(), draw.random()))
    place = folder / f"{number % 100:02}"
    place.mkdir(parents=True, exist_ok=True)
    for i, view in enumerate(views):
        view.save(place / f"{number:06}_{i}.jpg", quality=QUALITY, subsampling=0)


def check_empty(folder: Path) -> None:
    """Refuse a folder with files: those of a former call could be held out now."""
    if folder.is_dir() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty. Remove it, or name another folder.")


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("pictures", type=Path, nargs="+", help="folders of photographs")
    parser.add_argument("--without", type=Path, nargs="*", default=[], help="folders of held-out photographs")
    arguments = parser.parse_args()
    check_empty(arguments.out)
    photographs, held_out = files(arguments.pictures), files(arguments.without)
    if not photographs:
        raise SystemExit(f"no photographs in {' '.join(map(str, arguments.pictures))}")
    chosen = unlike(photographs, held_out)
    with Pool() as pool:
        for _ in pool.imap_unordered(write, [(i, path, arguments.out) for i, path in enumerate(chosen)], 64):
            pass
    print(f"{len(chosen)} photographs of {len(photographs)}")


if __name__ == "__main__":
    main()
