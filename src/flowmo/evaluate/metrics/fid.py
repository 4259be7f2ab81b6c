"""FID and rFID: the Fréchet distance between two image sets' features, each taken as a Gaussian (Heusel et al. 2017).

It is an FID if the features are FID's Inception's, and an rFID if one set reconstructs the other. torch-fidelity keeps
all features in memory and torchmetrics sums them as floats. Here they are rounded to multiples of 2^-16, which moves a
distance less than 8-bit images do, and summed as integers. So neither batches, nor order, nor ranks change the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flowmo.distributed import World
from flowmo.errors import FlowMoError
from flowmo.streams import Stream, stream

RESOLUTION = 2.0**-16
EXACT = 2.0**53
"""float64 holds every integer below this exactly."""
LARGEST_SUM = 2.0**62
"""Half the largest int64."""


class StatisticsError(FlowMoError, ValueError):
    """The features have no statistics, or two statistics do not belong together."""


class Gaussian(NamedTuple):
    """Mean d and covariance d × d, float64, of the features of ``size`` images; infinite if unknown."""

    mean: Tensor
    covariance: Tensor
    size: float = math.inf


@dataclass
class Moments:
    """Count, sum and sum of outer products of features, in integer multiples of ``RESOLUTION`` and its square.

    Attributes:
        total: int64 d.
        products: int64 d × d.
    """

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def empty(cls, channels: int) -> Moments:
        return cls(0, torch.zeros(channels, dtype=torch.int64), torch.zeros(channels, channels, dtype=torch.int64))

    def add(self, features: Tensor) -> None:
        """Add features n × d.

        Raises:
            StatisticsError: the width is wrong, or features are infinite, NaN, or too large for exact sums.
        """
        if features.ndim != 2 or features.shape[1] != len(self.total):
            raise StatisticsError(f"Features are {tuple(features.shape)}, not n × {len(self.total)}.")
        rounded = (features.detach().double().cpu() / RESOLUTION).round()
        largest = float(rounded.abs().max()) if len(rounded) else 0.0
        if not largest**2 < EXACT:  # NaN and infinities too
            raise StatisticsError(f"A feature of {largest * RESOLUTION:g} is not finite or too large.")
        squares = self.products.diagonal().double() + rounded.square().sum(dim=0)
        if float(squares.max()) >= LARGEST_SUM:  # no other sum of products is larger (Cauchy-Schwarz)
            raise StatisticsError(f"{self.count + len(features)} features as large as these have no exact sum.")
        rows = max(int(EXACT / max(largest**2, 1.0)) - 1, 1)  # keeps the float64 product of a chunk exact
        for chunk in rounded.split(rows):
            self.products += (chunk.T @ chunk).long()
        self.total += rounded.long().sum(dim=0)
        self.count += len(features)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together. Raises ``StatisticsError`` if their widths differ."""
        if len(self.total) != len(other.total):
            raise StatisticsError(f"Features of {len(self.total)} and {len(other.total)} channels do not merge.")
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    def gather(self, world: World) -> Moments:
        """Moments of all ranks together, on every rank."""
        return Moments(int(world.sum(torch.tensor(self.count))), world.sum(self.total), world.sum(self.products))

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance. Raises ``StatisticsError`` for fewer than two features."""
        n = self.count
        if n < 2:
            raise StatisticsError(f"A covariance needs at least 2 features, not {n}.")
        mean = self.total.double() * (RESOLUTION / n)
        second = self.products.double() * (RESOLUTION**2 / n)
        return Gaussian(mean, (second - torch.outer(mean, mean)) * (n / (n - 1)), n)

    def state(self) -> dict[str, Tensor]:
        """As plain tensors, for a file."""
        return {"count": torch.tensor(self.count), "total": self.total, "products": self.products}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Moments:
        return cls(int(state["count"]), state["total"], state["products"])


def frechet_distance(ours: Gaussian, theirs: Gaussian) -> float:
    """|μ₁ − μ₂|² + Tr(C₁ + C₂ − 2·(C₁C₂)^½).

    The trace of the root comes from the eigenvalues of C₁^½·C₂·C₁^½, which is symmetric and has those of C₁C₂. That is
    several times faster than a general matrix root and never complex. A set with fewer images than channels spans a
    subspace; the root is then taken there, which is faster and rounds less.

    Raises:
        StatisticsError: the Gaussians have different widths.
    """
    if ours.mean.shape != theirs.mean.shape:
        widths = f"{len(ours.mean)} and {len(theirs.mean)}"
        raise StatisticsError(f"Statistics have {widths} channels. Take both from one feature network.")
    shift = (ours.mean.double() - theirs.mean.double()).square().sum()
    smaller, larger = (theirs, ours) if theirs.size < ours.size else (ours, theirs)
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


def finite_sample_bias(distance: float, halves: Iterable[tuple[Gaussian, Gaussian]]) -> float:
    """Estimate how much a Fréchet distance is too large because the sets are small.

    n images add about c / n to the true distance, and n / 2 images twice as much. So the bias is the mean distance of
    the halves of both sets, minus ``distance``, that of the full sets.
    """
    distances = [frechet_distance(*pair) for pair in halves]
    return sum(distances) / len(distances) - distance
