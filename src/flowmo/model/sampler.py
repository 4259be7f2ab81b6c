"""Sampling (section 3.4): ODE solvers as plain functions over a velocity, and the guided velocity of a decoder.

A velocity is any function ``velocity(x, t)`` of images b × c × h × w and one timestep t in [0, 1]. A solver carries
noise at t = 1 to an image at t = 0. Each image has its own seed and its noise is drawn on the CPU, so a sample depends
on its code and its seed, not on its batch or its index there; on the device only by rounding.
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowmo.config.sections import SamplingConfig
from flowmo.errors import FlowMoError
from flowmo.model.transformer import Decoder
from flowmo.model.windowed import WindowedDecoder
from flowmo.streams import Stream, stream_seed


class NotFiniteError(FlowMoError, ValueError):
    """A sample with NaN or infinite values, from extreme guidance or broken weights."""


Velocity = Callable[[Tensor, float], Tensor]


def shifted_times(steps: int, rho: float) -> list[float]:
    """Equation 14: (i/n)^ρ for i = n … 1, then 0. ρ = 1 is linear; the paper uses n = 25, ρ = 4."""
    return [(i / steps) ** rho for i in range(steps, -1, -1)]


def euler(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Explicit Euler along decreasing ``times``: first order, one velocity per step."""
    x = noise
    for t, t_next in itertools.pairwise(times):
        x = x - (t - t_next) * velocity(x, t)
    return x


def midpoint(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Second order, two velocities per step. It follows the velocity at the middle of the step."""
    x = noise
    for t, t_next in itertools.pairwise(times):
        half = (t + t_next) / 2
        x = x - (t - t_next) * velocity(x - (t - half) * velocity(x, t), half)
    return x


def heun(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Second order, two velocities per step. It follows their mean; the step to 0 is Euler's, as in EDM.

    Where the decoder predicts images, a step from t to a much smaller t' multiplies the difference of two predictions
    by (t / t' − 1) / 2. So ρ = 4 costs it more PSNR than other solvers.
    """
    x = noise
    for t, t_next in itertools.pairwise(times):
        first = velocity(x, t)
        x_next = x - (t - t_next) * first
        x = x_next if t_next == 0 else x - (t - t_next) * (first + velocity(x_next, t_next)) / 2
    return x


def multistep(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Second order, one velocity per step: Adams–Bashforth, which extrapolates from the previous step."""
    x, previous, previous_step = noise, None, 0.0
    for t, t_next in itertools.pairwise(times):
        v, step = velocity(x, t), t - t_next
        extrapolated = v if previous is None else v + step / (2 * previous_step) * (v - previous)
        x, previous, previous_step = x - step * extrapolated, v, step
    return x


SOLVERS = {"euler": euler, "midpoint": midpoint, "heun": heun, "multistep": multistep}


def guided_velocity(
    decoder: Decoder | WindowedDecoder, code: Tensor, guidance: float = 1.0, low: float = 0.0, high: float = 1.0
) -> Velocity:
    """Return the decoder's velocity for ``code``, b × tokens × channels, with guidance where low ≤ t ≤ high.

    Classifier-free guidance: null + guidance · (conditional − null); 1 needs no null pass. Where it applies, code and
    null code go through the decoder as one batch.
    """
    embedded = decoder.embed_code(code)
    null = decoder.embed_code(code, keep=torch.zeros(len(code), dtype=torch.bool, device=code.device))

    def velocity(x: Tensor, t: float) -> Tensor:
        timestep = torch.full((1,), t, device=code.device)
        if not is_guided(t, guidance, low, high):
            return decoder(x, embedded, timestep)
        conditional, unconditional = decoder(torch.cat((x, x)), torch.cat((embedded, null)), timestep).chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return velocity


def follow_mean_velocity(decoder: Decoder, code: Tensor, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Sample from a decoder of mean velocities (stage 1C). An Euler step by the mean velocity has no solver error."""
    embedded, x = decoder.embed_code(code), noise
    for t, end in itertools.pairwise(times):
        start_and_end = (torch.full((1,), time, device=code.device) for time in (t, end))
        x = x - (t - end) * decoder(x, embedded, *start_and_end)
    return x


def is_guided(t: float, guidance: float, low: float, high: float) -> bool:
    return guidance != 1.0 and low <= t <= high


def network_passes(s: SamplingConfig) -> int:
    """Decoder passes per image: two per velocity where guidance applies, one elsewhere. The paper's setting has 31."""
    times: list[float] = []

    def record(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return x

    SOLVERS[s.solver](record, torch.zeros(()), shifted_times(s.sample_steps, s.rho))
    return len(times) + sum(is_guided(t, s.guidance, s.guidance_low, s.guidance_high) for t in times)


def seeded_noise(seeds: Sequence[int], height: int, width: int, scale: float = 1.0, channels: int = 3) -> Tensor:
    """Standard normal noise, one image per seed: float32 len(seeds) × channels × height × width on the CPU.

    PyTorch's CPU generator reads the lowest 32 bits of a seed.

    Raises:
        TypeError, ValueError: a seed that is not a whole number from 0 to 2^63 − 1; a negative or infinite scale.
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"noise_scale {scale} must be finite and at least 0.")
    noise = torch.empty(len(seeds), channels, height, width, dtype=torch.float32, device="cpu")
    for image, seed in zip(noise, map(operator.index, seeds), strict=True):
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} is not from 0 to 2^63 − 1.")
        image.normal_(generator=torch.Generator().manual_seed(seed))
    return noise * scale


def image_seed(seed: int, index: int) -> int:
    """Seed of image ``index``'s sample in a dataset sampled with ``seed``."""
    return stream_seed(seed, Stream.SAMPLE, index)
