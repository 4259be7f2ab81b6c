"""The VQGAN of MaskGIT (Chang et al. 2022), without attention: MaskBit's tokenizer, and the last part of TiTok's."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.evaluate.peers.base import TokenNetwork, fill, read_weights
from flowmo.evaluate.peers.convolutional import HalveByConvolution, Residual, bits_to_ids, double, ids_to_bits, norm

WIDTH, BLOCKS, MULTIPLIERS = 128, 2, (1, 1, 2, 2, 4)


def residuals(inputs: int, outputs: int) -> nn.ModuleList:
    return nn.ModuleList(
        Residual(inputs if i == 0 else outputs, outputs, bias=False, shortcut_of_output=True) for i in range(BLOCKS)
    )


class Stage(nn.Module):
    """Residual blocks at one resolution and the step to the next; ``name`` is what their list is called."""

    def __init__(self, inputs: int, outputs: int, name: str):
        super().__init__()
        self.add_module(name, residuals(inputs, outputs))
        self.blocks_name = name

    def forward(self, x: Tensor) -> Tensor:
        for block in getattr(self, self.blocks_name):
            x = block(x)
        if hasattr(self, "down_conv"):
            return self.down_conv(x)
        return self.upsample_conv(double(x)) if hasattr(self, "upsample_conv") else x


class Decoder(nn.Module):
    """Code b × channels × h × w -> pictures.

    Args:
        lowest_first: whether stages are numbered from the lowest resolution, as MaskBit's, or from the highest.
        name: what a stage's list of blocks is called.
    """

    def __init__(self, channels: int, lowest_first: bool, name: str):
        super().__init__()
        widths = [WIDTH * m for m in (*MULTIPLIERS, MULTIPLIERS[-1])]
        self.conv_in = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.mid = Stage(widths[-1], widths[-1], name) if lowest_first else residuals(widths[-1], widths[-1])
        stages = []
        for i in range(len(MULTIPLIERS)):
            stage = Stage(widths[i + 1], widths[i], name)
            if i:
                stage.upsample_conv = nn.Conv2d(widths[i], widths[i], 3, padding=1)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages) if lowest_first else stages)
        self.lowest_first = lowest_first
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, code: Tensor) -> Tensor:
        x = self.conv_in(code)
        for part in [self.mid] if self.lowest_first else self.mid:
            x = part(x)
        for stage in self.up if self.lowest_first else reversed(self.up):
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Encoder(nn.Module):
    """MaskBit's: pictures -> code b × channels × h/16 × w/16."""

    def __init__(self, channels: int):
        super().__init__()
        widths = [WIDTH * m for m in (1, *MULTIPLIERS)]
        self.conv_in = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for i in range(len(MULTIPLIERS)):
            stage = Stage(widths[i], widths[i + 1], "res_blocks")
            if i < len(MULTIPLIERS) - 1:
                stage.down_conv = HalveByConvolution(widths[i + 1])
            self.down.append(stage)
        self.mid = Stage(widths[-1], widths[-1], "res_blocks")
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in (*self.down, self.mid):
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class MaskBit(TokenNetwork):
    """Weber et al. 2024: 256 tokens of as many bits as the encoder has channels; pictures in [0, 1]."""

    low = 0.0

    def __init__(self, bits: int = 14):
        super().__init__()
        self.bits, self.id_count = bits, 2**bits
        self.encoder, self.decoder = Encoder(bits), Decoder(bits, lowest_first=True, name="res_blocks")

    def encode(self, x: Tensor) -> Tensor:
        return bits_to_ids(self.encoder(x))

    def decode(self, ids: Tensor) -> Tensor:
        return self.decoder(ids_to_bits(ids, self.bits))

    def read(self, path: str | Path) -> None:
        """Weights as published: ``maskbit_tokenizer_14bit.bin``."""
        fill(self, read_weights(path), path, lambda name: not name.startswith("quantize."))
