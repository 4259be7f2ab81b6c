"""Finite scalar quantization (Mentzer et al. 2023): round each channel to one of L levels; there is no codebook.

A token of f channels makes f / g ids of g consecutive channels each, L^g of them, lowest channel first.
"""

import torch
from torch import Tensor

from flowmo.config.sections import ModelConfig
from flowmo.model.quantizers.base import Quantized, Quantizer, WholeBatch, local_statistic

MARGIN = 1e-3
"""Distance to the half levels −½ and L − ½. Without it, a saturated tanh could round to level L."""


class FSQ(Quantizer):
    """Bottleneck of ``channels`` channels with ``levels`` levels in [−1, 1] each, without a loss.

    An id joins as many channels as fit into ``model.codebook_size_for_entropy`` bits.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.levels, self.group = config.fsq_levels, config.id_channels

    def forward(self, code: Tensor, whole_batch: WholeBatch = local_statistic) -> Quantized:
        bounded = self.bound(code.float())
        level = bounded.round()
        straight_through = bounded + (level - bounded).detach()
        return Quantized(self.values(straight_through), self.ids(level))

    def quantize(self, code: Tensor) -> tuple[Tensor, Tensor]:
        level = self.bound(code.float()).round()
        return self.values(level), self.ids(level)

    def code_from_ids(self, ids: Tensor) -> Tensor:
        power = self.levels ** torch.arange(self.group, device=ids.device)
        return self.values((ids[..., None] // power % self.levels).flatten(-2).float())

    def sub_token_of(self, channel: Tensor) -> Tensor:
        return channel // self.group

    def bound(self, code: Tensor) -> Tensor:
        """Map to (−½, L − ½). Rounding then gives the levels 0 … L − 1."""
        half = (self.levels - 1) / 2
        return half + torch.tanh(code) * (half + 0.5 - MARGIN)

    def values(self, level: Tensor) -> Tensor:
        """Map levels 0 … L − 1 to [−1, 1]."""
        return 2 * level / (self.levels - 1) - 1

    def ids(self, level: Tensor) -> Tensor:
        """b × t × f -> int64 b × t × f/g."""
        power = self.levels ** torch.arange(self.group, device=level.device)
        return (level.detach().long().unflatten(-1, (-1, self.group)) * power).sum(dim=-1)
