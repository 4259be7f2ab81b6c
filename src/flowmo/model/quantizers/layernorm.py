"""Normed continuous bottleneck with noise synchronization, as in DiTo (Chen et al. 2025), which table 3 compares with.

A token is brought to mean 0 and variance 1. On some pictures training mixes the code with noise up to a level τ, as the
flow does with pictures, and then asks the decoder for timesteps from τ on only: a code on its way from noise is to be
enough for a picture that is just as far on its own. A diffusion model over codes has an easier task after that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.model.quantizers.base import Quantized, WholeBatch, alone

NOISED_SHARE = 0.1
NORM_EPS = 1e-6


class LayerNorm:
    """Continuous code of ``channels`` channels a token, without a loss."""

    sub_tokens = id_count = None
    needs_whole_batch = False

    def __init__(self, channels: int):
        self.channels = self.encoder_channels = channels

    def __call__(self, code: Tensor, whole_batch: WholeBatch = alone) -> Quantized:
        normed, _ = self.quantize(code)
        chance, level = torch.rand(2, len(code), device=code.device)
        level = torch.where(chance < NOISED_SHARE, level, 0.0)
        t = level[:, None, None]
        return Quantized((1 - t) * normed + t * torch.randn_like(normed), None, noise_level=level)

    def quantize(self, code: Tensor) -> tuple[Tensor, None]:
        return F.layer_norm(code.float(), code.shape[-1:], eps=NORM_EPS), None

    def code_from_ids(self, ids: Tensor) -> Tensor:
        raise TypeError("this tokenizer's code is continuous and has no ids; keep the Codes that encode returned")
