"""Finite scalar quantization (Mentzer et al. 2023): every channel is rounded to one of L levels; there is no codebook.

A token of f channels makes f / g ids of g channels each, L^g of them, lowest channel first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowmo.model.quantizers.base import Quantized, WholeBatch, alone

MARGIN = 1e-3
"""Relative room beyond the outermost levels, which tanh could not reach."""


class FSQ:
    """Bottleneck of ``channels`` channels of ``levels`` levels in [−1, 1], without a loss.

    Args:
        group_bits: ids take as many channels as make no more bits than this.

    Raises:
        ValueError: fewer than two levels, or ``channels`` are no multiple of a group.
    """

    needs_whole_batch = False

    def __init__(self, channels: int, levels: int, group_bits: int):
        if levels < 2:
            raise ValueError(f"{levels} levels tell nothing apart; there must be at least 2")
        self.group = max(int(group_bits / math.log2(levels) + 1e-9), 1)
        if channels % self.group:
            raise ValueError(f"{channels} channels of {levels} levels do not split into groups of {self.group}")
        self.channels = self.encoder_channels = channels
        self.levels = levels
        self.sub_tokens = channels // self.group
        self.id_count = levels**self.group

    def sub_token_of(self, channel: Tensor) -> Tensor:
        """Index of the sub-token that each channel belongs to."""
        return channel // self.group

    def __call__(self, code: Tensor, whole_batch: WholeBatch = alone) -> Quantized:
        bounded = self.bound(code.float())
        places = bounded.round()
        straight = bounded + (places - bounded).detach()
        return Quantized(self.values(straight), self.ids(places))

    def quantize(self, code: Tensor) -> tuple[Tensor, Tensor]:
        places = self.bound(code.float()).round()
        return self.values(places), self.ids(places)

    def code_from_ids(self, ids: Tensor) -> Tensor:
        power = self.levels ** torch.arange(self.group, device=ids.device)
        return self.values((ids[..., None] // power % self.levels).flatten(-2).float())

    def bound(self, code: Tensor) -> Tensor:
        """Onto (−½, L − ½), where rounding gives the levels 0 … L − 1 about equal room."""
        half = (self.levels - 1) / 2
        return half + torch.tanh(code) * (half + 0.5 - MARGIN)

    def values(self, places: Tensor) -> Tensor:
        """Levels 0 … L − 1 to [−1, 1]."""
        return 2 * places / (self.levels - 1) - 1

    def ids(self, places: Tensor) -> Tensor:
        """b t f -> int64 b t f/g."""
        power = self.levels ** torch.arange(self.group, device=places.device)
        return (places.detach().long().unflatten(-1, (self.sub_tokens, self.group)) * power).sum(dim=-1)
