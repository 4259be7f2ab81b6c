"""Binary spherical quantization (Zhao et al. 2024): LFQ on the unit sphere, where the rounding error is bounded.

A token is scaled to length 1 and then to the nearest corner of the cube that is inscribed in the sphere. Each bit is
independent of the others given the token, so its entropy is a sum over bits; that of the mean distribution is bounded
from above by such a sum, which is what is maximised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.model.quantizers.base import WholeBatch, alone
from flowmo.model.quantizers.lfq import LFQ

TEMPERATURE = 0.01
SURE = torch.finfo(torch.float32).eps
"""Least probability of a bit's rarer value in a batch."""


class BSQ(LFQ):
    """Binary bottleneck of ``channels`` bits a token; ids in groups of ``group`` bits, laid out as LFQ's."""

    def logits(self, on_sphere: Tensor) -> Tensor:
        """Of a set bit against an unset one, of the soft assignment whose entropies are taken."""
        return 2 * on_sphere * self.channels**-0.5 / TEMPERATURE

    def bounded(self, code: Tensor) -> Tensor:
        """On the sphere."""
        return F.normalize(code, dim=-1)

    def corner(self, code: Tensor) -> Tensor:
        return super().corner(code) * self.channels**-0.5

    def commitment(self, code: Tensor, corner: Tensor) -> Tensor:
        """Squared distance of a token, at most 4."""
        return (code - corner).square().sum(dim=-1).mean()

    def code_from_ids(self, ids: Tensor) -> Tensor:
        return super().code_from_ids(ids) * self.channels**-0.5

    def entropies(self, code: Tensor, whole_batch: WholeBatch = alone) -> tuple[Tensor, Tensor]:
        """Mean entropy of a token's bits, and entropy of the bits' mean distributions, in nats, summed over bits."""
        logit = self.logits(code)
        p = logit.sigmoid()
        sample_entropy = (F.softplus(logit) - logit * p).sum(dim=-1).mean()
        mean = p.flatten(0, -2).mean(dim=0)
        if whole_batch is not alone:
            mean = mean + (whole_batch(mean.detach()) - mean.detach())
        # A bit that every token sets has a mean of 1 in float32, where the entropy's slope is infinite.
        mean = mean.clamp(SURE, 1 - SURE)
        return sample_entropy, torch.special.entr(torch.stack((mean, 1 - mean))).sum()
