"""Fréchet distance against SciPy's matrix root, and its statistics against NumPy's."""

import math

import numpy as np
import pytest
import torch

from flowmo.evaluate.metrics.fid import Gaussian, StatisticsError, distance_and_bias, frechet_distance, shuffled
from flowmo.evaluate.metrics.sets import KERNEL_IMAGES, kernel_distance


def random_features(count, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator) / channels**0.5
    return torch.randn(count, channels, generator=generator) @ mix + torch.rand(channels, generator=generator)


def gaussians(*sets):
    """Gaussians of unknown count, whose distance is taken in all dimensions."""
    return [Gaussian.of(features)._replace(size=math.inf) for features in sets]


def scipy_distance(ours, theirs):
    """The textbook formula with a general matrix root, as the reference implementations have it."""
    (mean, covariance, _), (mean_2, covariance_2, _) = ours, theirs
    linalg = pytest.importorskip("scipy.linalg")
    root = linalg.sqrtm((covariance @ covariance_2).numpy()).real
    shift = float((mean - mean_2).square().sum())
    return shift + float(covariance.trace() + covariance_2.trace()) - 2 * float(root.trace())


@pytest.mark.parametrize("channels", [3, 40, 120])
def test_equals_scipys_matrix_root(channels):
    pair = gaussians(*(random_features(500, channels, seed) for seed in (0, 1)))
    assert frechet_distance(*pair) == pytest.approx(scipy_distance(*pair), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_equals_scipy_where_covariances_are_nearly_singular():
    """Fewer pictures than channels, as in every quick look at an FID; SciPy gets a little noise to stand on."""
    noise = 1e-9 * torch.eye(60, dtype=torch.float64)
    pair = gaussians(*(random_features(30, 60, seed) for seed in (0, 1)))
    pair = [one._replace(covariance=one.covariance + noise) for one in pair]
    assert frechet_distance(*pair) == pytest.approx(scipy_distance(*pair), rel=1e-6)


@pytest.mark.parametrize("counts", [(30, 500), (500, 30), (30, 20), (61, 60)])
def test_of_few_pictures_it_is_taken_in_their_subspace(counts):
    sets = [random_features(count, 60, seed) for seed, count in enumerate(counts)]
    ours, theirs = (Gaussian.of(features) for features in sets)
    assert (ours.size, theirs.size) == counts
    assert frechet_distance(ours, theirs) == pytest.approx(frechet_distance(*gaussians(*sets)), rel=1e-6)


def test_distance_of_equals_is_zero():
    one = Gaussian.of(random_features(300, 20))
    assert abs(frechet_distance(one, one)) < 1e-10


def test_gaussians_of_known_distance():
    """Diagonal covariances: the distance is that of the means and of the standard deviations."""
    eye = torch.eye(4, dtype=torch.float64)
    mean = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    assert frechet_distance(Gaussian(mean, 4 * eye), Gaussian(0 * mean, 9 * eye)) == pytest.approx(1 + 4 * (2 - 3) ** 2)


def test_a_gaussian_is_numpys_mean_and_covariance():
    for channels in (1, 7):
        features = random_features(200, channels) + 1000
        one, rows = Gaussian.of(features), features.double().numpy()
        np.testing.assert_allclose(one.mean, rows.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(one.covariance, np.cov(rows, rowvar=False).reshape(channels, channels), atol=1e-9)
        assert one.size == 200


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_have_no_statistics(bad):
    features = torch.zeros(3, 2)
    features[1, 1] = bad
    with pytest.raises(StatisticsError, match="not finite"):
        Gaussian.of(features)


def test_statistics_that_do_not_belong_together():
    for count in range(2):
        with pytest.raises(StatisticsError, match="at least 2"):
            Gaussian.of(torch.zeros(count, 3))
    with pytest.raises(StatisticsError, match="one feature network"):
        frechet_distance(*(Gaussian.of(random_features(9, channels)) for channels in (3, 4)))


def test_the_bias_is_what_halves_have_too_much():
    """Two sets of one distribution: the distance is all bias, and halves have twice as much."""
    sets = [random_features(400, 6)[torch.arange(offset, 400, 2)] for offset in range(2)]
    distance, bias = distance_and_bias(*sets)
    halves = [scipy_distance(*(Gaussian.of(shuffled(rows)[offset::2]) for rows in sets)) for offset in range(2)]
    assert distance == pytest.approx(scipy_distance(*map(Gaussian.of, sets)), rel=1e-6)
    assert bias == pytest.approx(np.mean(halves) - distance, rel=1e-6)
    assert distance_and_bias(Gaussian.of(sets[0]), Gaussian.of(sets[1])) == (pytest.approx(distance), None)
    assert distance_and_bias(sets[0], sets[1][:3])[1] is None


def test_the_order_of_files_does_not_decide():
    """``flowmo generate`` lets classes take turns, and references are sorted by class. Both are one distribution."""
    count = 2 * KERNEL_IMAGES  # of which the kernel distance takes half
    generator = torch.Generator().manual_seed(3)
    classes = 3 * torch.randn(10, 6, generator=generator)
    sets = classes.repeat(count // 10, 1), classes.repeat_interleave(count // 10, 0)
    sets = [rows + torch.randn(count, 6, generator=generator) for rows in sets]
    assert abs(distance_and_bias(*sets)[1]) < 0.05
    assert abs(kernel_distance(*sets)) < 0.5
