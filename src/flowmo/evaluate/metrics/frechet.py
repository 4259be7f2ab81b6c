"""Fréchet distance between sets of pictures, from mergeable statistics of a network's features.

The statistics are sums of integers, and so the same to the last bit whatever the batches, their order, or the number
of processes they came from: features are rounded to multiples of 2^-16 first, which moves a distance by less than the
pictures' own rounding to 8 bits does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmo.distributed import World
from flowmo.errors import FlowMoError
from flowmo.streams import Stream, stream

RESOLUTION = 2.0**-16
EXACT = 2.0**53
"""Whole numbers below this are exact in float64, and so are their sums and products while they stay below it."""


class StatisticsError(FlowMoError, ValueError):
    """Features that no statistics can be taken of, or statistics that do not belong together."""


LARGEST_SUM = 2.0**62
"""Kept clear of where int64 would wrap around."""


@dataclass
class Moments:
    """Count, sum and sum of outer products of features, in whole multiples of ``RESOLUTION`` and its square.

    Attributes:
        count: number of feature vectors.
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
        """Take in features n × d.

        Raises:
            StatisticsError: of another width, not finite, or too large, alone or together, for exact sums.
        """
        if features.ndim != 2 or features.shape[1] != len(self.total):
            raise StatisticsError(f"features are {tuple(features.shape)}, not n × {len(self.total)}")
        whole = (features.detach().double().cpu() / RESOLUTION).round()
        largest = float(whole.abs().max()) if len(whole) else 0.0
        if not largest**2 < EXACT:  # NaN and infinities too
            raise StatisticsError(f"a feature of {largest * RESOLUTION:g} is not finite or too large")
        # So few rows at a time that even their largest possible sum of products is exact.
        rows = max(int(EXACT / max(largest**2, 1.0)) - 1, 1)
        squares = self.products.diagonal().double() + whole.square().sum(dim=0)
        if float(squares.max()) >= LARGEST_SUM:  # no other sum of products is larger (Cauchy and Schwarz)
            raise StatisticsError(f"{self.count + len(features)} features as large as these have no exact sum")
        for chunk in whole.split(rows):
            self.products += (chunk.T @ chunk).long()
        self.total += whole.long().sum(dim=0)
        self.count += len(features)

    def merge(self, other: Moments) -> Moments:
        """Statistics of both sets together.

        Raises:
            StatisticsError: their features have different widths.
        """
        if len(self.total) != len(other.total):
            raise StatisticsError(f"features of {len(self.total)} and of {len(other.total)} channels do not merge")
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    def gather(self, world: World) -> Moments:
        """Statistics of the features of all processes, in each of them."""
        return Moments(int(world.sum(torch.tensor(self.count))), world.sum(self.total), world.sum(self.products))

    def mean(self) -> Tensor:
        """float64 d. Raises ``StatisticsError`` where there are no features."""
        if not self.count:
            raise StatisticsError("no features yet")
        return self.total.double() * (RESOLUTION / self.count)

    def covariance(self) -> Tensor:
        """Unbiased, float64 d × d. Raises ``StatisticsError`` for fewer than two features."""
        if self.count < 2:
            raise StatisticsError(f"a covariance needs at least 2 features, not {self.count}")
        mean = self.mean()
        second = self.products.double() * (RESOLUTION**2 / self.count)
        return (second - torch.outer(mean, mean)) * (self.count / (self.count - 1))

    def state(self) -> dict[str, Tensor]:
        """As plain tensors, for a file; ``from_state`` reads them."""
        return {"count": torch.tensor(self.count), "total": self.total, "products": self.products}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Moments:
        return cls(int(state["count"]), state["total"], state["products"])


def frechet_distance(
    mean: Tensor, covariance: Tensor, mean_2: Tensor, covariance_2: Tensor, counts: tuple[float, float] | None = None
) -> float:
    """|μ₁ − μ₂|² + Tr(C₁ + C₂ − 2·(C₁C₂)^½) of two Gaussians; means float64 d, covariances d × d.

    The trace of the root comes from the eigenvalues of C₁^½·C₂·C₁^½, which is symmetric and has those of C₁C₂: several
    times faster than a general matrix root, and without its imaginary parts where a covariance is nearly singular.

    Args:
        counts: of the pictures that each Gaussian is of, infinite where that is not known. Of fewer than there are
            dimensions, a covariance lives in a subspace, and the root is taken there: sooner, and without the rounding
            of all other dimensions.
    """
    first, second = covariance.double(), covariance_2.double()
    shift = (mean.double() - mean_2.double()).square().sum()
    traces = first.trace() + second.trace()
    if counts and counts[1] < counts[0]:
        first, second = second, first
    if counts and min(counts) < len(mean):
        # The images of that many random vectors span all that a matrix of lower rank reaches.
        vectors = torch.randn(len(mean), int(min(counts)), generator=stream(0, Stream.BASIS), dtype=torch.float64)
        basis = torch.linalg.qr(first @ vectors.to(first.device))[0]
        first, second = basis.T @ first @ basis, basis.T @ second @ basis
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    middle = root @ second @ root
    trace_of_root = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp(min=0).sqrt().sum()
    return float(shift + traces - 2 * trace_of_root)


def distance_between(first: Moments, second: Moments) -> float:
    """The Fréchet distance of two sets. Raises ``StatisticsError`` where one has fewer than two features."""
    counts = (first.count, second.count)
    return frechet_distance(first.mean(), first.covariance(), second.mean(), second.covariance(), counts)
