"""Log-likelihood of images under the flow (section 3.4, after Lipman et al. 2023): the ODE solved backwards.

The flow carries an image at t = 0 to noise at t = 1 by dx/dt = v(x, t), and along a path the log-density falls by the
divergence of v: log p(x) = log N(x₁; 0, I) + ∫₀¹ ∇·v dt. The exact divergence takes one derivative per value of an
image. Hutchinson's estimate eᵀ(∂v/∂x)e with random signs e takes one derivative and is unbiased.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowmo.model.sampler import Velocity

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Maps (velocity, x), each b × …, to the divergence of the velocity with respect to x: b."""

DIVERGENCES = ("hutchinson", "exact")


def exact_divergence(velocity: Tensor, x: Tensor) -> Tensor:
    """Sum of ∂vᵢ/∂xᵢ over all values of an image, with one backward pass each; for tiny images only."""
    flat, total = velocity.flatten(1), torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for i in range(flat.shape[1]):
        (gradient,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)
        total += gradient.flatten(1)[:, i].double()
    return total


def hutchinson(x: Tensor, probes: int, generator: torch.Generator | None = None) -> Divergence:
    """The mean of ``probes`` estimates; their random signs are drawn once, from a CPU ``generator``."""
    signs = torch.randint(0, 2, (probes, *x.shape), generator=generator).to(x.device, x.dtype) * 2 - 1

    def estimate(velocity: Tensor, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for e in signs:
            (gradient,) = torch.autograd.grad(velocity, x, e, retain_graph=True)
            total += (gradient * e).flatten(1).double().sum(dim=1)
        return total / probes

    return estimate


def log_normal(x: Tensor) -> Tensor:
    """Log-density of x (b × …) under N(0, I), in nats: float64 b."""
    return -0.5 * (x.double().square().flatten(1).sum(dim=1) + x[0].numel() * math.log(2 * math.pi))


def log_likelihood(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    divergence: str = "hutchinson",
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-density of images under the flow, by Heun's method (second order).

    Args:
        velocity: differentiable; evaluated at ``times`` only.
        x: b × … at the first of ``times``.
        times: increasing, from (nearly) 0 to 1.
        divergence: ``hutchinson`` or ``exact``.
        probes: number of Hutchinson's estimates.
        generator: of their signs, on the CPU.

    Returns:
        Log-density in nats, float64 b; and the noise at t = 1, b × ….

    Raises:
        ValueError: an unknown divergence, times that do not increase, or no probes.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"Unknown divergence {divergence!r}. Use {' or '.join(DIVERGENCES)}.")
    if len(times) < 2 or any(late <= early for early, late in itertools.pairwise(times)):
        raise ValueError("The reverse ODE needs at least two times, which increase from 0 (image) to 1 (noise).")
    if probes < 1:
        raise ValueError(f"The number of probes must be at least 1, not {probes}.")
    measure = exact_divergence if divergence == "exact" else hutchinson(x, probes, generator)

    def slope(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = velocity(x, t)
            return v.detach(), measure(v, x).detach()

    change = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    first, first_divergence = slope(x, times[0])
    for t, t_next in itertools.pairwise(times):
        step = t_next - t
        second, second_divergence = slope(x + step * first, t_next)
        x = x + step * (first + second) / 2
        change += step * (first_divergence + second_divergence) / 2
        first, first_divergence = slope(x, t_next)
    return log_normal(x) + change, x


def bits_per_dimension(log_density: Tensor, dimensions: int) -> Tensor:
    """Convert log-densities (nats) of images in [−1, 1] to bits per dimension of 8-bit images."""
    return -log_density / (dimensions * math.log(2)) + math.log2(127.5)
