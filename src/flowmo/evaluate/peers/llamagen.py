"""LlamaGen's tokenizers (Sun et al. 2024): VQGANs with 16 384 unit vectors of 8 channels."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.evaluate.peers.base import TokenNetwork, load_exactly, read_weights
from flowmo.evaluate.peers.convolutional import (
    Attention,
    Residual,
    chain,
    conv,
    double,
    halve,
    head,
    nearest,
    residuals,
)

WIDTH, BLOCKS, CODE_CHANNELS = 128, 2, 256
MULTIPLIERS = {8: (1, 2, 2, 4), 16: (1, 1, 2, 2, 4)}


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention at the lowest, then the resampling if any."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, **resample: nn.Module):
        super().__init__()
        self.res = residuals(inputs, outputs, blocks)
        self.attn = nn.ModuleList(Attention(outputs) if attention else nn.Identity() for _ in range(blocks))
        self.resample = list(resample)
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for residual, attention in zip(self.res, self.attn, strict=True):
            x = attention(residual(x))
        for name in self.resample:
            x = getattr(self, name)(x)
        return x


def middle(channels: int) -> nn.Sequential:
    return nn.Sequential(Residual(channels, channels), Attention(channels), Residual(channels, channels))


def encoder(multipliers: tuple[int, ...]) -> nn.Sequential:
    widths, lowest = [WIDTH * m for m in (1, *multipliers)], len(multipliers) - 1
    levels = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        down = {} if i == lowest else {"downsample": chain(**halve("conv", outputs))}
        levels.append(Level(inputs, outputs, BLOCKS, i == lowest, **down))
    out = head(widths[-1], CODE_CHANNELS)
    return chain(conv_in=conv(3, WIDTH), conv_blocks=nn.Sequential(*levels), mid=middle(widths[-1]), **out)


def decoder(multipliers: tuple[int, ...]) -> nn.Sequential:
    widths, lowest = [WIDTH * m for m in (*multipliers, multipliers[-1])], len(multipliers) - 1
    levels = []
    for i in reversed(range(len(multipliers))):
        up = {"upsample": chain(**double("conv", widths[i]))} if i else {}
        levels.append(Level(widths[i + 1], widths[i], BLOCKS + 1, i == lowest, **up))
    start = {"conv_in": conv(CODE_CHANNELS, widths[-1]), "mid": middle(widths[-1])}
    return chain(**start, conv_blocks=nn.Sequential(*levels), **head(widths[0], 3))


class LlamaGen(TokenNetwork):
    """One token per ``stride`` × ``stride`` pixels."""

    id_count = 16384

    def __init__(self, stride: int):
        super().__init__()
        self.encoder, self.decoder = encoder(MULTIPLIERS[stride]), decoder(MULTIPLIERS[stride])
        self.quantize = chain(embedding=nn.Embedding(self.id_count, 8))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(CODE_CHANNELS, 8, 1), nn.Conv2d(8, CODE_CHANNELS, 1)

    def codebook(self) -> Tensor:
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    def encode(self, x: Tensor) -> Tensor:
        code = self.quant_conv(self.encoder(x)).permute(0, 2, 3, 1)
        return nearest(F.normalize(code, dim=-1), self.codebook())

    def decode(self, ids: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self.codebook()[ids].permute(0, 3, 1, 2)))

    def read(self, path: str | Path) -> None:
        weights = read_weights(path, "ema", "model")
        load_exactly(self, weights, path, lambda name: name != "quantize.codebook_used")
