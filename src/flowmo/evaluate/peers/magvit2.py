"""Open-MAGVIT2's tokenizer (Luo et al. 2024): 256 tokens of 18 bits, one bit per channel."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from torch import Tensor, nn

from flowmo.evaluate.peers.base import load_exactly, read_weights
from flowmo.evaluate.peers.convolutional import BitTokenNetwork, chain, conv, head, residuals

WIDTH, BLOCKS, MULTIPLIERS = 128, 4, (1, 1, 2, 2, 4)
EMA = "model_ema."


def encoder(channels: int) -> nn.Sequential:
    widths = [WIDTH * m for m in (1, *MULTIPLIERS)]
    levels = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        down = {"downsample": nn.Conv2d(outputs, outputs, 3, stride=2, padding=1)} if i < len(MULTIPLIERS) - 1 else {}
        levels.append(chain(block=residuals(inputs, outputs, BLOCKS, bias=False), **down))
    middle = residuals(widths[-1], widths[-1], BLOCKS, bias=False)
    start = {"conv_in": conv(3, WIDTH, bias=False), "down": nn.Sequential(*levels)}
    return chain(**start, mid_block=middle, **head(widths[-1], channels, kernel=1))


class AdaptiveNorm(nn.Module):
    """Group norm with a scale from the code's standard deviation and a shift from its mean."""

    def __init__(self, code_channels: int, channels: int):
        super().__init__()
        self.gn = nn.GroupNorm(32, channels, eps=1e-6, affine=False)
        self.gamma, self.beta = nn.Linear(code_channels, channels), nn.Linear(code_channels, channels)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        flat = code.flatten(2)
        scale, shift = self.gamma((flat.var(dim=-1) + self.gn.eps).sqrt()), self.beta(flat.mean(dim=-1))
        return scale[:, :, None, None] * self.gn(x) + shift[:, :, None, None]


class DepthToSpace(nn.Module):
    """A convolution to four times the channels, then a pixel shuffle."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = conv(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        quarters = self.conv1(x).view(b, 2, 2, c, h, w)  # nn.PixelShuffle has the channels outermost
        return quarters.permute(0, 3, 4, 1, 5, 2).reshape(b, c, 2 * h, 2 * w)


class Decoder(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        widths = [WIDTH * m for m in (*MULTIPLIERS, MULTIPLIERS[-1])]
        self.conv_in = conv(channels, widths[-1])
        self.mid_block = residuals(widths[-1], widths[-1], BLOCKS, bias=False)
        self.up, self.adaptive = nn.ModuleList(), nn.ModuleList()
        for i, (outputs, inputs) in enumerate(pairwise(widths)):
            upsample = {"upsample": DepthToSpace(outputs)} if i else {}
            self.up.append(chain(block=residuals(inputs, outputs, BLOCKS, bias=False), **upsample))
            self.adaptive.append(AdaptiveNorm(channels, inputs))
        for name, module in head(widths[0], 3).items():
            self.add_module(name, module)

    def forward(self, code: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(code))
        for level, adaptive in zip(reversed(self.up), reversed(self.adaptive), strict=True):
            x = level(adaptive(x, code))
        return self.conv_out(self.silu(self.norm_out(x)))


class OpenMagvit2(BitTokenNetwork):
    """The 16 × 16 tokenizer of 256-pixel images."""

    def __init__(self, bits: int = 18):
        super().__init__(encoder(bits), Decoder(bits), bits)

    def read(self, path: str | Path) -> None:
        """Load a Lightning checkpoint; EMA weights win, whose names have no dots."""
        weights = read_weights(path, "state_dict")
        weights |= {name: weights[ema] for name in self.state_dict() if (ema := EMA + name.replace(".", "")) in weights}
        load_exactly(self, weights, path, lambda name: name.startswith(("encoder.", "decoder.")))
