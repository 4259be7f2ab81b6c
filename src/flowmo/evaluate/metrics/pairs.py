"""Figures of pairs of pictures, and pictures of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.images import to_bytes

SSIM_WINDOW = 7
SSIM_K = 0.01, 0.03


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of each pair of 8-bit pictures b c h w, as numbers 0 … 255: float64 b."""
    return (x.double() - y.double()).square().flatten(1).mean(dim=1)


def decibels(error: Tensor) -> Tensor:
    """PSNR of mean squared errors of 8-bit pictures; none at all is infinite."""
    return 10 * torch.log10(255.0**2 / error)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in [−1, 1], in dB, of the 8-bit pictures that would be saved: b.

    Equal pictures have infinite PSNR.
    """
    return decibels(squared_error(to_bytes(x), to_bytes(y))).float()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each pair of 8-bit pictures b c h w: float64 b; equal ones have 1.

    As scikit-image's default, which the paper reports: windows of 7 × 7 pixels that all count alike, unbiased
    variances, each channel by itself, no windows over the border.

    Raises:
        ValueError: pictures smaller than a window.
    """
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW} pixels a side, not {tuple(x.shape[-2:])}")
    x, y = x.double(), y.double()
    c1, c2 = ((k * 255) ** 2 for k in SSIM_K)
    mean_x, mean_y, xx, yy, xy = (F.avg_pool2d(z, SSIM_WINDOW, 1) for z in (x, y, x * x, y * y, x * y))
    unbiased = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    variance_x, variance_y = unbiased * (xx - mean_x**2), unbiased * (yy - mean_y**2)
    covariance = unbiased * (xy - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def grid(rows: Sequence[Tensor | Sequence[Tensor]], gap: int = 2) -> Tensor:
    """Rows of images 3 h w as one white-ruled image 3 × height × width in [−1, 1].

    The images of a row have one height; those of a column have one width.
    """
    lines = []
    for row in rows:
        padded = [F.pad(image.clamp(-1, 1), (0, gap, 0, gap), value=1.0) for image in row]
        lines.append(torch.cat(padded, dim=-1))
    return torch.cat(lines, dim=-2)[:, :-gap, :-gap]


HEAT = ((0.0, 0.0, 0.02), (0.34, 0.06, 0.43), (0.73, 0.21, 0.33), (0.98, 0.56, 0.04), (0.99, 1.0, 0.64))
"""Colours of ``heat_map`` from least to most."""


def heat_map(values: Tensor) -> Tensor:
    """Values h w as a picture 3 h w in [−1, 1], from black at 0 over red to light yellow at their greatest."""
    colours = torch.tensor(HEAT, dtype=torch.float32)
    place = values.float() / values.max().clamp(min=1e-9) * (len(HEAT) - 1)
    below = place.floor().long().clamp(max=len(HEAT) - 2)
    mixed = torch.lerp(colours[below], colours[below + 1], (place - below)[..., None])
    return mixed.movedim(-1, 0) * 2 - 1
