"""Building blocks of the convolutional tokenizers. Modules have the names of the published weights."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.evaluate.peers.base import TokenNetwork


def chain(**modules: nn.Module) -> nn.Sequential:
    """Run named modules one after another, in the order of the arguments."""
    return nn.Sequential(OrderedDict(modules))


def conv(inputs: int, outputs: int, **options: bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def halve(name: str, channels: int) -> dict[str, nn.Module]:
    """3 × 3 convolution of stride 2, padded below and on the right only."""
    return {"pad": nn.ZeroPad2d((0, 1, 0, 1)), name: nn.Conv2d(channels, channels, 3, stride=2)}


def double(name: str, channels: int) -> dict[str, nn.Module]:
    """Nearest-neighbour upsampling and a 3 × 3 convolution."""
    return {"nearest": nn.Upsample(scale_factor=2.0), name: conv(channels, channels)}


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def head(channels: int, outputs: int, kernel: int = 3) -> dict[str, nn.Module]:
    """The last layers of every encoder and decoder."""
    last = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2)
    return {"norm_out": norm(channels), "silu": nn.SiLU(), "conv_out": last}


class Residual(nn.Module):
    """Two normalized 3 × 3 convolutions with a shortcut.

    Args:
        bias: give the convolutions a bias.
        project_output: if channels change, project the block's own output, as MaskGIT does, instead of its input.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, project_output: bool = False):
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1, self.conv2 = conv(inputs, outputs, bias=bias), conv(outputs, outputs, bias=bias)
        self.project_output = project_output
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(outputs if project_output else inputs, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(y if self.project_output else x)
        return x + y


def residuals(inputs: int, outputs: int, count: int, **options: bool) -> nn.Sequential:
    return nn.Sequential(*(Residual(inputs if i == 0 else outputs, outputs, **options) for i in range(count)))


class Attention(nn.Module):
    """Self-attention over all positions, with one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # b 1 hw c
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the row of ``codebook`` n × d that is nearest to each x … × d."""
    distance = codebook.square().sum(dim=1) - 2 * x @ codebook.T
    return distance.argmin(dim=-1)


def bits_to_ids(x: Tensor) -> Tensor:
    """Pack the signs of x b c … into integers b …; channel 0 is the lowest bit."""
    return torch.einsum("bc...,c->b...", (x > 0).long(), 2 ** torch.arange(x.shape[1], device=x.device))


def ids_to_bits(ids: Tensor, channels: int) -> Tensor:
    """Invert ``bits_to_ids``: b … -> −1 and 1, b c …."""
    shifts = torch.arange(channels, device=ids.device).view(-1, *(1,) * (ids.ndim - 1))
    return ((ids[:, None] >> shifts) & 1).float() * 2 - 1


class BitTokenNetwork(TokenNetwork):
    """A tokenizer whose ids are the signs of its code's channels."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, bits: int):
        super().__init__()
        self.encoder, self.decoder, self.bits, self.id_count = encoder, decoder, bits, 2**bits

    def encode(self, x: Tensor) -> Tensor:
        return bits_to_ids(self.encoder(x))

    def decode(self, ids: Tensor) -> Tensor:
        return self.decoder(ids_to_bits(ids, self.bits))
