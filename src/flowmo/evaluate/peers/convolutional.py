"""Building blocks that the convolutional tokenizers share; parameter names are those of their published weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    """Two normalised 3 × 3 convolutions beside a shortcut.

    Args:
        bias: of the convolutions.
        shortcut_of_output: where channels change, the shortcut is a projection of the block's own output, as MaskGIT's
            code has it, and not of its input.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, shortcut_of_output: bool = False):
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.shortcut_of_output = shortcut_of_output
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(outputs if shortcut_of_output else inputs, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(y if self.shortcut_of_output else x)
        return x + y


class Attention(nn.Module):
    """One head over all places."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(seen)


class HalveByConvolution(nn.Conv2d):
    """3 × 3, stride 2, padded below and on the right only."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest row of ``codebook`` n × d to each of x … × d."""
    distance = codebook.square().sum(dim=1) - 2 * x @ codebook.T
    return distance.argmin(dim=-1)


def bits_to_ids(x: Tensor) -> Tensor:
    """Signs of x b c … as integers: b …; channel 0 is the lowest bit."""
    places = 2 ** torch.arange(x.shape[1], device=x.device)
    return torch.einsum("bc...,c->b...", (x > 0).long(), places)


def ids_to_bits(ids: Tensor, channels: int) -> Tensor:
    """Inverse of ``bits_to_ids``, as −1 and 1."""
    places = torch.arange(channels, device=ids.device).view(-1, *(1,) * (ids.ndim - 1))
    return ((ids[:, None] >> places) & 1).float() * 2 - 1
