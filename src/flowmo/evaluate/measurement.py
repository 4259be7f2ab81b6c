"""The measurements of an evaluation so far: enough for every metric, merged without rounding, and kept in files.

Metrics of single images are stored, some bytes each, and averaged at the end in the order of the images. Statistics of
features and ids are integer sums. So neither batches, nor their order, nor ranks, nor an interruption change a metric.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmo.checkpoint import CheckpointError
from flowmo.checkpoint import files as checkpoint
from flowmo.checkpoint.pth import read_pth
from flowmo.data import DataError, evenly_spread
from flowmo.distributed import World
from flowmo.errors import one_line
from flowmo.evaluate.metrics.fid import Moments, StatisticsError, finite_sample_bias, frechet_distance
from flowmo.evaluate.metrics.sets import kernel_distance

COLUMNS = (
    *("bits", "pixels", "file_bits", "squared_error", "truncated_squared_error", "ssim", "truncated_ssim"),
    *("lpips_alex", "lpips_vgg"),
)
KERNEL_IMAGES = 5000
"""Number of images, evenly spread, whose features are kept for the kernel distance."""
HALVES = 2
SAVE_SECONDS = 60
MERGED = "measured.pt"


class EvaluationError(DataError):
    """The evaluation would be meaningless; the message says why."""


@dataclass
class Measurement:
    """Measurements of N images and their reconstructions.

    Attributes:
        values: float64, rows × N. The rows are ``COLUMNS``, then squared error and SSIM of each channel if requested.
            NaN if an image, or that metric of every image, is not measured.
        usage: int64, how often each id occurs; empty for continuous codes.
        moments: of features of originals at even and at odd positions, then of results; empty without a network.
        kept: float32 2 × k × channels, features of originals and results at the positions ``evenly_spread(k, N)``; NaN
            if not yet measured.
    """

    values: Tensor
    usage: Tensor
    moments: tuple[Moments, ...] = ()
    kept: Tensor | None = None

    @classmethod
    def empty(
        cls, images: int, id_count: int | None = None, channels: int | None = None, image_channels: int = 0
    ) -> Measurement:
        """Make a measurement of no image yet.

        Args:
            channels: of the feature network.
            image_channels: number of channels that are measured one by one.
        """
        values = torch.full((len(COLUMNS) + 2 * image_channels, images), torch.nan, dtype=torch.float64)
        usage = torch.zeros(id_count or 0, dtype=torch.int64)
        if not channels:
            return cls(values, usage)
        kept = torch.full((2, min(images, KERNEL_IMAGES), channels), torch.nan)
        return cls(values, usage, tuple(Moments.empty(channels) for _ in range(2 * HALVES)), kept)

    @property
    def done(self) -> Tensor:
        """Bool N: measured images."""
        return ~self.values[COLUMNS.index("bits")].isnan()

    def column(self, name: str) -> Tensor:
        """A metric of the measured images in order; empty if it was not requested."""
        column = self.values[COLUMNS.index(name)][self.done]
        return column[:0] if column.isnan().all() else column

    @property
    def channel_count(self) -> int:
        """Number of channels that are measured one by one."""
        return (len(self.values) - len(COLUMNS)) // 2

    def channel_metrics(self) -> tuple[Tensor, Tensor]:
        """Squared error and SSIM of each channel of the measured images, each channels × images."""
        errors, ssims = self.values[len(COLUMNS) :, self.done].chunk(2)
        return errors, ssims

    def add_channels(self, positions: Tensor, values: Tensor) -> None:
        """Add squared errors, then SSIMs, of each channel of b images: 2 · channels × b."""
        self.values[len(COLUMNS) :, positions] = values.double().cpu()

    def add(self, positions: Tensor, values: Mapping[str, Tensor], ids: Tensor | None = None) -> None:
        """Add b images: their positions among the N, int64 b, their metrics, each b, and their ids."""
        for name, value in values.items():
            self.values[COLUMNS.index(name), positions] = value.double().cpu()
        if ids is not None:
            self.usage += torch.bincount(ids.flatten().cpu(), minlength=len(self.usage))

    def add_features(self, positions: Tensor, originals: Tensor, results: Tensor) -> None:
        """Add features b × channels of b images. Raises ``StatisticsError`` if no features are kept."""
        kept = self._kept()
        chosen = torch.tensor(evenly_spread(kept.shape[1], self.values.shape[1]))
        slots = torch.searchsorted(chosen, positions).clamp(max=len(chosen) - 1)
        keep = chosen[slots] == positions
        for i, features in enumerate((originals, results)):
            for half in range(HALVES):
                self.moments[HALVES * i + half].add(features[(positions % HALVES == half).to(features.device)])
            kept[i, slots[keep]] = features.float().cpu()[keep]

    def merge(self, other: Measurement) -> Measurement:
        """Both measurements together.

        Raises:
            StatisticsError: an image is in both, or they belong to different evaluations.
        """
        if self.values.shape != other.values.shape or len(self.usage) != len(other.usage):
            raise StatisticsError("Measurements of different evaluations do not merge.")
        if (self.done & other.done).any():
            raise StatisticsError("An image is in both measurements.")
        return Measurement(
            torch.where(other.done, other.values, self.values),
            self.usage + other.usage,
            tuple(ours.merge(theirs) for ours, theirs in zip(self.moments, other.moments, strict=True)),
            None if self.kept is None else torch.where(self.kept.isnan(), other.kept, self.kept),
        )

    def gather(self, world: World) -> Measurement:
        """The measurements of all ranks together, on every rank."""
        if world.size == 1:
            return self

        def union(x: Tensor) -> Tensor:
            """Each value is NaN on all ranks but one: sum it with zeros for the others."""
            present = world.sum((~x.isnan()).to(torch.int32))
            return torch.where(present > 0, world.sum(x.nan_to_num(0.0)), torch.nan)

        usage = world.sum(self.usage) if len(self.usage) else self.usage
        moments = tuple(moments.gather(world) for moments in self.moments)
        return Measurement(union(self.values), usage, moments, None if self.kept is None else union(self.kept))

    def state(self) -> dict[str, Any]:
        """As plain tensors, for a file."""
        states = [moments.state() for moments in self.moments]
        halves = {"originals": states[:HALVES], "results": states[HALVES:]}
        return {"values": self.values, "usage": self.usage, "kept": self.kept, **halves}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Measurement:
        moments = tuple(map(Moments.from_state, [*state["originals"], *state["results"]]))
        return cls(state["values"], state["usage"], moments, state["kept"])

    def frechet_distance(self) -> tuple[float, float]:
        """Fréchet distance of originals and results, the rFID if the network is FID's, and its estimated bias.

        Raises:
            StatisticsError: a half has fewer than two images.
        """
        self._kept()
        even, odd, even_2, odd_2 = self.moments
        distance = frechet_distance(even.merge(odd).gaussian(), even_2.merge(odd_2).gaussian())
        halves = ((even.gaussian(), even_2.gaussian()), (odd.gaussian(), odd_2.gaussian()))
        return distance, finite_sample_bias(distance, halves)

    def kernel_distance(self) -> float:
        """Kernel distance of the kept features. Raises ``StatisticsError`` for fewer than two images."""
        kept = self._kept()
        originals, results = kept[:, ~kept.isnan().any(dim=2).any(dim=0)]
        return kernel_distance(originals, results, paired=True)

    def _kept(self) -> Tensor:
        if self.kept is None:
            raise StatisticsError("An evaluation without a feature network keeps no features.")
        return self.kept


class MeasurementFolder:
    """Measurements on disk: one part per rank, and one file with all that earlier processes measured.

    A kill at any time counts nothing twice: a part that the merged file already holds is ignored. Without a folder
    nothing is kept.
    """

    def __init__(self, folder: Path | None, identity: str, world: World):
        self.folder, self.identity, self.world = folder, identity, world
        self.saved = time.monotonic()

    def resume(self) -> Measurement | None:
        """Merge the files into one and return their measurements; ``None`` if there are none."""
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        merged = None
        for path in sorted(self.folder.glob("*.pt"), key=lambda path: path.name != MERGED):
            part = self._read(path)
            if merged is None:
                merged = part
            elif not (merged.done & part.done).any():
                merged = merged.merge(part)
        self.world.barrier()  # no rank removes a file that another still reads
        if merged is not None:
            self.finish(merged)
        return merged

    def _read(self, path: Path) -> Measurement:
        try:
            content = read_pth(path)
            identity, state = content["identity"], content["measurement"]
        except (CheckpointError, KeyError) as error:
            raise EvaluationError(f"{path} is not part of an evaluation ({one_line(error, 100)}).") from None
        if identity != self.identity:
            raise EvaluationError(f"{self.folder} holds another evaluation. Name an empty folder, or remove it.")
        return Measurement.from_state(state)

    def _write(self, path: Path, measurement: Measurement) -> None:
        content = {"identity": self.identity, "measurement": measurement.state()}
        checkpoint.write_whole(path, lambda temporary: torch.save(content, temporary))

    def save_periodically(self, measurement: Measurement) -> None:
        """Save this rank's part once in ``SAVE_SECONDS``."""
        if self.folder is not None and time.monotonic() - self.saved > SAVE_SECONDS:
            self._write(self.folder / f"part-{self.world.rank:05d}.pt", measurement)
            self.saved = time.monotonic()

    def finish(self, merged: Measurement) -> None:
        """Replace all parts by one file."""
        if self.folder is not None and self.world.main:
            self._write(self.folder / MERGED, merged)
            for path in self.folder.glob("part-*.pt"):
                path.unlink()
        self.world.barrier()
