"""FID and rFID: the Fréchet distance between two image sets' features, each taken as a Gaussian (Heusel et al. 2017).

It is an FID if the features are FID's Inception's, and an rFID if one set reconstructs the other. torch-fidelity takes
eigenvalues of a matrix that is not symmetric, in all dimensions. torchmetrics sums features as floats batch by batch,
so its sums depend on the batches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowmo.errors import FlowMoError
from flowmo.streams import Stream, stream


class StatisticsError(FlowMoError, ValueError):
    """The features have no statistics, or two statistics do not belong together."""


class Gaussian(NamedTuple):
    """Mean d and covariance d × d, float64, of the features of ``size`` images; infinite if unknown."""

    mean: Tensor
    covariance: Tensor
    size: float = math.inf

    @classmethod
    def of(cls, features: Tensor | Gaussian) -> Gaussian:
        """Mean and unbiased covariance of features n × d. A Gaussian stays as it is.

        Raises:
            StatisticsError: there are fewer than two images, or a feature is not finite.
        """
        if isinstance(features, Gaussian):
            return features
        if len(features) < 2:
            raise StatisticsError(f"A covariance needs at least 2 images, not {len(features)}.")
        rows = features.double()
        if not rows.isfinite().all():
            raise StatisticsError("A feature is not finite, so the features have no covariance.")
        return cls(rows.mean(dim=0), torch.atleast_2d(rows.T.cov()), len(rows))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|μ₁ − μ₂|² + Tr(C₁ + C₂ − 2·(C₁C₂)^½).

    The trace of the root comes from the eigenvalues of C₁^½·C₂·C₁^½, which is symmetric and shares them with C₁C₂.
    That is several times faster than a general matrix root and never complex. A set with fewer images than channels
    spans a subspace; the root is then taken there, which is faster and rounds less.

    Raises:
        StatisticsError: the Gaussians have different widths.
    """
    if a.mean.shape != b.mean.shape:
        widths = f"{len(a.mean)} and {len(b.mean)}"
        raise StatisticsError(f"Statistics have {widths} channels. Take both from one feature network.")
    shift = (a.mean.double() - b.mean.double()).square().sum()
    smaller, larger = (b, a) if b.size < a.size else (a, b)
    first, second = smaller.covariance.double(), larger.covariance.double()
    traces = first.trace() + second.trace()
    if smaller.size < len(first):
        # This many random vectors span the range of a matrix of lower rank.
        vectors = torch.randn(len(first), int(smaller.size), generator=stream(0, Stream.BASIS), dtype=torch.float64)
        basis = torch.linalg.qr(first @ vectors.to(first.device))[0]
        first, second = basis.T @ first @ basis, basis.T @ second @ basis
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    middle = root @ second @ root
    trace_of_root = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp(min=0).sqrt().sum()
    return float(shift + traces - 2 * trace_of_root)


def shuffled(rows: Tensor) -> Tensor:
    """Features in a random order, which their number alone fixes: equal counts stay pairs.

    Files are often sorted by class, or classes take turns. A part of them would not be a sample of the set.
    """
    return rows[torch.randperm(len(rows), generator=stream(0, Stream.SET_ORDER))]


def distance_and_bias(a: Tensor | Gaussian, b: Tensor | Gaussian) -> tuple[float, float | None]:
    """Fréchet distance of two sets, and an estimate of how much it is too large because the sets are small.

    n images add about c / n to the true distance, and n / 2 images twice as much. So the bias is the mean distance of
    the halves of both sets, minus the distance of the full sets.

    Args:
        a, b: features n × d; or a Gaussian, which has no halves and stands for itself.

    Returns:
        The bias is ``None`` without a set of features, or if one has fewer than four images.
    """
    distance = frechet_distance(Gaussian.of(a), Gaussian.of(b))
    a, b = (rows if isinstance(rows, Gaussian) else shuffled(rows) for rows in (a, b))
    counts = [len(features) for features in (a, b) if not isinstance(features, Gaussian)]
    if min(counts, default=0) < 4:
        return distance, None

    def half(features: Tensor | Gaussian, offset: int) -> Gaussian:
        return Gaussian.of(features if isinstance(features, Gaussian) else features[offset::2])

    of_halves = [frechet_distance(half(a, offset), half(b, offset)) for offset in range(2)]
    return distance, sum(of_halves) / 2 - distance
