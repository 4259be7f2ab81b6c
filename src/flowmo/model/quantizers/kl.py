"""Gaussian bottleneck: the encoder emits mean and log-variance of each latent channel, as in a VAE."""

import torch
from torch import Tensor

from flowmo.config.sections import ModelConfig
from flowmo.model.quantizers.base import Quantized, Quantizer, WholeBatch, local_statistic

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class KL(Quantizer):
    """Continuous bottleneck of ``channels`` latent channels per token; the loss is the divergence from N(0, I).

    The encoder's first half of channels is the mean, the second half the log-variance. The loss is summed over an
    image's latent and averaged over the batch, with weight 1, as in the authors' release.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.encoder_channels = 2 * self.channels

    @staticmethod
    def moments(code: Tensor) -> tuple[Tensor, Tensor]:
        """Split into mean and clamped log-variance, each b × tokens × channels."""
        mean, log_variance = code.float().chunk(2, dim=-1)
        return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)

    def forward(self, code: Tensor, whole_batch: WholeBatch = local_statistic) -> Quantized:
        mean, log_variance = self.moments(code)
        sample = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1).mean()
        return Quantized(sample, losses={"kl": divergence}, statistics={"kl": divergence})

    def quantize(self, code: Tensor) -> tuple[Tensor, None]:
        return self.moments(code)[0], None
