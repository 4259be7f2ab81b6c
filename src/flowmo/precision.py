"""Precision: float32, or bfloat16 matrix products, which are several times faster on a GPU."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

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

    ``bfloat16`` and ``float16`` are autocast; on a GPU the remaining float32 products use TF32. ``float32`` forbids it.
    The choice of TF32 is the process's: threads that compute in different precisions at once change it for each other.

    Raises:
        TypeError: weights of another type, after ``.double()``.
    """
    if precision not in ("float32", "bfloat16", "float16"):
        raise TypeError(f"The weights are {precision}. Call .float(), .bfloat16() or .half() on the model.")
    context = nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))
    with tf32(precision != "float32") if device.type == "cuda" else nullcontext(), context:
        yield


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32, whose factors have 10 fraction bits, in an NVIDIA GPU's float32 products and convolutions.

    By default PyTorch allows it in convolutions only. Without such a GPU this does nothing.
    """
    if not torch.cuda.is_available():
        yield
        return
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = allowed
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
