"""Gaussian bottleneck: the encoder emits mean and log-variance of each latent channel, as in a VAE."""

from __future__ import annotations

import torch
from torch import Tensor

from flowmo.model.quantizers.base import Quantized, WholeBatch, alone

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class KL:
    """Continuous bottleneck of ``channels`` latent channels a token; its loss is the divergence from N(0, I).

    The first half of the encoder's channels is the mean, the second the log-variance. The loss is summed over a
    picture's latent and averaged over the batch, with weight 1, as in the authors' release.
    """

    sub_tokens = id_count = None
    needs_whole_batch = False

    def __init__(self, channels: int):
        self.channels = channels
        self.encoder_channels = 2 * channels

    @staticmethod
    def moments(code: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and clamped log-variance, each b × tokens × channels."""
        mean, log_variance = code.float().chunk(2, dim=-1)
        return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)

    def __call__(self, code: Tensor, whole_batch: WholeBatch = alone) -> Quantized:
        mean, log_variance = self.moments(code)
        sample = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1).mean()
        return Quantized(sample, None, {"kl": divergence}, {"kl": divergence.detach()})

    def quantize(self, code: Tensor) -> tuple[Tensor, None]:
        return self.moments(code)[0], None

    def code_from_ids(self, ids: Tensor) -> Tensor:
        raise TypeError("a KL bottleneck has no ids; keep the Codes that encode returned")
