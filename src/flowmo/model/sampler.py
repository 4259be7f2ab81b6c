"""Sampling (section 3.4): ODE solvers as plain functions over a velocity, and the guided velocity of a decoder.

A velocity is any function ``velocity(x, t)`` of pictures b × 3 × h × w and one timestep t in [0, 1]; a solver carries
noise at t = 1 to a picture at t = 0. Noise comes from explicit seeds, one a picture, and is drawn on the CPU, so that
a picture depends on its code and its seed alone: not on its batch, its place in it, or the device.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from flowmo.errors import FlowMoError
from flowmo.model.transformer import Conditioning, Decoder, select_timestep
from flowmo.model.windowed import WindowedDecoder
from flowmo.streams import Stream, stream_seed


class NotFiniteError(FlowMoError, ValueError):
    """A sample that left what numbers can hold: extreme guidance, or weights that are no tokenizer's."""


Velocity = Callable[[Tensor, float], Tensor]


def shifted_times(steps: int, rho: float) -> list[float]:
    """Equation 14: (i/n)^ρ for i = n … 1, then 0. ρ = 1 is linear; the paper uses n = 25, ρ = 4.

    Raises:
        ValueError: fewer than one step, or ρ not above 0.
    """
    if steps < 1 or not 0 < rho < math.inf:
        raise ValueError(f"sampling needs at least 1 step and rho > 0, not {steps} steps and rho = {rho}")
    return [(i / steps) ** rho for i in range(steps, -1, -1)]


def euler(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Explicit Euler along decreasing ``times``: first order, one velocity a step."""
    x = noise
    for t, t_next in itertools.pairwise(times):
        x = x - (t - t_next) * velocity(x, t)
    return x


def midpoint(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Second order, two velocities a step: the second, halfway, is the one that is followed."""
    x = noise
    for t, t_next in itertools.pairwise(times):
        half = (t + t_next) / 2
        x = x - (t - t_next) * velocity(x - (t - half) * velocity(x, t), half)
    return x


def heun(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Second order, two velocities a step, the mean of which is followed; the step to 0 is Euler's, as EDM's."""
    x = noise
    for t, t_next in itertools.pairwise(times):
        first = velocity(x, t)
        there = x - (t - t_next) * first
        x = there if t_next == 0 else x - (t - t_next) * (first + velocity(there, t_next)) / 2
    return x


def multistep(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Second order with one velocity a step: Adams–Bashforth, which extrapolates from the step before."""
    x, before, length_before = noise, None, 0.0
    for t, t_next in itertools.pairwise(times):
        v, length = velocity(x, t), t - t_next
        followed = v if before is None else v + length / (2 * length_before) * (v - before)
        x, before, length_before = x - length * followed, v, length
    return x


SOLVERS = {"euler": euler, "midpoint": midpoint, "heun": heun, "multistep": multistep}


def evaluations(solver: str, times: Sequence[float]) -> list[float]:
    """Timesteps at which a solver asks for a velocity, in order.

    Raises:
        ValueError: no such solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; use {', '.join(SOLVERS)}")
    asked: list[float] = []

    def straight(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return x

    SOLVERS[solver](straight, torch.zeros(()), times)
    return asked


def conditioning(
    decoder: Decoder | WindowedDecoder, times: Sequence[float], ends: Sequence[float] | None = None
) -> Conditioning:
    """What the decoder needs of all ``times`` of a run, and of the ``ends`` of their steps: the same for every code."""
    as_tensor = partial(torch.tensor, dtype=torch.float32, device=next(decoder.parameters()).device)
    return decoder.modulate(as_tensor(times), None if ends is None else as_tensor(ends))


def guided_velocity(
    decoder: Decoder | WindowedDecoder,
    code: Tensor,
    times: Sequence[float],
    guidance: float = 1.0,
    low: float = 0.0,
    high: float = 1.0,
    at_times: Conditioning | None = None,
) -> Velocity:
    """The decoder's velocity for ``code``, with classifier-free guidance where low ≤ t ≤ high.

    What does not depend on x is computed here, once for the whole run: the embedded code and the modulations of all
    ``times`` at which the solver asks. Where guidance applies, code and null code go through the decoder as one batch.

    Args:
        code: b × tokens × channels.
        guidance: velocity = null + guidance · (conditional − null); 1 needs no null pass.
        at_times: of ``conditioning``, where it is at hand; a decoder of mean velocities needs it, with its ends.

    Raises:
        ValueError: guidance is not finite.
    """
    if not math.isfinite(guidance):
        raise ValueError(f"guidance {guidance} is not a finite number")
    modulations = conditioning(decoder, times) if at_times is None else at_times
    index = {t: i for i, t in enumerate(times)}
    embedded = decoder.embed_code(code)
    if guidance != 1.0:
        null = decoder.embed_code(code, keep=torch.zeros(len(code), dtype=torch.bool, device=code.device))
        both = torch.cat((embedded, null))

    def velocity(x: Tensor, t: float) -> Tensor:
        at_t = select_timestep(modulations, index[t])
        if guidance == 1.0 or not low <= t <= high:
            return decoder(x, embedded, at_t)
        conditional, unconditional = decoder(torch.cat((x, x)), both, at_t).chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return velocity


def network_passes(times: Sequence[float], guidance: float, low: float, high: float) -> int:
    """Passes of the decoder a picture for velocities at ``times``: two where guidance applies.

    The paper's setting, 25 Euler steps, makes 31.
    """
    return len(times) + sum(low <= t <= high for t in times) * (guidance != 1.0)


def seeded_noise(seeds: Sequence[int], height: int, width: int, scale: float = 1.0) -> Tensor:
    """Standard normal noise, one picture a seed: float32 len(seeds) × 3 × height × width on the CPU.

    Raises:
        TypeError, ValueError: a seed that is not a whole number, or not from 0 to 2^63 − 1.
    """
    seeds = [operator.index(seed) for seed in seeds]
    wrong = next((seed for seed in seeds if not 0 <= seed < 2**63), None)
    if wrong is not None:
        raise ValueError(f"seed {wrong} is not from 0 to 2^63 − 1")
    noise = torch.empty(len(seeds), 3, height, width)
    for picture, seed in zip(noise, seeds, strict=True):
        picture.normal_(generator=torch.Generator().manual_seed(seed))
    return noise * scale if scale != 1.0 else noise


def image_seed(seed: int, index: int) -> int:
    """Seed of one picture's sample, from the seed of the set and the picture's index in it."""
    return stream_seed(seed, Stream.SAMPLE, index)
