"""Tiles of an image of any size, for networks of one size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
        """Number of tiles along a side."""
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
        return [(top, left) for top in self.starts(self.height) for left in self.starts(self.width)]

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the padded image."""
        return max(self.height, self.tile), max(self.width, self.tile)

    def split(self, image: Tensor) -> Tensor:
        """c × height × width -> tiles × c × tile × tile."""
        rows = torch.arange(self.canvas[0], device=image.device).clamp(max=self.height - 1)
        columns = torch.arange(self.canvas[1], device=image.device).clamp(max=self.width - 1)
        return self.crop(image[:, rows][:, :, columns])

    def crop(self, canvas: Tensor) -> Tensor:
        """c × canvas -> tiles × c × tile × tile."""
        return torch.stack([canvas[:, y : y + self.tile, x : x + self.tile] for y, x in self.corners])

    def merge(self, tiles: Tensor) -> Tensor:
        """tiles × c × tile × tile -> c × height × width."""
        position = torch.arange(1, self.tile + 1, dtype=tiles.dtype, device=tiles.device)
        ramp = torch.minimum(position, position.flip(0)).clamp(max=max(self.tile // 8, 1))
        weight = ramp[:, None] * ramp
        total = tiles.new_zeros(tiles.shape[1], *self.canvas)
        weights = tiles.new_zeros(self.canvas)
        for (y, x), tile in zip(self.corners, tiles, strict=True):
            total[:, y : y + self.tile, x : x + self.tile] += weight * tile
            weights[y : y + self.tile, x : x + self.tile] += weight
        return (total / weights)[:, : self.height, : self.width]
