"""DISTS (Ding et al. 2020): similarity of structure and texture in VGG-16's features. Lower is closer.

The weights of the channels are the file ``weights.pt`` inside the package DISTS_pytorch on PyPI. VGG-16 is found as for
LPIPS, see docs/evaluation.md.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.losses.perceptual import LPIPS

CONVOLUTIONS = (2, 2, 3, 3, 3)
"""Convolutions of each of VGG-16's five stages."""
CHANNELS = (3, 64, 128, 256, 512, 512)
STABLE = 1e-6


class DISTS(nn.Module):
    """``distance(x, y) -> b`` of images b 3 h w in [−1, 1]: 0 for equal images, below 1.

    Args:
        path: ``weights.pt`` of DISTS_pytorch.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        convolutions = [layer for layer in LPIPS("vgg").modules() if getattr(layer, "kernel_size", None) == (3, 3)]
        weights = [(layer.weight.detach(), layer.bias.detach()) for layer in convolutions]
        self.stages = [[weights.pop(0) for _ in range(count)] for count in CONVOLUTIONS]
        heads = torch.load(path, weights_only=True)
        total = heads["alpha"].sum() + heads["beta"].sum()
        self.texture, self.structure = (
            (heads[name].detach().flatten() / total).split(CHANNELS) for name in ("alpha", "beta")
        )

    def features(self, images: Tensor) -> list[Tensor]:
        """The image in [0, 1], then the last activation of each stage."""
        x = (images + 1) / 2
        out = [x]
        mean, std = x.new_tensor([0.485, 0.456, 0.406]), x.new_tensor([0.229, 0.224, 0.225])
        x = (x - mean[:, None, None]) / std[:, None, None]
        for number, stage in enumerate(self.stages):
            x = l2_pool(x) if number else x
            for weight, bias in stage:
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            out.append(x)
        return out

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        similarity = x.new_zeros(len(x))
        pairs = zip(self.features(x), self.features(y), self.texture, self.structure, strict=True)
        for a, b, texture, structure in pairs:
            mean_a, mean_b = a.mean((2, 3)), b.mean((2, 3))
            var_a, var_b = a.var((2, 3), correction=0), b.var((2, 3), correction=0)
            covariance = (a * b).mean((2, 3)) - mean_a * mean_b
            luminance = (2 * mean_a * mean_b + STABLE) / (mean_a**2 + mean_b**2 + STABLE)
            contrast = (2 * covariance + STABLE) / (var_a + var_b + STABLE)
            similarity = similarity + (texture * luminance + structure * contrast).sum(1)
        return 1 - similarity


def l2_pool(x: Tensor) -> Tensor:
    """Root of the mean square under a 3 × 3 Hann window, stride 2."""
    window = torch.hann_window(5, periodic=False, dtype=x.dtype)[1:-1]
    kernel = torch.outer(window, window)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 3, 3)
    return (F.conv2d(x**2, kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()
