"""Images of packs in memory: decoded once, kept as uint8 on the device, cropped and mirrored there."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from nano_pictures import files
from PIL import Image
from torch import Tensor

from flowmo.data import DataError, Source, epoch_order
from flowmo.images import ImageError, read_image
from flowmo.images.pixels import PixelFormat
from flowmo.streams import Stream, stream

HELD_OUT_EVERY = 64
"""One of so many images of each pack is held out. A pack that arrives later changes nothing about the earlier ones."""


class MemoryImages(Source):
    """Decoded images without classes.

    Args:
        images: uint8 arrays h × w × 3.
    """

    classes: Sequence[str] = ()

    def __init__(self, images: Sequence[np.ndarray]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index} of the packs"

    def label(self, index: int) -> None:
        return None

    def read(self, index: int, side: int | None = None, pixels: PixelFormat | None = None) -> Image.Image:
        return Image.fromarray(self.images[index])


def load_packs(
    packs: Sequence[Path], side: int, only_held_out: bool = False
) -> tuple[MemoryImages, MemoryImages, dict[str, int]]:
    """Decode zip files or folders of images: training images, held-out images, and their counts.

    Unreadable images and those whose short side is below ``side`` are left out.

    Raises:
        DataError: no image is large enough, or all are held out.
    """
    images: dict[bool, list[np.ndarray]] = {True: [], False: []}
    small = 0
    with ThreadPoolExecutor() as pool:
        for pack in packs:
            files_of = [(i % HELD_OUT_EVERY == 0, file) for i, file in enumerate(contents(pack))]
            wanted = [(held_out, file) for held_out, file in files_of if held_out or not only_held_out]
            decoded = pool.map(decode, (file for _, file in wanted))
            for (held_out, _), image in zip(wanted, decoded, strict=True):
                if image is None or min(image.shape[:2]) < side:
                    small += 1
                else:
                    images[held_out].append(image)
    train, held_out = images[False], images[True]
    if not held_out or not (train or only_held_out):
        raise DataError(
            f"The packs have {len(train)} training images and {len(held_out)} held-out images of at least {side} "
            f"pixels. {small} are smaller or unreadable. Pack more, with runs/pack_images.py --side {side}."
        )
    counts = {"images": len(train), "held_out": len(held_out), "too_small": small}
    return MemoryImages(train), MemoryImages(held_out), counts


def contents(pack: Path) -> Iterator[io.BytesIO | Path]:
    """The files in a pack, in the order of their names."""
    if pack.is_dir():
        yield from files([pack])
        return
    try:
        with zipfile.ZipFile(pack) as archive:
            for name in sorted(archive.namelist()):
                yield io.BytesIO(archive.read(name))
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{pack} is no pack of images ({error}). Make one with runs/pack_images.py.") from None


def decode(file: io.BytesIO | Path) -> np.ndarray | None:
    """uint8 h × w × 3, or ``None`` for a file that cannot be read."""
    try:
        return np.asarray(read_image(file, name=str(file) if isinstance(file, Path) else "an image of a pack"))
    except ImageError as error:
        print(f"left out: {error}", flush=True)
        return None


class DeviceCrops:
    """Random square crops of images that lie on a device, half of them mirrored.

    All pixels lie in one tensor n × 3, image after image. A batch is one indexing operation. It is a function of the
    seed and of the position in the run, so a resumed run sees the same batches.
    """

    def __init__(self, images: Sequence[np.ndarray], side: int, seed: int, flip: bool, device: torch.device):
        self.side, self.seed, self.flip, self.device = side, seed, flip, device
        sizes = torch.tensor([image.shape[:2] for image in images])
        areas = sizes.prod(dim=1)
        self.heights, self.widths = sizes.to(device).unbind(dim=1)
        self.starts = (areas.cumsum(dim=0) - areas).to(device)
        self.pixels = torch.from_numpy(np.concatenate([image.reshape(-1, 3) for image in images])).to(device)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def chosen(self, position: int, count: int) -> Tensor:
        """Indices of the images at some positions of the run: each image once per epoch, in an order of its own."""
        parts = []
        while count:
            epoch, first = divmod(position, len(self.heights))
            if epoch != self._epoch:
                order = torch.tensor(epoch_order(len(self.heights), self.seed, epoch))
                self._epoch, self._order = epoch, order.to(self.device)
            part = self._order[first : first + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return torch.cat(parts)

    def batch(self, position: int, count: int) -> Tensor:
        """The images at ``position`` and after it, float32 count × 3 × side × side in [−1, 1]."""
        index = self.chosen(position, count)
        generator = stream(self.seed, Stream.CROP, position, device=self.device)
        top, left, mirror = torch.rand((3, count), generator=generator, device=self.device)
        width = self.widths[index]
        top = (top * (self.heights[index] - self.side + 1)).long()
        left = (left * (width - self.side + 1)).long()
        line = torch.arange(self.side, device=self.device)
        mirrored = (mirror < 0.5 if self.flip else mirror < 0)[:, None]
        columns = left[:, None] + torch.where(mirrored, line.flip(0), line)
        rows = top[:, None] + line
        places = self.starts[index][:, None, None] + rows[:, :, None] * width[:, None, None] + columns[:, None]
        return self.pixels[places].permute(0, 3, 1, 2).float().div(127.5).sub(1)
