"""PSNR and SSIM of image pairs, and image grids. LPIPS is in ``flowmo.losses.perceptual``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.errors import check_side
from flowmo.images import to_bytes

SSIM_WINDOW = 7
SSIM_K = 0.01, 0.03


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of each pair of 8-bit images b × c × h × w, on the scale 0 … 255: float64 b."""
    return (_double(x) - _double(y)).square().flatten(1).mean(dim=1)


def _double(x: Tensor) -> Tensor:
    """Convert to float64, which Apple's GPUs do not have: on the CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def decibels(error: Tensor) -> Tensor:
    """PSNR in dB of mean squared errors of 8-bit images; infinite for an error of 0."""
    return 10 * torch.log10(255.0**2 / error)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """PSNR in dB of each pair of images in [−1, 1], rounded to 8 bits first: b; infinite if they are equal."""
    return decibels(squared_error(to_bytes(x), to_bytes(y))).float()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each pair of 8-bit images b × c × h × w: float64 b.

    It equals scikit-image's default, which the release reports: uniform windows of 7 × 7 pixels inside the image,
    unbiased variances, channels apart. torchmetrics has biased variances. Images below the window's side raise
    ``SmallImageError``.
    """
    check_side("SSIM", x.shape, SSIM_WINDOW)
    x, y = _double(x), _double(y)
    c1, c2 = ((k * 255) ** 2 for k in SSIM_K)
    mean_x, mean_y, xx, yy, xy = (F.avg_pool2d(z, SSIM_WINDOW, 1) for z in (x, y, x * x, y * y, x * y))
    unbiased = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    variance_x, variance_y = unbiased * (xx - mean_x**2), unbiased * (yy - mean_y**2)
    covariance = unbiased * (xy - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def per_channel(metric: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Compute a metric of each channel of pairs of images b × c × h × w: b × c."""
    x_planes, y_planes = (images.flatten(0, 1)[:, None] for images in (x, y))
    return metric(x_planes, y_planes).unflatten(0, x.shape[:2])


def grid(rows: Sequence[Tensor | Sequence[Tensor]], gap: int = 2) -> Tensor:
    """Lay out rows of images c × h × w as one image c × height × width in [−1, 1], with white rules.

    Images of a row have equal heights, images of a column equal widths.
    """
    lines = []
    for row in rows:
        padded = [F.pad(image.clamp(-1, 1), (0, gap, 0, gap), value=1.0) for image in row]
        lines.append(torch.cat(padded, dim=-1))
    sheet = torch.cat(lines, dim=-2)
    return sheet[:, : sheet.shape[1] - gap, : sheet.shape[2] - gap]
