"""Binary spherical quantization (Zhao et al. 2024): LFQ on the unit sphere, where the quantization error is bounded.

A token is scaled to length 1 and rounded to the nearest corner of the inscribed cube. Its bits are independent, so its
entropy is a sum over bits. The loss maximises the sum of the bits' marginal entropies, an upper bound of the entropy
of the mean distribution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.config.sections import ModelConfig
from flowmo.model.quantizers.base import WholeBatch, local_statistic
from flowmo.model.quantizers.lfq import LFQ, binary_entropy, mean_over_batch

TEMPERATURE = 0.01
EPS = torch.finfo(torch.float32).eps


class BSQ(LFQ):
    """Binary bottleneck of ``channels`` bits per token; ids have the layout of LFQ's."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.corner = self.channels**-0.5

    def logits(self, on_sphere: Tensor) -> Tensor:
        """Logits of set bits under a softmax of ⟨x, codebook⟩ / temperature. LFQ's softmax has a factor of 2."""
        return 2 * on_sphere * self.corner / TEMPERATURE

    def normalize(self, code: Tensor) -> Tensor:
        return F.normalize(code, dim=-1)

    def commitment(self, code: Tensor, quantized: Tensor) -> Tensor:
        """Equation 8, summed over channels and averaged over tokens: below 2 on the sphere."""
        return (code - quantized).square().sum(dim=-1).mean()

    def entropies(self, code: Tensor, whole_batch: WholeBatch = local_statistic) -> tuple[Tensor, Tensor]:
        """Mean entropy of a token's bits, and entropy of the bits' mean distributions, in nats, summed over bits."""
        logit = self.logits(code)
        mean = mean_over_batch(logit.sigmoid().flatten(0, -2).mean(dim=0), whole_batch)
        mean = mean.clamp(EPS, 1 - EPS)  # the entropy's slope is infinite at 0 and 1
        return binary_entropy(logit), torch.special.entr(torch.stack((mean, 1 - mean))).sum()
