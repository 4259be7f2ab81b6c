"""How likely a picture is under the flow (section 3.4, after Lipman et al. 2023): the ODE solved backwards.

The flow carries a picture at t = 0 to noise at t = 1 by dx/dt = v(x, t), and along a path the log-density falls by the
divergence of v: log p(x) = log N(x₁; 0, I) + ∫₀¹ ∇·v dt. The divergence is a sum of as many derivatives as a picture
has numbers; Hutchinson's estimate eᵀ(∂v/∂x)e with random signs e needs one, and is right on average.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowmo.model.sampler import Velocity

Divergence = Callable[[Tensor, Tensor], Tensor]
"""From a velocity b … and the x, b …, that it is a function of, to its divergence, b."""

DIVERGENCES = ("hutchinson", "exact")


def exact_divergence(velocity: Tensor, x: Tensor) -> Tensor:
    """Sum over all numbers of a picture of ∂vᵢ/∂xᵢ: one backward pass each, so for tiny pictures only."""
    flat, total = velocity.flatten(1), torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for i in range(flat.shape[1]):
        (gradient,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)
        total += gradient.flatten(1)[:, i].double()
    return total


def hutchinson(x: Tensor, probes: int, generator: torch.Generator | None = None) -> Divergence:
    """The mean of ``probes`` estimates, whose random signs are drawn here once: one path, one set of signs.

    Args:
        generator: on the CPU.
    """
    signs = torch.randint(0, 2, (probes, *x.shape), generator=generator).to(x.device, x.dtype) * 2 - 1

    def estimate(velocity: Tensor, at: Tensor) -> Tensor:
        total = torch.zeros(len(at), dtype=torch.float64, device=at.device)
        for e in signs:
            (gradient,) = torch.autograd.grad(velocity, at, e, retain_graph=True)
            total += (gradient * e).flatten(1).double().sum(dim=1)
        return total / probes

    return estimate


def log_normal(x: Tensor) -> Tensor:
    """Log-density of x, b …, under N(0, I), in nats: float64 b."""
    numbers = x[0].numel()
    return -0.5 * (x.double().square().flatten(1).sum(dim=1) + numbers * math.log(2 * math.pi))


def log_likelihood(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    divergence: str = "hutchinson",
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-density of pictures under the flow, by Heun's method, which is of second order.

    Args:
        velocity: differentiable; is asked at ``times`` only.
        x: b × … at the first of ``times``.
        times: increasing, from (nearly) 0 to 1.
        divergence: ``hutchinson`` or ``exact``.
        probes: of Hutchinson's estimate.
        generator: of its signs, on the CPU.

    Returns:
        Nats, float64 b; and the noise at t = 1 that x comes from, b × ….

    Raises:
        ValueError: another divergence, times that do not increase, or no probes.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}; use {' or '.join(DIVERGENCES)}")
    if len(times) < 2 or any(late <= early for early, late in itertools.pairwise(times)):
        raise ValueError("the reverse ODE needs at least two times that increase from the picture's 0 to the noise's 1")
    if probes < 1:
        raise ValueError(f"{probes} probes estimate nothing; there must be at least 1")
    measure = exact_divergence if divergence == "exact" else hutchinson(x, probes, generator)

    def slope(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            v = velocity(at, t)
            return v.detach(), measure(v, at).detach()

    change = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    first, first_divergence = slope(x, times[0])
    for t, t_next in itertools.pairwise(times):
        step = t_next - t
        second, second_divergence = slope(x + step * first, t_next)
        x = x + step * (first + second) / 2
        change += step * (first_divergence + second_divergence) / 2
        first, first_divergence = slope(x, t_next)
    return log_normal(x) + change, x


def bits_per_number(log_density: Tensor, numbers: int) -> Tensor:
    """Nats of a picture with values in [−1, 1] as bits a number of the same picture in 256 levels: less is likelier."""
    return -log_density / (numbers * math.log(2)) + math.log2(127.5)
