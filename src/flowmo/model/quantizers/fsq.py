"""Finite scalar quantization (Mentzer et al. 2023): round each channel to one of L levels; there is no codebook.

A token of f channels makes f / g ids of g consecutive channels each, L^g of them, lowest channel first.
"""

import torch
from torch import Tensor

from flowmo.config.sections import ModelConfig
from flowmo.model.quantizers.base import Quantizer, straight_through

MARGIN = 1e-3
"""Distance to the half levels −½ and L − ½. Without it, a saturated tanh could round to level L."""


class FSQ(Quantizer):
    """Bottleneck of ``channels`` channels with ``levels`` levels in [−1, 1] each, without a loss.

    An id joins as many channels as fit into ``model.codebook_size_for_entropy`` bits.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.levels, self.group = config.fsq_levels, config.id_channels

    def quantize(self, code: Tensor) -> tuple[Tensor, Tensor]:
        half = (self.levels - 1) / 2
        bounded = half + torch.tanh(code.float()) * (half + 0.5 - MARGIN)  # in (−½, L − ½)
        level = bounded.detach().round()
        ids = (level.long().unflatten(-1, (-1, self.group)) * self.powers(level.device)).sum(dim=-1)
        return self.values(straight_through(level, bounded)), ids

    def code_from_ids(self, ids: Tensor) -> Tensor:
        return self.values((ids[..., None] // self.powers(ids.device) % self.levels).flatten(-2).float())

    def sub_token_of(self, channel: Tensor) -> Tensor:
        return channel // self.group

    def values(self, level: Tensor) -> Tensor:
        """Map levels 0 … L − 1 to [−1, 1]."""
        return 2 * level / (self.levels - 1) - 1

    def powers(self, device: torch.device) -> Tensor:
        """Weight of each channel's level in an id."""
        return self.levels ** torch.arange(self.group, device=device)
