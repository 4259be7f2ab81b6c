"""Precision: float32, or bfloat16 matrix products, which are several times faster on a GPU."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("auto", "float32", "bfloat16")
X86 = ("x86_64", "AMD64")


def multiplies_bfloat16(device: torch.device) -> bool:
    """True if the device has bfloat16 matrix products. A CPU that emulates them takes 4 to 70 times as long."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return True
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    # oneDNN supports bfloat16 on every x86 CPU with AVX-512, and emulates it on those without these units.
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return units or platform.machine() not in X86


def resolve(precision: str, device: torch.device) -> str:
    """Return ``float32`` or ``bfloat16``. ``auto`` is bfloat16 on an NVIDIA GPU that supports it, else float32.

    Raises:
        ValueError: an unknown name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}. Write {', '.join(PRECISIONS)}.")
    if precision != "auto":
        return precision
    return "bfloat16" if device.type == "cuda" and multiplies_bfloat16(device) else "float32"


def describe(precision: str, device: torch.device) -> str:
    """Describe a resolved precision, for reports."""
    if precision == "float32":
        return f"float32 ({device.type})"
    return f"{precision} autocast{' with TF32' if device.type == 'cuda' else ''} ({device.type})"


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Context of inference in a resolved precision. ``float32`` leaves an outer autocast as it is.

    ``bfloat16`` and ``float16`` are autocast; on a GPU the remaining float32 products use TF32.

    Raises:
        TypeError: weights of another type, after ``.double()``.
    """
    if precision not in ("float32", "bfloat16", "float16"):
        raise TypeError(f"The weights are {precision}. Call .float(), .bfloat16() or .half() on the model.")
    if precision == "float32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        with torch.autocast(device.type, getattr(torch, precision)):
            yield
    finally:
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before)
