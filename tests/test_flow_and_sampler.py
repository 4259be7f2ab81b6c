import math

import pytest
import torch

from flowmo.config import SOLVERS as SOLVER_NAMES
from flowmo.config import SamplingConfig
from flowmo.model import flow
from flowmo.model.sampler import (
    SOLVERS,
    euler,
    guided_velocity,
    image_seed,
    network_passes,
    seeded_noise,
    shifted_times,
)
from flowmo.model.transformer import velocity_from


def test_path_and_estimate_are_inverse():
    x, noise, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0.0, 0.3, 0.7, 1.0])
    x_t = flow.interpolate(x, noise, t)
    assert torch.equal(x_t[0], x[0])
    assert torch.equal(x_t[3], noise[3])
    torch.testing.assert_close(flow.denoise(x_t, noise - x, t), x)
    assert flow.flow_loss(noise - x, noise - x) == 0


def test_loss_of_the_picture_is_that_of_the_one_step_estimate():
    x, noise, t, velocity = torch.randn(3, 3, 2, 2), torch.randn(3, 3, 2, 2), torch.rand(3), torch.randn(3, 3, 2, 2)
    estimate = flow.denoise(flow.interpolate(x, noise, t), velocity, t)
    torch.testing.assert_close(flow.flow_loss(velocity, noise - x, t), (estimate - x).square().mean())


@pytest.mark.parametrize("t", [1e-4, 0.003, 0.05, 0.3, 1.0])
def test_loss_of_a_predicted_image(t):
    """By hand: an image that is off by 0.01 has the loss (0.01 / t)², below t = 0.05 (0.01 / 0.05)²."""
    x, noise, times = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.full((2,), t)
    x_t = flow.interpolate(x, noise, times)
    for error in (0.0, 0.01):
        velocity = velocity_from(x + error, x_t, times, "image")
        for space, expected in {"velocity": (error / max(t, 0.05)) ** 2, "image": error**2}.items():
            loss = flow.flow_loss(velocity, noise - x, flow.error_weight(times, space, "image"))
            assert loss.item() == pytest.approx(expected, rel=2e-3, abs=1e-9), (space, error)
    assert flow.error_weight(times, "velocity", "velocity") is None


@pytest.mark.parametrize("space", ["velocity", "image"])
def test_loss_of_a_predicted_image_is_finite_at_the_image(space):
    out, x = torch.zeros(1, 3, 4, 4, requires_grad=True), torch.ones(1, 3, 4, 4)
    velocity = velocity_from(out, x, torch.zeros(1), "image")
    loss = flow.flow_loss(velocity, torch.randn_like(x) - x, flow.error_weight(torch.zeros(1), space, "image"))
    loss.backward()
    assert loss.isfinite()
    assert out.grad.isfinite().all()


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("rho", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 8, 25])
def test_a_sample_ends_at_the_predicted_image(solver, rho, steps):
    """Whatever the last steps, none of the noise is left."""
    image, noise = torch.rand(1, 3, 4, 4), torch.randn(1, 3, 4, 4)

    def velocity(x, t):
        return velocity_from(image, x, torch.full((1,), t), "image")

    sample = SOLVERS[solver](velocity, noise, shifted_times(steps, rho))
    torch.testing.assert_close(sample, image, rtol=0, atol=2e-6)


def test_random_steps_lead_from_noise_to_picture():
    times = flow.random_steps(torch.rand(50, 8, generator=torch.Generator().manual_seed(0)))
    assert times.shape == (50, 9)
    assert torch.equal(times[:, 0], torch.ones(50))
    assert torch.allclose(times[:, -1], torch.zeros(50), atol=1e-6)
    steps = -times.diff(dim=1)
    assert (steps > 0).all()
    assert steps.std() > 0.02  # every picture has steps of its own
    torch.testing.assert_close(flow.random_steps(torch.ones(1, 4)), torch.tensor([[1, 0.75, 0.5, 0.25, 0]]))


def cdf_distance(sample, cdf):
    """Kolmogorov-Smirnov statistic."""
    ordered = sample.sort().values.double()
    return (cdf(ordered) - (torch.arange(len(ordered)) + 0.5) / len(ordered)).abs().max().item()


def logit_normal_cdf(t):
    return 0.5 * (1 + torch.erf(torch.logit(t.clamp(1e-9, 1 - 1e-9)) / math.sqrt(2)))


CDFS = {
    "uniform": lambda t: t,
    "lognormal": logit_normal_cdf,
    "fat_lognormal": lambda t: 0.9 * logit_normal_cdf(t) + 0.1 * t,
}


@pytest.mark.parametrize("name", CDFS)
def test_timestep_distributions(name):
    t = flow.sample_timesteps(100_000, name, torch.Generator().manual_seed(0))
    limit = 1.95 / math.sqrt(len(t))  # exceeded by chance in one of 1000 seeds
    assert cdf_distance(t, CDFS[name]) < limit
    assert all(cdf_distance(t, other) > limit for key, other in CDFS.items() if key != name)


def test_anchored_share_lies_at_one():
    t = flow.sample_timesteps(100_000, "uniform", torch.Generator().manual_seed(0), anchor=0.2)
    at_one = t == 1
    assert at_one.float().mean().item() == pytest.approx(0.2, abs=0.005)
    assert cdf_distance(t[~at_one], CDFS["uniform"]) < 1.95 / math.sqrt(80_000)


def test_times():
    times = shifted_times(25, 4)
    assert (times[0], times[-1], len(times)) == (1.0, 0.0, 26)
    assert times[5] == (20 / 25) ** 4
    assert shifted_times(4, 1) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_papers_sampler_takes_31_passes():
    assert network_passes(SamplingConfig()) == 31
    assert network_passes(SamplingConfig(guidance=1.0)) == 25


def test_euler_is_exact_on_a_straight_path_and_first_order_on_a_curved_one():
    noise, x = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(euler(lambda _, t: noise - x, noise, shifted_times(7, 4)), x)
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = [
        abs(euler(lambda z, t: z, start, shifted_times(n, 1)).item() - math.exp(-1)) for n in (50, 100, 200)
    ]  # dz/dt = z from t = 1 to 0 gives 1/e
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("multistep", 2)])
def test_order_of_the_solvers(solver, order):
    """On dx/dt = x·cos(2t) the error falls with the order, between times that are not evenly spaced too."""
    start = torch.ones((), dtype=torch.float64)
    exact = math.exp(-math.sin(2) / 2)

    def error(steps):
        times = shifted_times(steps, 1.5)
        return abs(SOLVERS[solver](lambda x, t: x * math.cos(2 * t), start, times).item() - exact)

    for coarse, fine in ((40, 80), (80, 160)):
        assert error(coarse) / error(fine) == pytest.approx(2**order, rel=0.2)
    straight = SOLVERS[solver](lambda x, t: torch.tensor(3.0), torch.tensor(5.0), shifted_times(7, 4))
    assert straight == pytest.approx(2.0, abs=1e-6)


def test_what_the_solvers_ask_for():
    expected = {
        "euler": [1.0, 0.75, 0.5, 0.25],
        "midpoint": [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
        "heun": [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25],
        "multistep": [1.0, 0.75, 0.5, 0.25],
    }
    assert SOLVERS.keys() == set(SOLVER_NAMES)
    for name, solve in SOLVERS.items():
        asked = []
        solve(lambda x, t, asked=asked: asked.append(t) or x, torch.zeros(()), shifted_times(4, 1))
        assert asked == expected[name], name
        assert network_passes(SamplingConfig(solver=name, sample_steps=4, rho=1, guidance=1.0)) == len(asked)


@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_every_solver_decodes(tiny, images, solver):
    codes = tiny.encode(images[:2])
    out = tiny.decode(codes, steps=3, solver=solver)
    assert out.shape == images[:2].shape
    assert torch.isfinite(out).all()
    assert torch.equal(out, tiny.decode(codes, steps=3)) == (solver == "euler")


def test_guidance_acts_only_in_its_interval_and_extrapolates(tiny, images):
    code = tiny.quantizer.quantize(tiny.encoder(images))[0]
    plain = guided_velocity(tiny.decoder, code)
    guided = guided_velocity(tiny.decoder, code, 2.0, low=0.5, high=0.5)
    assert torch.equal(guided(images, 0.75), plain(images, 0.75))
    null = tiny.decoder(
        images,
        tiny.decoder.embed_code(code, torch.zeros(5, dtype=torch.bool)),
        torch.tensor([0.5]),
    )
    expected = null + 2 * (plain(images, 0.5) - null)
    torch.testing.assert_close(guided(images, 0.5), expected, atol=1e-4, rtol=1e-4)
    assert (guided(images, 0.5) - plain(images, 0.5)).abs().max() > 1e-3


def test_noise_is_normal_and_belongs_to_its_seed():
    noise = seeded_noise([3, 4], 64, 64)
    assert torch.equal(noise[1:], seeded_noise([4], 64, 64))
    assert noise.mean().abs() < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert (noise[0] - noise[1]).abs().max() > 1
    torch.testing.assert_close(seeded_noise([3], 8, 8, scale=0.5), 0.5 * seeded_noise([3], 8, 8))


def test_picture_seeds_differ():
    assert len({image_seed(s, i) for s in range(30) for i in range(30)}) == 900
    assert all(0 <= image_seed(0, i) < 2**63 for i in range(100))
