"""The speed of a tokenizer on this machine, beside the machine's rate of matrix products."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flowmo.model.sampler import network_passes, seeded_noise
from flowmo.precision import computing
from flowmo.streams import Stream, stream
from flowmo.tokenizer import FlowMo

UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda _, q, k, v, *__, **___: 2 * sdpa_flop_count(q, k, v)
    ),
}
"""FLOPs of attention on CPUs, which PyTorch's counter does not know: two matrix products forward, four backward."""

PEAK_TFLOPS = {
    **{"GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "B200": 2250, "A100": 312},
    **{"L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "RTX 4090": 165, "RTX 3090": 71},
}
"""Dense bfloat16 TFLOP/s with float32 accumulation, from data sheets. The first name that matches counts."""


@dataclass(frozen=True)
class Timing:
    """The time of one part of the work on a batch.

    Attributes:
        part: ``encode``, ``decoder pass`` or ``decode``.
        passes: decoder passes per image.
        flops: of matrix products, counted.
        seconds: median over repeats.
        matrix_rate: FLOP/s of matrix products, the median of measurements before every repeat.
    """

    part: str
    images: int
    passes: int
    flops: float
    seconds: float
    matrix_rate: float

    @property
    def matrix_share(self) -> float:
        """Achieved share of the matrix rate."""
        return self.flops / self.seconds / self.matrix_rate

    def line(self) -> str:
        """For a terminal."""
        speed = f"{self.part:13} {self.images / self.seconds:10.2f} images/s {1e3 * self.seconds:10.1f} ms"
        return f"{speed} {self.flops / 1e9:9.1f} GFLOP  {self.matrix_share:.0%} of the matrix rate"


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, with the device's work."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def matrix_rate(device: torch.device, bfloat16: bool) -> float:
    """Measure the best FLOP/s that the device reaches in products of large square matrices."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    return 2 * side**3 / min(timed(lambda: a @ a, device) for _ in range(5))


def sheet_tflops(name: str) -> int | None:
    """Look a GPU up in ``PEAK_TFLOPS``. A laptop's GPU is not the desktop's of its name."""
    known = (tflops for part, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name))
    return None if "Laptop" in name else next(known, None)


@cache
def peak_flops(device: torch.device, bfloat16: bool) -> tuple[float, str]:
    """Return the device's peak FLOP/s and its source: the data sheet, or a measurement (CPUs, other GPUs, float32)."""
    if device.type == "cuda" and bfloat16:
        sheet = sheet_tflops(torch.cuda.get_device_name(device))
        if sheet:
            return sheet * 1e12, "data sheet"
    return matrix_rate(device, bfloat16), "measured"


@torch.no_grad()
def parts(tokenizer: FlowMo, images: int = 1) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the parts of the work as functions, on random images and codes."""
    config, device, side = tokenizer.config, tokenizer.device, tokenizer.config.data.image_size
    generator = stream(0, Stream.BENCHMARK)
    x = (torch.rand(images, config.model.channels, side, side, generator=generator) * 2 - 1).to(device)
    code = torch.randn(images, tokenizer.code_length, config.model.context_dim, generator=generator).sign().to(device)
    noise = seeded_noise(range(images), side, side, channels=config.model.channels).to(device)
    decoder = tokenizer.decoder
    embedded, t = decoder.embed_code(code), torch.ones(1, device=device)
    return {
        "encode": lambda: tokenizer.encoder(x),
        "decoder pass": lambda: decoder(noise, embedded, t),
        "decode": lambda: tokenizer.sample(noise, code),
    }


@torch.no_grad()
def count_work(tokenizer: FlowMo, images: int, bfloat16: bool) -> dict[str, tuple[int, float]]:
    """Count (passes, FLOPs) of each part; see ``Timing``. The tokenizer is not compiled yet."""
    functions, flops = parts(tokenizer, images), {}
    for part in ("encode", "decoder pass"):
        counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
        with computing("bfloat16" if bfloat16 else "float32", tokenizer.device), counter:
            functions[part]()
        flops[part] = counter.get_total_flops()
    passes = network_passes(tokenizer.config.eval.sampling)
    return {part: (1, flops[part]) for part in flops} | {"decode": (passes, passes * flops["decoder pass"])}


@torch.no_grad()
def measure(
    tokenizer: FlowMo,
    images: int = 1,
    bfloat16: bool = False,
    repeats: int = 5,
    ready: Callable[[FlowMo], object] = lambda tokenizer: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Timing]:
    """Time encoding, one decoder pass and decoding of a batch, each after a warm-up.

    Args:
        ready: compiles the tokenizer after its work is counted.
        progress: callback with (parts done, parts in total).
    """
    device = tokenizer.device
    tokenizer.chunk_size = images
    work, timings = count_work(tokenizer, images, bfloat16), []
    ready(tokenizer)
    for part, function in parts(tokenizer, images).items():
        rates, seconds = [], []
        for _ in range(1 + repeats):
            rates.append(matrix_rate(device, bfloat16))
            with computing("bfloat16" if bfloat16 else "float32", device):
                seconds.append(timed(function, device))
        duration, rate = (statistics.median(values[1:]) for values in (seconds, rates))  # without the warm-up
        passes, flops = work[part]
        timings.append(Timing(part, images, passes, flops, duration, rate))
        progress(len(timings), len(work))
    return timings
