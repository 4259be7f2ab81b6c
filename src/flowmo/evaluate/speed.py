"""The speed of a tokenizer on this machine, and its roofline: the least time that the machine allows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flowmo.model.sampler import evaluations, network_passes, seeded_noise, shifted_times
from flowmo.streams import Stream, stream
from flowmo.tokenizer import FlowMo

COPIED = 256 * 2**20
UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda _, q, k, v, *__, **___: 2 * sdpa_flop_count(q, k, v)
    ),
}
"""FLOPs of attention on CPUs, which PyTorch's counter does not know: two matrix products forward, four backward."""

PEAK_TFLOPS = {
    **{"H200": 989, "H100": 989, "B200": 2250, "A100": 312},
    **{"L40S": 362, "L4": 121, "A10G": 70, "RTX 4090": 165, "RTX 3090": 71},
}
"""Dense bfloat16 TFLOP/s with float32 accumulation, from data sheets. The first name that matches counts."""


@dataclass(frozen=True)
class Timing:
    """The time of one part of the work on a batch.

    Attributes:
        part: ``encode``, ``decoder pass`` or ``decode``.
        passes: decoder passes per image.
        flops: of matrix products, counted.
        moved: bytes read and written at least: weights once per pass, residual streams in and out of every block.
        seconds: median over repeats.
        matrix_rate: FLOP/s of matrix products, the median of measurements before every repeat.
        copy_rate: bytes/s.
        other_seconds: of other implementations, by name, timed in turns with ours.
    """

    part: str
    pictures: int
    passes: int
    flops: float
    moved: float
    seconds: float
    matrix_rate: float
    copy_rate: float
    other_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def floor(self) -> float:
        """The roofline: the least seconds that this machine allows."""
        return max(self.flops / self.matrix_rate, self.moved / self.copy_rate)

    @property
    def matrix_share(self) -> float:
        """Achieved share of the matrix rate."""
        return self.flops / self.seconds / self.matrix_rate

    def line(self) -> str:
        """For a terminal."""
        speed = f"{self.part:13} {self.pictures / self.seconds:10.2f} images/s {1e3 * self.seconds:10.1f} ms"
        floor = f"floor {1e3 * self.floor:.1f} ms, {self.matrix_share:.0%} of the matrix rate"
        return f"{speed} {self.flops / 1e9:9.1f} GFLOP  {floor}"


def precision(device: torch.device, bfloat16: bool) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


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


@cache
def peak_flops(device: torch.device, bfloat16: bool) -> tuple[float, str]:
    """Return the device's peak FLOP/s and its source: the data sheet, or a measurement (CPUs, other GPUs, float32)."""
    if device.type == "cuda" and bfloat16:
        name = torch.cuda.get_device_name(device)
        sheet = next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)
        if sheet:
            return sheet * 1e12, "data sheet"
    return matrix_rate(device, bfloat16), "measured"


def copy_rate(device: torch.device) -> float:
    """Bytes per second that copying reads and writes."""
    a = torch.empty(COPIED // 4, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(timed(lambda: b.copy_(a), device) for _ in range(5))


@torch.no_grad()
def parts(tokenizer: FlowMo, images: int = 1) -> dict[str, Callable[[], torch.Tensor]]:
    """The parts of the work as functions, on random images and codes."""
    config, device, side = tokenizer.config, tokenizer.device, tokenizer.config.data.image_size
    generator = stream(0, Stream.BENCHMARK)
    x = (torch.rand(images, config.model.channels, side, side, generator=generator) * 2 - 1).to(device)
    code = torch.randn(images, tokenizer.code_length, config.model.context_dim, generator=generator).sign().to(device)
    noise = seeded_noise(range(images), side, side, channels=config.model.channels).to(device)
    decoder = tokenizer.decoder
    embedded, modulation = decoder.embed_code(code), decoder.modulate(torch.ones(1, device=device))
    return {
        "encode": lambda: tokenizer.encoder(x),
        "decoder pass": lambda: decoder(noise, embedded, modulation),
        "decode": lambda: tokenizer.sample(noise, code),
    }


@torch.no_grad()
def count_work(tokenizer: FlowMo, images: int, bfloat16: bool) -> dict[str, tuple[int, float, float]]:
    """(passes, FLOPs, bytes moved) of each part; see ``Timing``. The tokenizer is not compiled yet."""
    config, sampling = tokenizer.config, tokenizer.config.eval.sampling
    tokens = images * ((config.data.image_size // config.model.patch_size) ** 2 + tokenizer.code_length)
    functions, flops, moved = parts(tokenizer, images), {}, {}
    for part, network in (("encode", tokenizer.encoder), ("decoder pass", tokenizer.decoder)):
        counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
        with precision(tokenizer.device, bfloat16), counter:
            functions[part]()
        flops[part] = counter.get_total_flops()
        weights = sum(parameter.numel() for parameter in network.parameters()) * (2 if bfloat16 else 4)
        moved[part] = weights + 2 * 4 * tokens * network.width * len(network.blocks)  # float32 in and out
    calls = evaluations(sampling.solver, shifted_times(sampling.sample_steps, sampling.rho))
    passes = network_passes(calls, sampling.guidance, sampling.guidance_low, sampling.guidance_high)
    work = {part: (1, flops[part], moved[part]) for part in flops}
    return work | {"decode": (passes, passes * flops["decoder pass"], passes * moved["decoder pass"])}


@torch.no_grad()
def measure(
    tokenizer: FlowMo,
    images: int = 1,
    bfloat16: bool = False,
    repeats: Mapping[str, int] | int = 5,
    others: Mapping[str, Mapping[str, Callable[[], object]]] | None = None,
    ready: Callable[[FlowMo], object] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Timing]:
    """Time encoding, one decoder pass and decoding of a batch, each after a warm-up.

    Args:
        repeats: number of repeats, for all parts or by part.
        others: other implementations, name -> part -> function, timed in turns with ours because clock rates drift.
        ready: compiles the tokenizer after its work is counted.
        progress: callback with (parts done, parts in total).
    """
    device = tokenizer.device
    tokenizer.chunk_size = images
    work, copied, timings = count_work(tokenizer, images, bfloat16), copy_rate(device), []
    if ready:
        ready(tokenizer)
    for part, function in parts(tokenizer, images).items():
        functions: dict[str, Any] = {name: other[part] for name, other in (others or {}).items() if part in other}
        functions = {"": function, **functions}
        if part != "decode" or ready:  # the decoder pass has warmed it up, unless guidance is compiled apart
            with precision(device, bfloat16):
                for call in functions.values():
                    call()
        rates, seconds = [], []
        for _ in range(repeats if isinstance(repeats, int) else repeats[part]):
            rates.append(matrix_rate(device, bfloat16))
            with precision(device, bfloat16):
                seconds.append([timed(call, device) for call in functions.values()])
        medians = dict(zip(functions, map(statistics.median, zip(*seconds, strict=True)), strict=True))
        ours = medians.pop("")
        passes, flops, moved = work[part]
        rate = statistics.median(rates)
        timings.append(Timing(part, images, passes, flops, moved, ours, rate, copied, medians))
        progress(len(timings), len(work))
    return timings
