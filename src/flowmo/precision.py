"""Precision of inference: float32, or bfloat16 matrix products, which a GPU multiplies at several times the rate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("auto", "float32", "bfloat16")


def resolve(precision: str, device: torch.device) -> str:
    """``float32`` or ``bfloat16``. ``auto`` is bfloat16 on an NVIDIA GPU that has it, float32 elsewhere.

    Raises:
        ValueError: an unknown name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; write {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "bfloat16"
    return "float32"


def describe(precision: str, device: torch.device) -> str:
    """How a resolved precision is told with results."""
    if precision == "float32":
        return f"float32 ({device.type})"
    return f"bfloat16 autocast{' with TF32' if device.type == 'cuda' else ''} ({device.type})"


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Context of inference in a resolved precision. ``float32`` changes nothing, an autocast around it included.

    ``bfloat16`` also lets the float32 products that autocast leaves use TF32 on a GPU.
    """
    if precision == "float32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        with torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before)
