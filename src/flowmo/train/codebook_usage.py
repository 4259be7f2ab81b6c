"""How much of its vocabulary a bottleneck uses."""

from __future__ import annotations

import torch
from torch import Tensor

from flowmo.distributed import World
from flowmo.model.quantizers import Quantizer


class CodeUsage:
    """Counts the ids of many batches, over all processes; of a continuous bottleneck, nothing."""

    def __init__(self, quantizer: Quantizer, world: World):
        self.world = world
        self.id_count = quantizer.id_count
        self.counts: Tensor | None = None

    def add(self, ids: Tensor | None) -> None:
        """ids: int64 b × tokens × sub-tokens."""
        if ids is not None:
            if self.counts is None:
                self.counts = torch.zeros(self.id_count or 0, dtype=torch.int64, device=ids.device)
            # bincount would ask the host for the largest id
            self.counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))

    def take(self) -> dict[str, float]:
        """Figures since the last call: ``ids_used``, share of the ids that occurred; ``id_entropy``, entropy of an id
        over its bits, 1 where all ids are equally frequent; ``bit_entropy``, mean entropy of a bit alone, at most 1.
        """
        if self.counts is None:
            return {}
        counts = self.world.sum(self.counts).double()
        self.counts = None
        share = counts / counts.sum()
        bits = (len(counts) - 1).bit_length()
        every_id, every_bit = (torch.arange(count, device=share.device) for count in (len(counts), bits))
        is_set = (every_id[:, None] >> every_bit) & 1
        p = (share[:, None] * is_set).sum(dim=0)
        entropy = -torch.special.xlogy(share, share).sum() / torch.log(torch.tensor(2.0)) / bits
        bit_entropy = torch.special.entr(torch.stack((p, 1 - p))).sum(dim=0).mean() / torch.log(torch.tensor(2.0))
        return {
            "ids_used": float((counts > 0).double().mean()),
            "id_entropy": float(entropy),
            "bit_entropy": float(bit_entropy),
        }
