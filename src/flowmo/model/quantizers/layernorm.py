"""FlowMo's continuous bottleneck of table 3: layer norm and the noise synchronization of DiTo (Chen et al. 2025).

Training mixes the code of some images with noise up to a level τ, as the flow does with images, and trains the decoder
on timesteps from τ on only. A diffusion model over codes then has an easier task.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.model.quantizers.base import Quantized, Quantizer, WholeBatch, local_statistic

NOISED_SHARE = 0.1
NORM_EPS = 1e-6


class LayerNorm(Quantizer):
    """Continuous code of ``channels`` channels per token with mean 0 and variance 1, without a loss."""

    def forward(self, code: Tensor, whole_batch: WholeBatch = local_statistic) -> Quantized:
        normed, _ = self.quantize(code)
        chance, level = torch.rand(2, len(code), device=code.device)
        level = torch.where(chance < NOISED_SHARE, level, 0.0)
        t = level[:, None, None]
        return Quantized((1 - t) * normed + t * torch.randn_like(normed), noise_level=level)

    def quantize(self, code: Tensor) -> tuple[Tensor, None]:
        return F.layer_norm(code.float(), code.shape[-1:], eps=NORM_EPS), None
