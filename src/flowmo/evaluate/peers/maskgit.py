"""MaskGIT's VQGAN without attention (Chang et al. 2022): the tokenizer of MaskBit, and the pixel decoder of TiTok."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from itertools import pairwise
from pathlib import Path

from torch import nn

from flowmo.evaluate.peers import convolutional
from flowmo.evaluate.peers.base import load_exactly, read_weights
from flowmo.evaluate.peers.convolutional import BitTokenNetwork, chain, conv, double, halve, head

WIDTH, BLOCKS, MULTIPLIERS = 128, 2, (1, 1, 2, 2, 4)
residuals = partial(convolutional.residuals, count=BLOCKS, bias=False, project_output=True)


def encoder(channels: int) -> nn.Sequential:
    """MaskBit's encoder: images -> code b × channels × h/16 × w/16."""
    widths = [WIDTH * m for m in (1, *MULTIPLIERS)]
    levels = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        down = halve("down_conv", outputs) if i < len(MULTIPLIERS) - 1 else {}
        levels.append(chain(res_blocks=residuals(inputs, outputs), **down))
    middle = chain(res_blocks=residuals(widths[-1], widths[-1]))
    start = {"conv_in": conv(3, WIDTH, bias=False), "down": nn.Sequential(*levels)}
    return chain(**start, mid=middle, **head(widths[-1], channels, kernel=1))


def decoder(channels: int, maskbit: bool) -> nn.Sequential:
    """Code b × channels × h × w -> images b×3×16h×16w.

    Args:
        maskbit: name modules as MaskBit does, which numbers levels from the lowest resolution. TiTok does from the
            highest.
    """
    widths, count = [WIDTH * m for m in (*MULTIPLIERS, MULTIPLIERS[-1])], len(MULTIPLIERS)
    levels = OrderedDict()  # in the order of execution, from the lowest resolution
    for i in reversed(range(count)):
        blocks = {"res_blocks" if maskbit else "block": residuals(widths[i + 1], widths[i])}
        up = double("upsample_conv", widths[i]) if i else {}
        levels[str(count - 1 - i if maskbit else i)] = chain(**blocks, **up)
    middle = residuals(widths[-1], widths[-1])
    start = {"conv_in": conv(channels, widths[-1]), "mid": chain(res_blocks=middle) if maskbit else middle}
    return chain(**start, up=nn.Sequential(levels), **head(widths[0], 3))


class MaskBit(BitTokenNetwork):
    """Weber et al. 2024: 256 tokens with one bit per channel; images in [0, 1]."""

    low = 0.0

    def __init__(self, bits: int = 14):
        super().__init__(encoder(bits), decoder(bits, maskbit=True), bits)

    def read(self, path: str | Path) -> None:
        load_exactly(self, read_weights(path), path, lambda name: not name.startswith("quantize."))
