"""Rectified flow (section 3.2): the straight path from image to noise, its loss, and the timesteps of training.

Signs: x_t = (1 − t)·x + t·z (equation 4), and the network predicts v = dx_t/dt = z − x. So a sample steps
z ← z − dt·v from t = 1 to t = 0. Equations 5 and 6 of the paper print the opposite sign; its equations 10 and
13, the authors' code and checkpoints have this one. Losses are means over elements, as in the authors' code, where the
paper prints squared norms.
"""

import torch
from torch import Tensor

DISTRIBUTIONS = {"fat_lognormal": 0.1, "lognormal": 0.0, "uniform": 1.0}
"""Share of uniform timesteps, by name; the rest is logit-normal."""

MIN_LOSS_TIME = 0.05
"""Least t by which the velocity loss divides the error of a predicted image."""


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Equation 4: the noised image x_t. x and noise: b × c × h × w; t: b, in [0, 1]."""
    t = t[:, None, None, None]
    return (1 - t) * x + t * noise


def denoise(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Equation 6: the one-step estimate of the image, x_t − t·v. t: b."""
    return x_t - t[:, None, None, None] * velocity


def flow_loss(velocity: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Equation 5: mean squared error of the velocity against its target, z − x.

    Args:
        weight: b, factors of the errors; see ``error_weight``.
    """
    error = velocity - target
    return (error if weight is None else weight[:, None, None, None] * error).square().mean()


def error_weight(t: Tensor, loss_space: str, prediction: str) -> Tensor | None:
    """Return the factors of velocity errors at timesteps t, b, in the loss; ``None`` is the paper's, 1.

    ``loss_space`` "image" takes the error of the one-step estimate, which is t times the velocity's. It gives noisy
    images more weight, where the code matters most.

    If the decoder predicts images, the velocity's error is the image's error divided by t, which has no bound. The
    velocity loss therefore divides by at least ``MIN_LOSS_TIME`` (Li and He 2025, *Back to basics*).
    """
    if loss_space == "image":
        return t
    return t / t.clamp(min=MIN_LOSS_TIME) if prediction == "image" else None


def random_steps(uniform: Tensor) -> Tensor:
    """Times of a chain of random steps from 1 to 0 (appendix A.2): b × n uniform numbers -> b × (n + 1), descending.

    Each step's length is one of the numbers divided by their sum.
    """
    reached = uniform.cumsum(dim=1)
    return 1 - torch.cat((torch.zeros_like(reached[:, :1]), reached), dim=1) / reached[:, -1:]


def sample_timesteps(
    count: int, distribution: str, generator: torch.Generator | None = None, anchor: float = 0.0
) -> Tensor:
    """Draw training timesteps in [0, 1].

    Args:
        distribution: ``fat_lognormal`` is the paper's thick-tailed one: logit-normal(0, 1) with probability 0.9, else
            uniform. Without the tail, t = 1 is rare and images discolour (table 4, figure 7). ``lognormal`` and
            ``uniform`` are its two parts. The names are the authors'.
        anchor: share of timesteps at exactly t = 1, where a sample starts and only the code helps; for short runs.
    """
    uniform = torch.rand(count, generator=generator)
    logit_normal = torch.randn(count, generator=generator).sigmoid()
    t = torch.where(torch.rand(count, generator=generator) < DISTRIBUTIONS[distribution], uniform, logit_normal)
    if anchor:
        t = torch.where(torch.rand(count, generator=generator) < anchor, 1.0, t)
    return t
