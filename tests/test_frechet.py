"""Fréchet distance against SciPy's matrix root, and statistics that merge to the last bit."""

import math

import pytest
import torch

from flowmo.evaluate.metrics.fid import Gaussian, Moments, StatisticsError, frechet_distance


def random_features(count, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator) / channels**0.5
    return torch.randn(count, channels, generator=generator) @ mix + torch.rand(channels, generator=generator)


def moments(features, batch=10**9):
    result = Moments.empty(features.shape[1])
    for part in features.split(batch):
        result.add(part)
    return result


def gaussians(*sets):
    """Gaussians of unknown count, whose distance is taken in all dimensions."""
    return [moments(features).gaussian()._replace(size=math.inf) for features in sets]


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
    ours, theirs = (moments(features).gaussian() for features in sets)
    assert (ours.size, theirs.size) == counts
    assert frechet_distance(ours, theirs) == pytest.approx(frechet_distance(*gaussians(*sets)), rel=1e-6)


def test_distance_of_equals_is_zero():
    one = moments(random_features(300, 20)).gaussian()
    assert abs(frechet_distance(one, one)) < 1e-10


def test_gaussians_of_known_distance():
    """Diagonal covariances: the distance is that of the means and of the standard deviations."""
    eye = torch.eye(4, dtype=torch.float64)
    mean = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    assert frechet_distance(Gaussian(mean, 4 * eye), Gaussian(0 * mean, 9 * eye)) == pytest.approx(1 + 4 * (2 - 3) ** 2)


def test_moments_are_those_of_the_features():
    features = random_features(200, 7)
    one = moments(features).gaussian()
    torch.testing.assert_close(one.mean, features.double().mean(dim=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(one.covariance, torch.cov(features.double().T), rtol=0, atol=1e-4)


def test_any_batches_in_any_order_give_the_same_bits():
    features = random_features(300, 11) * 20
    whole = moments(features)
    shuffled = features[torch.randperm(300, generator=torch.Generator().manual_seed(3))]
    parts = [moments(part, batch=7) for part in shuffled.split(90)]
    merged = parts[2].merge(parts[0]).merge(parts[3].merge(parts[1]))
    assert merged.count == whole.count
    assert torch.equal(merged.total, whole.total)
    assert torch.equal(merged.products, whole.products)
    again = Moments.from_state(whole.state())
    assert torch.equal(again.gaussian().covariance, merged.gaussian().covariance)


def test_large_features_stay_exact():
    features = torch.full((50, 2), 1000.5)
    features[::2] = -1000.5
    one = moments(features).gaussian()
    assert torch.equal(one.mean, torch.zeros(2, dtype=torch.float64))
    assert one.covariance[0, 1] == pytest.approx(1000.5**2 * 50 / 49, rel=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e9])
def test_features_that_have_no_statistics(bad):
    features = torch.zeros(3, 2)
    features[1, 1] = bad
    with pytest.raises(StatisticsError, match="not finite or too large"):
        Moments.empty(2).add(features)


def test_sums_that_would_wrap_around_are_refused():
    one, large = Moments.empty(1), torch.full((1000, 1), 1000.0)
    one.add(large)
    with pytest.raises(StatisticsError, match="no exact sum"):
        one.add(large)
    assert one.count == 1000
    assert one.gaussian().mean.item() == 1000


def test_statistics_that_do_not_belong_together():
    with pytest.raises(StatisticsError, match="not n × 3"):
        Moments.empty(3).add(torch.zeros(2, 4))
    with pytest.raises(StatisticsError, match="do not merge"):
        Moments.empty(3).merge(Moments.empty(4))
    with pytest.raises(StatisticsError, match="at least 2"):
        moments(torch.zeros(1, 3)).gaussian()
    with pytest.raises(StatisticsError, match="at least 2"):
        Moments.empty(3).gaussian()
    with pytest.raises(StatisticsError, match="one feature network"):
        frechet_distance(*(moments(random_features(9, channels)).gaussian() for channels in (3, 4)))
