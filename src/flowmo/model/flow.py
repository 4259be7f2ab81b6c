"""Rectified flow (section 3.2): the straight path from picture to noise and what training needs to know of it.

Signs: x_t = (1 − t)·x + t·z (equation 4) and the network predicts v = dx_t/dt = z − x, so that a sample is drawn by
stepping z ← z − dt·v from t = 1 to t = 0. Equations 5 and 6 of the paper write the opposite sign; the authors' code
and checkpoints have this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

DISTRIBUTIONS = ("fat_lognormal", "lognormal", "uniform")
UNIFORM_TAIL = 0.1


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Equation 4: the noised picture x_t. x and noise: b c h w; t: b, in [0, 1]."""
    t = t[:, None, None, None]
    return (1 - t) * x + t * noise


def denoise(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """One-step estimate of the picture, x_t − t·v (equation 6). t: b."""
    return x_t - t[:, None, None, None] * velocity


def flow_loss(velocity: Tensor, target: Tensor, t: Tensor | None = None) -> Tensor:
    """Equation 5: mean squared error of the velocity against its target, z − x.

    Args:
        t: b; where given, the error is that of the one-step estimate of the picture instead, which is t times the
            velocity's. Noisy pictures, where the code has most to say, then count for more.
    """
    error = velocity - target
    return (error if t is None else t[:, None, None, None] * error).square().mean()


def random_steps(uniform: Tensor) -> Tensor:
    """Times of a chain of random steps from 1 to 0 (section 3.3): b × n uniform numbers -> b × (n + 1), descending.

    Each step's share of the way is one of the numbers over their sum.
    """
    reached = uniform.cumsum(dim=1)
    return 1 - torch.cat((torch.zeros_like(reached[:, :1]), reached), dim=1) / reached[:, -1:]


def sample_timesteps(
    count: int, distribution: str, generator: torch.Generator | None = None, anchor: float = 0.0
) -> Tensor:
    """Training timesteps in [0, 1].

    Args:
        distribution: ``fat_lognormal``, the paper's thick-tailed one: logit-normal(0, 1) with probability 0.9, else
            uniform, so that t = 1 is seen often enough (without it pictures discolour, table 4 and figure 7);
            ``lognormal`` and ``uniform`` are its two parts alone. The names are the authors'.
        anchor: share of the timesteps at exactly t = 1, where a sample starts and only the code can help: for runs
            too short to learn that end from its neighbours.

    Raises:
        ValueError: an unknown distribution.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"unknown timestep distribution {distribution!r}; use {', '.join(DISTRIBUTIONS)}")
    uniform = torch.rand(count, generator=generator)
    logit_normal = torch.randn(count, generator=generator).sigmoid()
    chance = torch.rand(count, generator=generator)
    if distribution == "uniform":
        t = uniform
    elif distribution == "lognormal":
        t = logit_normal
    else:
        t = torch.where(chance < UNIFORM_TAIL, uniform, logit_normal)
    if anchor:
        t = torch.where(torch.rand(count, generator=generator) < anchor, 1.0, t)
    return t
