"""The reverse ODE against a flow whose densities are known in closed form, and against a real decoder."""

import math

import pytest
import torch

from flowmo.model.sampler import euler, guided_velocity
from reproduce.reverse_ode import bits_per_dimension, log_likelihood, log_normal

MEAN, DEVIATION = 0.3, torch.tensor([0.2, 0.5, 1.5])


def gaussian_velocity(x, t):
    """The flow of pictures N(m, s²): x_t is Gaussian, and E[z − x | x_t] is linear in x_t."""
    s = DEVIATION.to(x)[:, None, None]
    variance = (1 - t) ** 2 * s**2 + t**2
    return (t - (1 - t) * s**2) / variance * (x - (1 - t) * MEAN) - MEAN


def gaussian_log_density(x):
    s = DEVIATION.double()[:, None, None].expand(x.shape[1:])
    return torch.distributions.Normal(MEAN, s).log_prob(x.double()).flatten(1).sum(dim=1)


@pytest.fixture
def x():
    noise = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return MEAN + DEVIATION[:, None, None] * noise


TIMES = torch.linspace(0, 1, 201).tolist()


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_a_gaussian_has_its_density(x, divergence):
    """Its Jacobian is diagonal, for which Hutchinson's random signs are exact, too."""
    found, noise = log_likelihood(gaussian_velocity, x, TIMES, divergence)
    torch.testing.assert_close(found, gaussian_log_density(x), rtol=0, atol=5e-3)
    torch.testing.assert_close(noise, (x - MEAN) / DEVIATION[:, None, None], rtol=0, atol=5e-3)


def test_more_steps_come_closer(x):
    errors = [
        (
            log_likelihood(gaussian_velocity, x, torch.linspace(0, 1, n + 1).tolist(), "exact")[0]
            - gaussian_log_density(x)
        )
        .abs()
        .max()
        for n in (10, 20, 40)
    ]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_the_estimate_is_right_on_average():
    """A rotated scaling, whose Jacobian is not diagonal: single estimates scatter about the exact divergence."""
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 4

    def velocity(x, t):
        return x @ mix.T

    x = torch.zeros(400, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    exact, _ = log_likelihood(velocity, x[:1], [0.0, 1.0], "exact")
    assert (exact - log_normal(x[:1])).item() == pytest.approx(mix.trace().item())
    estimates, _ = log_likelihood(velocity, x, [0.0, 1.0], probes=1, generator=generator)
    assert estimates.std() > 0.05
    assert estimates.mean().item() == pytest.approx(exact.item(), abs=4 * estimates.std().item() / 20)
    many, _ = log_likelihood(velocity, x, [0.0, 1.0], probes=16, generator=generator)
    assert many.std() < 0.4 * estimates.std()


def test_a_decoders_samples_go_back_to_their_noise(tiny):
    code = torch.randn(2, 6, 8).sign()
    times = torch.linspace(0, 1, 41).tolist()
    velocity = guided_velocity(tiny.decoder, code)
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sample = euler(velocity, noise, times[::-1])
    density, found = log_likelihood(velocity, sample, times)
    assert density.isfinite().all()
    assert (found - noise).abs().mean() < 0.05 * (sample - noise).abs().mean()


def test_bits():
    """A picture spread evenly over [−1, 1] takes the eight bits of its 256 levels."""
    assert bits_per_dimension(torch.tensor([-12 * math.log(2)]), 12).item() == pytest.approx(1 + math.log2(127.5))
    assert 1 + math.log2(127.5) == pytest.approx(8, abs=0.01)


def test_what_cannot_be_solved(x):
    for words, sentence in (
        ((TIMES, "guess"), "hutchinson or exact"),
        (([1.0, 0.0],), "increase"),
        (([0.0],), "two times"),
        ((TIMES, "hutchinson", 0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            log_likelihood(gaussian_velocity, x, *words)
