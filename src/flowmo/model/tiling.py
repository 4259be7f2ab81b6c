"""Large images in overlapping parts: tiles for networks of one size, blocks with a halo for windowed networks.

Each tile has a code of its own, so overlaps are encoded twice. Blocks have one code, and overlap only in computation. A
windowed network takes any size, but needs memory in proportion to the area, so an image above ``LARGEST`` cells per
side is computed in blocks of ``CORE`` cells with a halo on each side. Blocks start on window borders, so a block has
the same attention windows as the whole image. Only dependencies beyond the halo differ.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CORE = 32
HALO = 8
LARGEST = CORE + 2 * HALO
MAX_OVERHANG = 4
"""Limit of the pixels of all tiles or cells, as a multiple of an image's or of the pixel limit. Otherwise a
one-pixel-high image of kilobytes would need gigabytes for its square tiles."""
SMALL = 1 << 22
"""The tiles or cells of any image may cover so many pixels, however thin it is."""
Progress = Callable[[int, int], None]
"""Callback with (items done, items in total)."""


@dataclass(frozen=True)
class Tiling:
    """Square tiles of ``tile`` pixels that cover an image of ``height`` × ``width``, row by row.

    Neighbours overlap by at least an eighth of a tile and are blended there by linear ramps. A side shorter than a tile
    is padded by repeating its last line.
    """

    height: int
    width: int
    tile: int

    def _along(self, length: int) -> int:
        """Return the number of tiles along a side."""
        overlap = self.tile // 8
        return max(math.ceil((length - overlap) / (self.tile - overlap)), 1)

    def starts(self, length: int) -> list[int]:
        """Offsets of the tiles along a side."""
        count = self._along(length)
        return [round(i * (length - self.tile) / max(count - 1, 1)) for i in range(count)]

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self._along(self.height) * self._along(self.width)

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Top and left of every tile."""
        return list(itertools.product(self.starts(self.height), self.starts(self.width)))

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the padded image."""
        return max(self.height, self.tile), max(self.width, self.tile)

    def split(self, image: Tensor) -> Tensor:
        """c × height × width -> tiles × c × tile × tile."""
        bottom, right = self.canvas[0] - self.height, self.canvas[1] - self.width
        return self.crop(F.pad(image, (0, right, 0, bottom), mode="replicate"))

    def crop(self, canvas: Tensor) -> Tensor:
        """c × canvas -> tiles × c × tile × tile."""
        return torch.stack([canvas[:, y : y + self.tile, x : x + self.tile] for y, x in self.corners])

    def merge(self, tiles: Tensor) -> Tensor:
        """tiles × c × tile × tile -> c × height × width."""
        position = torch.arange(1, self.tile + 1, dtype=tiles.dtype, device=tiles.device)
        ramp = torch.minimum(position, position.flip(0)).clamp(max=max(self.tile // 8, 1))
        weight = ramp[:, None] * ramp
        total, weights = tiles.new_zeros(tiles.shape[1], *self.canvas), tiles.new_zeros(self.canvas)
        for (y, x), tile in zip(self.corners, tiles, strict=True):
            total[:, y : y + self.tile, x : x + self.tile] += weight * tile
            weights[y : y + self.tile, x : x + self.tile] += weight
        return (total / weights)[:, : self.height, : self.width]


class Extent(NamedTuple):
    """One block along one axis, in cells: computed from ``start`` to ``stop``, kept from ``first`` to ``last``."""

    start: int
    stop: int
    first: int
    last: int


def extents(cells: int) -> list[Extent]:
    """Blocks that cover ``cells`` cells of one axis; a single block up to ``LARGEST``."""
    if cells <= LARGEST:
        return [Extent(0, cells, 0, cells)]
    cores = [(first, min(first + CORE, cells)) for first in range(0, cells, CORE)]
    return [Extent(max(first - HALO, 0), min(last + HALO, cells), first, last) for first, last in cores]


def ramp(extent: Extent, cells: int, cell: int) -> Tensor:
    """Blending weight of a block's pixels along one axis: falls to 0 towards a neighbour, 1 at the image's edge.

    The ramp is ``HALO`` cells wide. The outer half of the halo lacks context and has weight 0.
    """
    pixels = torch.arange(extent.start * cell, extent.stop * cell, dtype=torch.float32, device="cpu")
    position = (pixels + 0.5) / cell
    weight = torch.ones_like(position)
    if extent.first > 0:
        weight = weight.minimum((position - extent.first) / HALO + 0.5)
    if extent.last < cells:
        weight = weight.minimum((extent.last - position) / HALO + 0.5)
    return weight.clamp(0, 1)


def encode_blocks(
    encoder: Callable[[Tensor], Tensor], images: Tensor, cell: int, progress: Progress | None = None
) -> Tensor:
    """Encode images b × c × h × w in blocks: float32 b × tokens × channels."""
    downs, acrosses = (extents(size // cell) for size in images.shape[2:])
    lines = []
    for done, down in enumerate(downs, 1):
        line = []
        for across in acrosses:
            block = images[..., down.start * cell : down.stop * cell, across.start * cell : across.stop * cell]
            code = encoder(block).float().unflatten(1, (down.stop - down.start, -1))
            code = code[:, down.first - down.start :, across.first - across.start :]
            line.append(code[:, : down.last - down.first, : across.last - across.first])
        lines.append(torch.cat(line, dim=2))
        if progress:
            progress(done, len(downs))
    return torch.cat(lines, dim=1).flatten(1, 2)


def decode_blocks(
    decoder: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    code: Tensor,
    cell: int,
    progress: Progress | None = None,
) -> Tensor:
    """Decode one image in blocks: noise 1 × c × h × w and code 1 × tokens × channels -> c × h × w, blended."""
    channels, height, width = noise.shape[1:]
    rows, columns = height // cell, width // cell
    code = code.unflatten(1, (rows, columns))
    total = torch.zeros(channels, height, width, dtype=torch.float32, device="cpu")
    weights = torch.zeros_like(total[0])
    todo = list(itertools.product(extents(rows), extents(columns)))
    for done, (down, across) in enumerate(todo, 1):
        y, x = slice(down.start * cell, down.stop * cell), slice(across.start * cell, across.stop * cell)
        part = code[:, down.start : down.stop, across.start : across.stop].flatten(1, 2)
        weight = ramp(down, rows, cell)[:, None] * ramp(across, columns, cell)
        total[:, y, x] += weight * decoder(noise[..., y, x], part)[0]
        weights[y, x] += weight
        if progress:
            progress(done, len(todo))
    return total / weights
