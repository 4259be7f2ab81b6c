"""How fast a tokenizer is on this machine, beside what the machine can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flowmo.model.sampler import evaluations, network_passes, seeded_noise, shifted_times
from flowmo.streams import Stream, stream
from flowmo.tokenizer import FlowMo
from flowmo.train.cost import matrix_rate

COPIED = 256 * 2**20


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the products in one call of attention, from the shapes of its arguments."""
    return sdpa_flop_count(query, key, value)


UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
"""What PyTorch's counter does not know: attention's kernel on CPUs."""


@dataclass(frozen=True)
class Timing:
    """One part of the work on a batch.

    Attributes:
        part: ``encode``, ``decoder pass`` or ``decode``.
        passes: of the decoder, a picture.
        flops: of matrix products, counted.
        moved: bytes that must move: weights once a pass, the residual streams in and out of every block.
        seconds: median over repeats.
        matrix_rate, copy_rate: FLOPs and bytes a second; the former is measured before every repeat, its median taken.
        other_seconds: of other ways to do the same that were timed in turns with ours, by name.
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
        """Seconds below which this machine cannot come."""
        return max(self.flops / self.matrix_rate, self.moved / self.copy_rate)

    @property
    def matrix_share(self) -> float:
        """Share of the matrix rate that is reached."""
        return self.flops / self.seconds / self.matrix_rate

    def line(self) -> str:
        """For a terminal."""
        speed = f"{self.part:13} {self.pictures / self.seconds:10.2f} pictures/s {1e3 * self.seconds:10.1f} ms"
        floor = f"floor {1e3 * self.floor:.1f} ms, {self.matrix_share:.0%} of the matrix rate"
        return f"{speed} {self.flops / 1e9:9.1f} GFLOP  {floor}"


def precision(device: torch.device, bfloat16: bool) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def copy_rate(device: torch.device) -> float:
    """Bytes a second that are read and written by copying."""
    a = torch.empty(COPIED // 4, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(timed(lambda: b.copy_(a), device) for _ in range(5))


@torch.no_grad()
def parts(tokenizer: FlowMo, pictures: int = 1) -> dict[str, Callable[[], torch.Tensor]]:
    """The work by part, on pictures and codes without a meaning."""
    config, device, side = tokenizer.config, tokenizer.device, tokenizer.config.data.image_size
    generator = stream(0, Stream.BENCHMARK)
    images = (torch.rand(pictures, 3, side, side, generator=generator) * 2 - 1).to(device)
    shape = (pictures, tokenizer.code_length, config.model.context_dim)
    code = torch.randn(shape, generator=generator).sign().to(device)
    noise = seeded_noise(range(pictures), side, side).to(device)
    decoder = tokenizer.decoder
    embedded, at_t = decoder.embed_code(code), decoder.modulate(torch.ones(1, device=device))
    return {
        "encode": lambda: tokenizer.encoder(images),
        "decoder pass": lambda: decoder(noise, embedded, at_t),
        "decode": lambda: tokenizer._decode_from(noise, code, None, None),
    }


def passes_of(tokenizer: FlowMo) -> int:
    """Passes of the decoder that a picture takes by the tokenizer's own settings."""
    own = tokenizer.config.eval.sampling
    asked = evaluations(own.solver, shifted_times(own.sample_steps, own.rho))
    return network_passes(asked, own.guidance, own.guidance_low, own.guidance_high)


def moved_bytes(network: torch.nn.Module, tokens: int, item: int) -> float:
    """Of a pass: weights of ``item`` bytes once, and every block's residual streams read and written in float32."""
    weights = sum(parameter.numel() for parameter in network.parameters()) * item
    return weights + 2 * 4 * tokens * network.shape.width * len(network.blocks)


def in_turns(
    works: Sequence[Callable[[], object]], device: torch.device, bfloat16: bool, repeats: int
) -> tuple[float, list[float]]:
    """The matrix rate and the seconds of each work, medians over rounds of all of them: a machine's clock wanders."""
    rates, seconds = [], []
    for _ in range(repeats):
        rates.append(matrix_rate(device, bfloat16))
        with precision(device, bfloat16):
            seconds.append([timed(work, device) for work in works])
    return statistics.median(rates), [statistics.median(column) for column in zip(*seconds, strict=True)]


@dataclass(frozen=True)
class Work:
    """What one part asks of a machine; see ``Timing``."""

    passes: int
    flops: float
    moved: float


@torch.no_grad()
def account(tokenizer: FlowMo, pictures: int = 1, bfloat16: bool = False) -> dict[str, Work]:
    """The work by part, counted by doing it once; of a tokenizer that is neither packed nor compiled."""
    config = tokenizer.config
    tokens = pictures * ((config.data.image_size // config.model.patch_size) ** 2 + tokenizer.code_length)
    works, functions = {}, parts(tokenizer, pictures)
    for part, network in (("encode", tokenizer.encoder), ("decoder pass", tokenizer.decoder)):
        counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
        with precision(tokenizer.device, bfloat16), counter:
            functions[part]()
        works[part] = Work(1, counter.get_total_flops(), moved_bytes(network, tokens, 2 if bfloat16 else 4))
    one, passes = works["decoder pass"], passes_of(tokenizer)
    return {**works, "decode": Work(passes, passes * one.flops, passes * one.moved)}


@torch.no_grad()
def measure(
    tokenizer: FlowMo,
    pictures: int = 1,
    bfloat16: bool = False,
    repeats: Mapping[str, int] | int = 5,
    others: Mapping[str, Mapping[str, Callable[[], object]]] | None = None,
    ready: Callable[[FlowMo], object] | None = None,
) -> list[Timing]:
    """Time encoding, one decoder pass and decoding of a batch, each after a first run that does not count.

    Args:
        repeats: of each part, or of all.
        others: other ways to do each part, by name, timed in turns with ours.
        ready: packs or compiles the tokenizer, once its work has been counted.
    """
    device = tokenizer.device
    tokenizer.chunk_size = pictures
    works, copied, found = account(tokenizer, pictures, bfloat16), copy_rate(device), []
    if ready:
        ready(tokenizer)
    for part, function in parts(tokenizer, pictures).items():
        ways = {name: way[part] for name, way in (others or {}).items() if part in way}
        functions = [function, *ways.values()]
        if part != "decode" or ready:  # it is passes, and as warm after them; guidance may be compiled apart
            with precision(device, bfloat16):
                for work in functions:
                    work()
        count = repeats if isinstance(repeats, int) else repeats[part]
        rate, (ours, *theirs) = in_turns(functions, device, bfloat16, count)
        work = works[part]
        by_name = dict(zip(ways, theirs, strict=True))
        found.append(Timing(part, pictures, work.passes, work.flops, work.moved, ours, rate, copied, by_name))
    return found
