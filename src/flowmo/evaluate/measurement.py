"""What an evaluation knows so far: sufficient for every figure of a report, and merged without rounding.

Figures of single pictures are kept, some bytes each; sums over pictures are taken at the end, in the pictures' order.
Statistics of features and of ids are sums of whole numbers. So neither the cut into batches, nor their order, nor the
number of processes, nor an interruption changes a figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowmo.data import evenly_spread
from flowmo.distributed import World
from flowmo.evaluate.metrics.frechet import Moments, StatisticsError, distance_between
from flowmo.evaluate.metrics.kernel import kernel_distance

COLUMNS = (
    *("bits", "pixels", "file_bits", "squared_error", "truncated_squared_error", "ssim", "truncated_ssim"),
    *("lpips_alex", "lpips_vgg"),
)
KERNEL_PICTURES = 5000
"""Features are kept of so many pictures, evenly spread, for the kernel distance."""
HALVES = 2


@dataclass
class Measurement:
    """Of N pictures and what they were made into.

    Attributes:
        values: float64, ``COLUMNS`` × N; NaN where a picture, or that figure of all, is not measured.
        usage: int64, how often each id was used; empty for continuous codes.
        originals, results: statistics of features, of the pictures at even and at odd places; empty without a network.
        kept: float32 2 × k × channels, features of originals and results of the places ``evenly_spread(k, N)``; NaN
            where not yet measured.
    """

    values: Tensor
    usage: Tensor
    originals: tuple[Moments, ...] = ()
    results: tuple[Moments, ...] = ()
    kept: Tensor | None = None

    @classmethod
    def empty(cls, pictures: int, id_count: int | None = None, channels: int | None = None) -> Measurement:
        values = torch.full((len(COLUMNS), pictures), torch.nan, dtype=torch.float64)
        self = cls(values, torch.zeros(id_count or 0, dtype=torch.int64))
        if channels:
            self.originals, self.results = (
                tuple(Moments.empty(channels) for _ in range(HALVES)) for _ in ("originals", "results")
            )
            self.kept = torch.full((2, min(pictures, KERNEL_PICTURES), channels), torch.nan)
        return self

    @property
    def done(self) -> Tensor:
        """Which pictures are measured: bool N."""
        return ~self.values[COLUMNS.index("bits")].isnan()

    def column(self, name: str) -> Tensor:
        """A figure of the measured pictures, in their order; without NaN, and empty where it was not asked for."""
        column = self.values[COLUMNS.index(name)][self.done]
        return column[:0] if column.isnan().all() else column

    def add(self, places: Tensor, values: Mapping[str, Tensor], ids: Tensor | None = None) -> None:
        """Take in some pictures: their places among the N, int64 b, their figures, each b, and their ids."""
        for name, value in values.items():
            self.values[COLUMNS.index(name), places] = value.double().cpu()
        if ids is not None:
            self.usage += torch.bincount(ids.flatten().cpu(), minlength=len(self.usage))

    def add_features(self, places: Tensor, originals: Tensor, results: Tensor) -> None:
        """Take in some pictures' features, b × channels. Raises ``StatisticsError`` where none are kept."""
        kept = self._kept()
        chosen = torch.tensor(evenly_spread(kept.shape[1], self.values.shape[1]))
        slots = torch.searchsorted(chosen, places).clamp(max=len(chosen) - 1)
        keep = chosen[slots] == places
        for i, (features, moments) in enumerate(((originals, self.originals), (results, self.results))):
            for half in range(HALVES):
                moments[half].add(features[(places % HALVES == half).to(features.device)])
            kept[i, slots[keep]] = features.float().cpu()[keep]

    def merge(self, other: Measurement) -> Measurement:
        """Both together.

        Raises:
            StatisticsError: a picture is in both, or they are not of the same evaluation.
        """
        if self.values.shape != other.values.shape or len(self.usage) != len(other.usage):
            raise StatisticsError("measurements of different evaluations do not merge")
        if (self.done & other.done).any():
            raise StatisticsError("a picture is in both measurements")

        def both(ours: tuple[Moments, ...], theirs: tuple[Moments, ...]) -> tuple[Moments, ...]:
            return tuple(a.merge(b) for a, b in zip(ours, theirs, strict=True))

        return Measurement(
            torch.where(other.done, other.values, self.values),
            self.usage + other.usage,
            both(self.originals, other.originals),
            both(self.results, other.results),
            None if self.kept is None else torch.where(self.kept.isnan(), other.kept, self.kept),
        )

    def gather(self, world: World) -> Measurement:
        """What all processes measured, in each of them."""
        if world.size == 1:
            return self

        def union(x: Tensor) -> Tensor:
            """Of values that one process alone has: a number plus zeros is that number."""
            there = world.sum((~x.isnan()).to(torch.int32))
            return torch.where(there > 0, world.sum(x.nan_to_num(0.0)), torch.nan)

        kept = None if self.kept is None else union(self.kept)
        usage = world.sum(self.usage) if len(self.usage) else self.usage
        originals, results = (tuple(m.gather(world) for m in moments) for moments in (self.originals, self.results))
        return Measurement(union(self.values), usage, originals, results, kept)

    def state(self) -> dict[str, Any]:
        """As plain tensors, for a file."""
        moments = {name: [moment.state() for moment in getattr(self, name)] for name in ("originals", "results")}
        return {"values": self.values, "usage": self.usage, "kept": self.kept, **moments}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Measurement:
        moments = {name: tuple(Moments.from_state(m) for m in state[name]) for name in ("originals", "results")}
        return replace(cls(state["values"], state["usage"], kept=state["kept"]), **moments)

    # Figures of all pictures

    def frechet(self) -> tuple[float, float]:
        """Fréchet distance of originals and results, and its estimated bias.

        The distance of n pictures exceeds that of infinitely many by about c / n, so that of n / 2 exceeds it by twice
        as much: the bias is the mean distance of the two halves less that of all.

        Raises:
            StatisticsError: fewer than two pictures a half.
        """
        halves = [distance_between(a, b) for a, b in zip(self.originals, self.results, strict=True)]
        whole = distance_between(self.originals[0].merge(self.originals[1]), self.results[0].merge(self.results[1]))
        return whole, sum(halves) / HALVES - whole

    def kernel(self) -> float:
        """Kernel distance of the kept and measured features. Raises ``StatisticsError`` for fewer than two pictures."""
        kept = self._kept()
        ours, theirs = kept[:, ~kept.isnan().any(dim=2).any(dim=0)]
        return kernel_distance(ours, theirs, paired=True)

    def _kept(self) -> Tensor:
        if self.kept is None:
            raise StatisticsError("an evaluation without a feature network keeps no features")
        return self.kept
