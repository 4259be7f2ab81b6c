"""Open-MAGVIT2's tokenizer (Luo et al. 2024): 256 tokens of 18 bits, each channel a bit."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.evaluate.peers.base import TokenNetwork, fill, read_weights
from flowmo.evaluate.peers.convolutional import Residual, bits_to_ids, ids_to_bits, norm

WIDTH, BLOCKS, MULTIPLIERS = 128, 4, (1, 1, 2, 2, 4)
AVERAGED = "model_ema."


def residuals(inputs: int, outputs: int) -> nn.ModuleList:
    return nn.ModuleList(Residual(inputs if i == 0 else outputs, outputs, bias=False) for i in range(BLOCKS))


class Encoder(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        widths = [WIDTH * m for m in (1, *MULTIPLIERS)]
        self.conv_in = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for i in range(len(MULTIPLIERS)):
            level = nn.Module()
            level.block = residuals(widths[i], widths[i + 1])
            if i < len(MULTIPLIERS) - 1:
                level.downsample = nn.Conv2d(widths[i + 1], widths[i + 1], 3, stride=2, padding=1)
            self.down.append(level)
        self.mid_block = residuals(widths[-1], widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        for block in self.mid_block:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AdaptiveNorm(nn.Module):
    """Group norm whose scale and shift are linear in the code's spread and mean."""

    def __init__(self, code_channels: int, channels: int):
        super().__init__()
        self.gn = nn.GroupNorm(32, channels, eps=1e-6, affine=False)
        self.gamma, self.beta = nn.Linear(code_channels, channels), nn.Linear(code_channels, channels)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        places = code.flatten(2)
        scale = self.gamma((places.var(dim=-1) + self.gn.eps).sqrt())
        shift = self.beta(places.mean(dim=-1))
        return scale[:, :, None, None] * self.gn(x) + shift[:, :, None, None]


class DepthToSpace(nn.Module):
    """A convolution to four times the channels, whose quarters interleave as pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        quarters = self.conv1(x).view(b, 2, 2, c, h, w)  # torch's pixel_shuffle has the channels outermost
        return quarters.permute(0, 3, 4, 1, 5, 2).reshape(b, c, 2 * h, 2 * w)


class Decoder(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        widths = [WIDTH * m for m in (*MULTIPLIERS, MULTIPLIERS[-1])]
        self.conv_in = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.mid_block = residuals(widths[-1], widths[-1])
        self.up, self.adaptive = nn.ModuleList(), nn.ModuleList()
        for i in range(len(MULTIPLIERS)):
            level = nn.Module()
            level.block = residuals(widths[i + 1], widths[i])
            if i:
                level.upsample = DepthToSpace(widths[i])
            self.up.append(level)
            self.adaptive.append(AdaptiveNorm(channels, widths[i + 1]))
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, code: Tensor) -> Tensor:
        x = self.conv_in(code)
        for block in self.mid_block:
            x = block(x)
        for level, adaptive in zip(reversed(self.up), reversed(self.adaptive), strict=True):
            x = adaptive(x, code)
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class OpenMagvit2(TokenNetwork):
    """The 16 × 16 tokenizer of 256 pixels."""

    def __init__(self, bits: int = 18):
        super().__init__()
        self.bits, self.id_count = bits, 2**bits
        self.encoder, self.decoder = Encoder(bits), Decoder(bits)

    def encode(self, x: Tensor) -> Tensor:
        return bits_to_ids(self.encoder(x))

    def decode(self, ids: Tensor) -> Tensor:
        return self.decoder(ids_to_bits(ids, self.bits))

    def read(self, path: str | Path) -> None:
        """Weights as published, a Lightning checkpoint: the averaged ones where it has them."""
        weights = read_weights(path, "state_dict")
        averaged = {name.replace(".", ""): name for name in self.state_dict()}
        for name in [name for name in weights if name.startswith(AVERAGED)]:
            plain = averaged.get(name.removeprefix(AVERAGED))
            if plain is not None:
                weights[plain] = weights[name]
        fill(self, weights, path, lambda name: name.startswith(("encoder.", "decoder.")))
