"""Large images in blocks that overlap in computation, not in bytes.

A windowed network needs memory in proportion to the area. Above ``LARGEST`` cells a side, an image is
computed in blocks of ``CORE`` cells with a halo on each side. Blocks start on the borders of attention windows, so a
block computes the same windows as the whole image would. Only what reaches further than the halo differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CORE = 32
HALO = 8
LARGEST = CORE + 2 * HALO
RAMP = HALO
"""Cells over which neighbouring blocks are blended."""


@dataclass(frozen=True)
class Span:
    """One block along one axis, in cells: computed from ``start`` to ``stop``, kept from ``first`` to ``last``."""

    start: int
    stop: int
    first: int
    last: int


def spans(cells: int) -> list[Span]:
    """Blocks that cover ``cells`` cells of one axis; one block up to ``LARGEST``."""
    if cells <= LARGEST:
        return [Span(0, cells, 0, cells)]
    cores = [(first, min(first + CORE, cells)) for first in range(0, cells, CORE)]
    return [Span(max(first - HALO, 0), min(last + HALO, cells), first, last) for first, last in cores]


def blocks(rows: int, columns: int) -> Iterator[tuple[Span, Span]]:
    """The blocks of a lattice, row by row."""
    return ((down, across) for down in spans(rows) for across in spans(columns))


def ramp(span: Span, cells: int, cell: int) -> Tensor:
    """Weight of a block's pixels along one axis: it falls to 0 towards a neighbour, and stays 1 at the image's edge.

    The outer ``HALO`` − ``RAMP`` / 2 cells of a block lack context and have no weight.
    """
    position = torch.arange(span.start * cell, span.stop * cell) + 0.5
    weight = torch.ones_like(position)
    if span.first > 0:
        weight = weight.minimum((position / cell - span.first) / RAMP + 0.5)
    if span.last < cells:
        weight = weight.minimum((span.last - position / cell) / RAMP + 0.5)
    return weight.clamp(0, 1)
