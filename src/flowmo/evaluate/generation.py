"""Metrics of generated images (table 2): FID, sFID, Inception Score, precision and recall, as in the ADM evaluator.

The reference is a set of images, or the statistics of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flowmo.data import DataError, Source, evenly_spread, open_source
from flowmo.data.npz import STATISTICS, NpzFile
from flowmo.distributed import World
from flowmo.evaluate.measurement import KERNEL_IMAGES
from flowmo.evaluate.metrics.features import FeatureNetwork, in_fixed_batches
from flowmo.evaluate.metrics.fid import Gaussian, Moments, StatisticsError, finite_sample_bias, frechet_distance
from flowmo.evaluate.metrics.sets import NEIGHBOURS, SCORE_SPLIT, inception_score, kernel_distance, precision_and_recall
from flowmo.evaluate.reconstruction import print_unreadable
from flowmo.evaluate.summary import table_lines
from flowmo.images import ImageError, to_bytes, to_tensor


class ImageSet(Protocol):
    """Images of one size in a fixed order; ``batches`` yields uint8 b × 3 × h × w."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Tensor]: ...


class SourceImages:
    """The images of a data source, not cropped."""

    def __init__(self, source: Source, name: str):
        self.source, self.name = source, name

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the readable images. Raises ``DataError`` if their sizes differ."""
        first = None
        for start in range(0, len(self.source), size):
            batch = []
            for index in range(start, min(start + size, len(self.source))):
                try:
                    image = self.source.read(index)
                except ImageError as error:
                    print_unreadable(str(error))
                    continue
                first = first or image.size
                if image.size != first:
                    raise DataError(
                        f"{self.source.name(index)} is {image.width}×{image.height}, but the first image is "
                        f"{first[0]}×{first[1]}. Give images of one size."
                    )
                batch.append(to_tensor(image))
            if batch:
                yield to_bytes(torch.stack(batch))


def open_image_set(path: str | Path) -> ImageSet:
    """Open an ADM ``.npz``, or anything that ``flowmo.data.open_source`` takes."""
    return NpzFile(path) if str(path).endswith(".npz") else SourceImages(open_source(path), str(path))


@dataclass
class SetFeatures:
    """A network's features of N images.

    Attributes:
        count: N; 0 if only statistics are known.
        gaussians: by kind, ``pooled`` and ``spatial``. A Gaussian of infinite size comes from a file. It may describe
            more than the N images.
        pooled: float32 N × channels.
        logits: float32 N × classes.
    """

    count: int
    gaussians: dict[str, Gaussian]
    pooled: Tensor
    logits: Tensor

    @property
    def has_reference_statistics(self) -> bool:
        """Whether the Gaussian of pooled features comes from a file."""
        return math.isinf(self.gaussians["pooled"].size)

    def half(self, offset: int) -> Gaussian:
        """Gaussian of every second image's pooled features; one from a file stays as it is."""
        if self.has_reference_statistics:
            return self.gaussians["pooled"]
        moments = Moments.empty(self.pooled.shape[1])
        moments.add(self.pooled[offset::2])
        return moments.gaussian()

    def kernel_sample(self) -> Tensor:
        return self.pooled[evenly_spread(KERNEL_IMAGES, len(self.pooled))]


def extract_features(
    images: ImageSet,
    network: FeatureNetwork,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    world: World = World(),
    progress: Callable[[int, int], None] | None = None,
) -> SetFeatures:
    """Extract the features of an image set. All ranks call this together and share the batches.

    Statistics in an ``.npz`` replace those of its images: ADM's reference files hold some images, for precision and
    recall, and the statistics of the full set. They must come from the same network, which a file does not name.

    Raises:
        StatisticsError: there is only one readable image.
        DataError: image sizes differ, or there are neither images nor statistics.
    """
    count, name = len(images), images.name
    found = {kind: images.statistics(kind) for kind in STATISTICS} if isinstance(images, NpzFile) else {}
    given = {kind: Gaussian(*values) for kind, values in found.items() if values is not None}
    if not count and given:
        return SetFeatures(0, given, torch.empty(0, network.channels), torch.empty(0, network.classes))
    if not count:
        raise DataError(f"{name} holds neither images nor statistics.")
    rows = {"pooled": torch.zeros(count, network.channels), "logits": torch.zeros(count, network.classes)}
    moments = {"pooled": Moments.empty(network.channels)}
    if network.spatial_channels:
        moments["spatial"] = Moments.empty(network.spatial_channels)
    done = 0
    for number, batch in enumerate(images.batches(batch_size)):
        positions = slice(done, done + len(batch))
        done += len(batch)
        if number % world.size == world.rank:
            features = in_fixed_batches(network, batch.to(device).float() / 127.5 - 1)
            for kind, moment in moments.items():
                moment.add(getattr(features, kind))
            for kind, row in rows.items():
                if row.shape[1]:
                    row[positions] = getattr(features, kind).float().cpu()
        if progress:
            progress(done, count)
    if done < 2:
        raise StatisticsError(f"{name}: {done} of {count} images can be read. A covariance needs two or more.")
    gaussians = {kind: moment.gather(world).gaussian() for kind, moment in moments.items()}
    pooled, logits = (world.sum(rows[kind])[:done] for kind in ("pooled", "logits"))
    return SetFeatures(done, gaussians | given, pooled, logits)


@dataclass(frozen=True)
class GenerationSummary:
    """Metrics of generated images. A metric is ``None`` if its data are missing; ``missing`` says which.

    Attributes:
        frechet_distance: of pooled features; the FID if ``is_fid``.
        frechet_bias: estimated excess due to few images; see ``finite_sample_bias``.
        spatial_frechet_distance: the sFID if ``is_fid``.
        kernel_distance: unbiased; the KID if ``is_fid``.
        precision: share of generated images in the reference's manifold; ``recall`` the reverse.
        reference_statistics: the Fréchet distances are to statistics in the reference's file, not to its images.
    """

    name: str
    reference: str
    pictures: int
    reference_pictures: int
    feature_network: str
    is_fid: bool
    frechet_distance: float
    frechet_bias: float | None = None
    spatial_frechet_distance: float | None = None
    kernel_distance: float | None = None
    inception_score: float | None = None
    inception_score_spread: float | None = None
    precision: float | None = None
    recall: float | None = None
    missing: tuple[str, ...] = ()
    reference_statistics: bool = False

    @classmethod
    def of(
        cls, generated: SetFeatures, reference: SetFeatures, network: FeatureNetwork, names: tuple[str, str] = ("", "")
    ) -> GenerationSummary:
        """Compare two sets. Raises ``StatisticsError`` if one has no statistics of pooled features."""
        sets = generated, reference
        if not all("pooled" in features.gaussians for features in sets):
            raise StatisticsError(f"{names} have no statistics of pooled features.")
        metrics: dict[str, Any] = {}
        missing = []
        distance = frechet_distance(*(features.gaussians["pooled"] for features in sets))
        counts = [features.count for features in sets if not features.has_reference_statistics]
        if min(counts, default=0) >= 4:  # two images a half
            halves = ((generated.half(offset), reference.half(offset)) for offset in range(2))
            metrics["frechet_bias"] = finite_sample_bias(distance, halves)
        if all("spatial" in features.gaussians for features in sets):
            spatial = (features.gaussians["spatial"] for features in sets)
            metrics["spatial_frechet_distance"] = frechet_distance(*spatial)
        else:
            missing.append("no sFID: it needs a network with spatial features, and those of both sets")
        if generated.count and reference.count:
            metrics["kernel_distance"] = kernel_distance(generated.kernel_sample(), reference.kernel_sample())
            metrics["precision"], metrics["recall"] = precision_and_recall(reference.pooled, generated.pooled)
        else:
            missing.append("no kernel distance, precision and recall: the reference has statistics only, no images")
        if generated.logits.shape[1]:
            score = inception_score(generated.logits)
            metrics["inception_score"], metrics["inception_score_spread"] = score
        else:
            missing.append("no Inception Score: these weights have no classifier")
        return cls(
            *names,
            generated.count,
            reference.count,
            network.name,
            network.is_fid,
            distance,
            missing=tuple(missing),
            reference_statistics=reference.has_reference_statistics,
            **metrics,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For a terminal, one metric per line."""
        fid, sfid, kid = (
            ("FID", "sFID", "KID") if self.is_fid else ("Fréchet distance", "spatial Fréchet", "kernel distance")
        )
        bias = "" if self.frechet_bias is None else f"of which about {self.frechet_bias:.2f} for so few images; "
        spread = f"± {self.inception_score_spread or 0:.3g} over splits of {SCORE_SPLIT}"
        rows = (
            (fid, self.frechet_distance, 2, bias + self.feature_network),
            (sfid, self.spatial_frechet_distance, 2, ""),
            (kid, self.kernel_distance, 5, "unbiased"),
            ("Inception Score", self.inception_score, 2, spread),
            ("precision", self.precision, 4, f"{NEIGHBOURS} neighbours"),
            ("recall", self.recall, 4, f"{NEIGHBOURS} neighbours"),
        )
        reference = str(self.reference_pictures or "statistics")
        if self.reference_pictures and self.reference_statistics:
            reference += "; the distances are to the statistics in the reference's file"
        return [f"{self.pictures} images against {reference}", *table_lines(rows, 18), *self.missing]
