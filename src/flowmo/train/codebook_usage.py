"""Codebook usage: how many ids a bottleneck uses, and how evenly."""

import math

import torch
from torch import Tensor

from flowmo.distributed import World


class CodebookUsage:
    """Counts ids over batches and ranks. ``id_count`` is ``None`` for a continuous bottleneck, which has no ids."""

    def __init__(self, id_count: int | None, world: World):
        self.id_count, self.world = id_count or 0, world
        self.counts: Tensor | None = None

    def add(self, ids: Tensor | None) -> None:
        """Count ids, int64 b × tokens × sub-tokens."""
        if ids is not None:
            if self.counts is None:
                self.counts = torch.zeros(self.id_count, dtype=torch.int64, device=ids.device)
            self.counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))  # bincount would sync the host

    def take(self) -> dict[str, float]:
        """Return the metrics since the last call, on all ranks together, and start anew.

        ``ids_used`` is the share of ids that occurred. ``id_entropy`` is the entropy of an id over its bits, 1 where
        all ids are equally frequent. ``bit_entropy`` is the mean entropy of a single bit, at most 1.
        """
        if self.counts is None:
            return {}
        counts = self.world.sum(self.counts).double()
        self.counts = None
        share = counts / counts.sum()
        bits = (len(counts) - 1).bit_length()
        is_set = (torch.arange(len(counts), device=share.device)[:, None] >> torch.arange(bits).to(share.device)) & 1
        p = (share[:, None] * is_set).sum(dim=0)
        return {
            "ids_used": float((counts > 0).double().mean()),
            "id_entropy": float(torch.special.entr(share).sum()) / math.log(2) / bits,
            "bit_entropy": float(torch.special.entr(torch.stack((p, 1 - p))).sum(dim=0).mean()) / math.log(2),
        }
