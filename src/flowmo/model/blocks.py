"""Split large images into blocks that overlap in computation but not in bytes.

A windowed network needs memory in proportion to the area. Above ``LARGEST`` cells per side, an image is computed in
blocks of ``CORE`` cells with a halo on each side. Blocks start on window borders, so a block has the same attention
windows as the whole image. Only dependencies beyond the halo differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CORE = 32
HALO = 8
LARGEST = CORE + 2 * HALO
RAMP = HALO
"""Width in cells of the blend between neighbouring blocks."""


class Span(NamedTuple):
    """One block along one axis, in cells: computed from ``start`` to ``stop``, kept from ``first`` to ``last``."""

    start: int
    stop: int
    first: int
    last: int


def spans(cells: int) -> list[Span]:
    """Blocks that cover ``cells`` cells of one axis; a single block up to ``LARGEST``."""
    if cells <= LARGEST:
        return [Span(0, cells, 0, cells)]
    cores = [(first, min(first + CORE, cells)) for first in range(0, cells, CORE)]
    return [Span(max(first - HALO, 0), min(last + HALO, cells), first, last) for first, last in cores]


def blocks(rows: int, columns: int) -> Iterator[tuple[Span, Span]]:
    """Yield the (vertical, horizontal) spans of all blocks, row by row."""
    return ((down, across) for down in spans(rows) for across in spans(columns))


def ramp(span: Span, cells: int, cell: int) -> Tensor:
    """Blending weight of a block's pixels along one axis: falls to 0 towards a neighbour, 1 at the image's edge.

    The outer ``HALO`` − ``RAMP`` / 2 cells of a block lack context and have weight 0.
    """
    position = torch.arange(span.start * cell, span.stop * cell) + 0.5
    weight = torch.ones_like(position)
    if span.first > 0:
        weight = weight.minimum((position / cell - span.first) / RAMP + 0.5)
    if span.last < cells:
        weight = weight.minimum((span.last - position / cell) / RAMP + 0.5)
    return weight.clamp(0, 1)
