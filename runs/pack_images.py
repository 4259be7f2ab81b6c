"""Packs photographs into zip files of a given size, to train on a machine without a network.

    python runs/pack_images.py OUT FOLDER [FOLDER ...] --mib 58 --side 160 --without HELD_OUT [HELD_OUT ...]

OUT gets ``images-0.zip``, ``images-1.zip``, …, each at most ``--mib`` large. The photographs are shuffled first, so
each file is a fair sample of all folders. Their short side becomes ``--side`` pixels and their shape stays, which
leaves room for random crops. Smaller ones keep their size. Photographs that look like a held-out one are left out and
listed, as in ``nano_pictures.py``.

Images are JPEGs of quality 92 without chroma subsampling. SSIMULACRA 2 gives these a mean score of 80 at a short side
of 160 pixels: not noticeable side by side. WebP never reaches it at this size, because it halves the resolution of
colours: it scores 74 at its highest quality. A file that is small already is copied byte for byte.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from nano_pictures import files, unlike
from PIL import Image, ImageFile

from flowmo.images import read_image
from flowmo.images.corrections import ORIENTATION

QUALITY = 92
MIB = 1 << 20
ImageFile.MAXBLOCK = 8 * MIB  # Pillow's encoder wants room for a whole progressive JPEG


def encode(path: Path, side: int) -> bytes:
    """An image as a JPEG whose short side is at most ``side`` pixels, or the file itself if it already is one."""
    image = read_image(path)
    scale = side / min(image.size)
    if scale < 1:
        image = image.resize([max(side, round(n * scale)) for n in image.size], Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=QUALITY, subsampling=0, optimize=True, progressive=True)
    smaller = scale >= 1 and path.stat().st_size <= content.tell() and is_plain_jpeg(path)
    return path.read_bytes() if smaller else content.getvalue()


def is_plain_jpeg(path: Path) -> bool:
    """Whether a file is an RGB JPEG that is stored upright."""
    with Image.open(path) as image:
        return image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(ORIENTATION, 1) == 1


def stored_bytes(name: str, content: bytes) -> int:
    """Bytes that an uncompressed member of a zip file takes: content, local header, entry in the directory."""
    return len(content) + 30 + 46 + 2 * len(name)


END_OF_DIRECTORY = 22


def write_packs(out: Path, contents: Iterable[bytes], most: int, packs: int = 0) -> Iterator[tuple[Path, int]]:
    """Write images into zip files of at most ``most`` bytes, and yield each finished file with its number of images.

    Args:
        packs: files to write at most; 0 is as many as it takes.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("images-*.zip"):  # of an earlier call, perhaps with images that are held out now
        old.unlink()
    archive, size, count, written = None, 0, 0, 0
    for number, content in enumerate(contents):
        name = f"{number:06}.jpg"
        if archive and size + stored_bytes(name, content) > most:
            yield close(archive), count
            archive, written = None, written + 1
        if packs and written == packs:
            return
        if archive is None:
            path = out / f"images-{written}.zip"
            archive, size, count = zipfile.ZipFile(path.with_suffix(".partial"), "w"), END_OF_DIRECTORY, 0
        archive.writestr(zipfile.ZipInfo(name), content)  # without the time of day: equal images, equal files
        size, count = size + stored_bytes(name, content), count + 1
    if archive:
        yield close(archive), count


def close(archive: zipfile.ZipFile) -> Path:
    """Finish a zip file and give it its name."""
    archive.close()
    partial_path = Path(archive.filename or "")
    path = partial_path.with_suffix(".zip")
    os.replace(partial_path, path)
    return path


def pack(
    out: Path, folders: Sequence[Path], without: Sequence[Path], side: int, most: int, packs: int = 0
) -> list[tuple[Path, int]]:
    """Pack the photographs of some folders; see the module's docstring. Returns each file and its number of images."""
    photographs = files(folders)
    if not photographs:
        raise SystemExit(f"There are no photographs in {' '.join(map(str, folders))}.")
    chosen = unlike(photographs, files(without))
    random.Random(0).shuffle(chosen)
    with Pool() as pool:
        written = list(write_packs(out, pool.imap(partial(encode, side=side), chosen, 16), most, packs))
    print(f"{sum(count for _, count in written)} of {len(photographs)} photographs in {len(written)} files")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("photographs", type=Path, nargs="+", help="folders of photographs")
    parser.add_argument("--without", type=Path, nargs="*", default=[], help="folders of held-out photographs")
    parser.add_argument("--mib", type=float, default=58, help="size of a file, in MiB (58)")
    parser.add_argument("--side", type=int, default=160, help="short side of an image, in pixels (160)")
    parser.add_argument("--packs", type=int, default=0, help="files to write at most (as many as it takes)")
    arguments = parser.parse_args()
    most = int(arguments.mib * MIB)
    for path, count in pack(
        arguments.out, arguments.photographs, arguments.without, arguments.side, most, arguments.packs
    ):
        print(f"{path}: {count} images, {path.stat().st_size / MIB:.2f} MiB")


if __name__ == "__main__":
    main()
