"""Figures of pairs of pictures, and pictures of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowmo.pictures import to_bytes


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair, in dB, of the 8-bit pictures that would be saved: b c h w -> b.

    Equal pictures have infinite PSNR.
    """
    error = (to_bytes(x).double() - to_bytes(y).double()).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(255.0**2 / error)).float()


def grid(rows: Sequence[Tensor], gap: int = 2) -> Tensor:
    """Batches b 3 h w, one a row, as one white-ruled picture 3 × height × width in [−1, 1]."""
    lines = []
    for row in rows:
        padded = torch.nn.functional.pad(row.clamp(-1, 1), (0, gap, 0, gap), value=1.0)
        lines.append(torch.cat(list(padded), dim=-1))
    return torch.cat(lines, dim=-2)[:, :-gap, :-gap]
