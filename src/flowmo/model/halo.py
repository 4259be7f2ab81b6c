"""Encode and decode large images in blocks with a halo: blocks overlap where they are computed, not in the code.

A windowed network needs memory in proportion to the area. Above ``LARGEST`` cells per side, an image is computed in
blocks of ``CORE`` cells with a halo on each side. Blocks start on window borders, so a block has the same attention
windows as the whole image. Only dependencies beyond the halo differ.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CORE = 32
HALO = 8
LARGEST = CORE + 2 * HALO
RAMP = HALO
"""Width in cells of the blend between neighbouring blocks."""


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

    The outer ``HALO`` − ``RAMP`` / 2 cells of a block lack context and have weight 0.
    """
    position = torch.arange(extent.start * cell, extent.stop * cell) + 0.5
    weight = torch.ones_like(position)
    if extent.first > 0:
        weight = weight.minimum((position / cell - extent.first) / RAMP + 0.5)
    if extent.last < cells:
        weight = weight.minimum((extent.last - position / cell) / RAMP + 0.5)
    return weight.clamp(0, 1)


def encode(
    encoder: Callable[[Tensor], Tensor],
    images: Tensor,
    cell: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Encode images b × c × h × w in blocks: float32 b × tokens × channels."""
    rows, columns = images.shape[-2] // cell, images.shape[-1] // cell
    lines = []
    for down in extents(rows):
        line = []
        for across in extents(columns):
            block = images[..., down.start * cell : down.stop * cell, across.start * cell : across.stop * cell]
            code = encoder(block).float().unflatten(1, (down.stop - down.start, -1))
            top, left = down.first - down.start, across.first - across.start
            line.append(code[:, top : top + down.last - down.first, left : left + across.last - across.first])
        lines.append(torch.cat(line, dim=2))
        if progress:
            progress(down.last, rows)
    return torch.cat(lines, dim=1).flatten(1, 2)


def decode(
    decoder: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    code: Tensor,
    cell: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Decode one image in blocks: noise 1 × c × h × w and code 1 × tokens × channels -> c × h × w, blended."""
    channels, height, width = noise.shape[1:]
    rows, columns = height // cell, width // cell
    code = code.unflatten(1, (rows, columns))
    total, weights = torch.zeros(channels, height, width), torch.zeros(height, width)
    todo = [(down, across) for down in extents(rows) for across in extents(columns)]
    for done, (down, across) in enumerate(todo):
        y, x = slice(down.start * cell, down.stop * cell), slice(across.start * cell, across.stop * cell)
        part = code[:, down.start : down.stop, across.start : across.stop].flatten(1, 2)
        weight = ramp(down, rows, cell)[:, None] * ramp(across, columns, cell)
        total[:, y, x] += weight * decoder(noise[..., y, x], part)[0]
        weights[y, x] += weight
        if progress:
            progress(done + 1, len(todo))
    return total / weights
