"""LlamaGen's tokenizers (Sun et al. 2024): VQGANs with 16 384 unit vectors of 8 channels."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.evaluate.peers.base import TokenNetwork, fill, read_weights
from flowmo.evaluate.peers.convolutional import Attention, HalveByConvolution, Residual, double, nearest, norm

WIDTH, BLOCKS, CODE_CHANNELS = 128, 2, 256
MULTIPLIERS = {8: (1, 2, 2, 4), 16: (1, 1, 2, 2, 4)}


class Halve(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = HalveByConvolution(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Double(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(double(x))


class Level(nn.Module):
    """Residual blocks at one resolution, at the lowest with attention, and the step to the next."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool):
        super().__init__()
        self.res = nn.ModuleList(Residual(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(outputs) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList((Residual(channels, channels), Attention(channels), Residual(channels, channels)))


class Half(nn.Module):
    """Encoder or decoder: a convolution, levels and a middle part in its order, and a convolution."""

    def __init__(self, inputs: int, first: int, last: int, outputs: int, middle_first: bool):
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, first, 3, padding=1)
        self.norm_out = norm(last)
        self.conv_out = nn.Conv2d(last, outputs, 3, padding=1)
        self.middle_first = middle_first

    def forward(self, x: Tensor) -> Tensor:
        parts = [*self.mid, *self.conv_blocks] if self.middle_first else [*self.conv_blocks, *self.mid]
        x = self.conv_in(x)
        for part in parts:
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def encoder(multipliers: tuple[int, ...]) -> Half:
    widths = [WIDTH * m for m in (1, *multipliers)]
    half = Half(3, WIDTH, widths[-1], CODE_CHANNELS, middle_first=False)
    lowest = len(multipliers) - 1
    half.conv_blocks = nn.ModuleList()
    for i in range(len(multipliers)):
        level = Level(widths[i], widths[i + 1], BLOCKS, attention=i == lowest)
        if i < lowest:
            level.downsample = Halve(widths[i + 1])
        half.conv_blocks.append(level)
    half.mid = middle(widths[-1])
    return half


def decoder(multipliers: tuple[int, ...]) -> Half:
    widths = [WIDTH * m for m in (*multipliers, multipliers[-1])]
    half = Half(CODE_CHANNELS, widths[-1], widths[0], 3, middle_first=True)
    half.mid = middle(widths[-1])
    half.conv_blocks = nn.ModuleList()
    for i in reversed(range(len(multipliers))):
        level = Level(widths[i + 1], widths[i], BLOCKS + 1, attention=i == len(multipliers) - 1)
        if i:
            level.upsample = Double(widths[i])
        half.conv_blocks.append(level)
    return half


class LlamaGen(TokenNetwork):
    """One token for each ``stride`` × ``stride`` pixels."""

    id_count = 16384

    def __init__(self, stride: int):
        super().__init__()
        self.encoder, self.decoder = encoder(MULTIPLIERS[stride]), decoder(MULTIPLIERS[stride])
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(self.id_count, 8)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(CODE_CHANNELS, 8, 1), nn.Conv2d(8, CODE_CHANNELS, 1)

    def codebook(self) -> Tensor:
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    def encode(self, x: Tensor) -> Tensor:
        code = self.quant_conv(self.encoder(x)).permute(0, 2, 3, 1)
        return nearest(F.normalize(code, dim=-1), self.codebook())

    def decode(self, ids: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self.codebook()[ids].permute(0, 3, 1, 2)))

    def read(self, path: str | Path) -> None:
        """Weights as published: ``vq_ds16_c2i.pt``, ``vq_ds8_c2i.pt``."""
        fill(self, read_weights(path, "ema", "model"), path, lambda name: name != "quantize.codebook_used")
