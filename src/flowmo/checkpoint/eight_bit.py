"""Weights in 8 bits per number on disk, a quarter of float32.

A matrix is stored as int8 with one float32 scale per row (output channel); everything else stays float32. Reading
gives float32 weights again, so only the file gets smaller, not the computation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowmo.checkpoint import CheckpointError

SCALE = ".int8_scale"
SMALLEST = 4096
"""Matrices with fewer numbers stay in float32: they hardly add to a file and are often sensitive."""


def stored(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert weights to ``dtype``, a floating-point type or int8, on the CPU; scales go under ``name + SCALE``.

    Raises:
        CheckpointError: another type, which would round weights to 0 or 1; or a weight beyond the type's range.
    """
    if dtype != torch.int8 and not dtype.is_floating_point:
        raise CheckpointError(f"Weights cannot be saved as {dtype}. Use float32, float16, bfloat16 or int8.")
    plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if dtype != torch.int8:
        # a single number is a counter, which may exceed float16
        narrow = {name: value.float() if value.ndim == 0 else value.to(dtype) for name, value in plain.items()}
        for name, value in narrow.items():
            if torch.isfinite(plain[name]).all() and not torch.isfinite(value).all():
                raise CheckpointError(f"{name} has values beyond {dtype}. Save the weights as float32.")
        return narrow
    out: dict[str, Tensor] = {}
    for name, value in plain.items():
        out[name] = value.float()
        if value.ndim == 2 and value.numel() >= SMALLEST:
            out[name], scale = quantize(out[name], 1)
            out[name + SCALE] = scale.flatten()
    return out


def quantize(matrix: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return a matrix as int8, and its scales along ``dim``, which is kept."""
    scale = (matrix.abs().amax(dim, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (matrix / scale).round().to(torch.int8), scale


def expand(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert int8 weights back to float32; others pass unchanged.

    Raises:
        ValueError: int8 weights without a scale for each row.
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
