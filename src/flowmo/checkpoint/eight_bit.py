"""Weights in 8 bits per number on disk: a quarter of float32.

A matrix is stored as int8 with one float32 scale per output channel (its row), the rest in float32. Reading gives
float32 weights again, so inference neither changes nor gets faster; only the file is smaller.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = ".int8_scale"
SMALLEST = 4096
"""Matrices of fewer numbers stay in float32: they are a thousandth of a file, and often sensitive."""


def stored(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights as they go into a file, on the CPU, in ``dtype``: a floating-point type, or int8."""
    plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    return compress(plain) if dtype == torch.int8 else {name: value.to(dtype) for name, value in plain.items()}


def compress(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name, with int8 matrices and their scales (rows) under ``name + SCALE``."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        value = value.float()
        if value.ndim != 2 or value.numel() < SMALLEST:
            out[name] = value
            continue
        scale = (value.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        out[name] = (value / scale[:, None]).round().to(torch.int8)
        out[name + SCALE] = scale
    return out


def expand(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``compress``; other weights pass as they are.

    Raises:
        ValueError: int8 weights without their scale, or scales of another shape.
    """
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in state:
            continue
        if value.dtype == torch.int8:
            scale = state.get(name + SCALE)
            if scale is None or value.ndim != 2 or scale.shape != value.shape[:1]:
                raise ValueError(f"{name} is in 8 bits without a scale for each row")
            value = value.float() * scale[:, None]
        out[name] = value
    return out
