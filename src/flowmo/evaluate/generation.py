"""Metrics of generated images (table 2): FID, sFID, Inception Score, precision and recall, as in the ADM evaluator.

The reference is a set of images, or the statistics of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flowmo.data import DataError, Source, open_source
from flowmo.data.npz import STATISTICS, NpzFile
from flowmo.distributed import World
from flowmo.evaluate.metrics.features import FeatureNetwork, Features, in_fixed_batches
from flowmo.evaluate.metrics.fid import Gaussian, StatisticsError, distance_and_bias, frechet_distance
from flowmo.evaluate.metrics.sets import inception_score, kernel_distance, precision_and_recall
from flowmo.evaluate.reconstruction import print_unreadable
from flowmo.evaluate.summary import Metrics, metric
from flowmo.images import ImageError, read_image, to_bytes, to_tensor

SEVERAL_SIZES = "it has images of several sizes. Give images of one size."


class ImageSet(Protocol):
    """Images of one size in a fixed order.

    ``batches`` yields (number, uint8 b × 3 × h × w) of this rank's part of the batches.
    """

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def batches(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, Tensor]]: ...


class SourceImages:
    """The images of a data source, not cropped."""

    def __init__(self, source: Source, name: str):
        self.source, self.name = source, name

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Yield the readable images of this rank. Raises ``DataError`` if their sizes differ."""
        first = None
        for start in range(rank * size, len(self.source), ranks * size):
            batch = []
            for index in range(start, min(start + size, len(self.source))):
                try:
                    image = read_image(self.source.file(index), self.source.name(index))
                except ImageError as error:
                    print_unreadable(str(error))
                    continue
                first = first or image.size
                if image.size != first:
                    raise DataError(
                        f"{self.source.name(index)} has another size than the first. Give images of one size."
                    )
                batch.append(to_tensor(image))
            if batch:
                yield start // size, to_bytes(torch.stack(batch))


def open_image_set(path: str | Path) -> ImageSet:
    """Open an ADM ``.npz``, or anything that ``flowmo.data.open_source`` takes."""
    return NpzFile(path) if str(path).lower().endswith(".npz") else SourceImages(open_source(path), str(path))


@dataclass
class SetFeatures:
    """A network's features of N images.

    Attributes:
        features: float32, N rows in the order of the images; ``None`` if only statistics are known, or not on rank 0.
        statistics: Gaussians of ``pooled`` and ``spatial`` features from a file. They may describe more images.
    """

    features: Features | None
    statistics: Mapping[str, Gaussian] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return 0 if self.features is None else len(self.features.pooled)

    def distribution(self, kind: str, as_reference: bool) -> Tensor | Gaussian | None:
        """``pooled`` or ``spatial`` features, or the statistics of the file; ``None`` without either.

        A reference file has statistics of more images than it holds, so they come first there.
        """
        found = [getattr(self.features, kind, None), self.statistics.get(kind)]
        return next((one for one in (found[::-1] if as_reference else found) if one is not None), None)


def extract_features(
    images: ImageSet,
    network: FeatureNetwork,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    world: World = World(),
    progress: Callable[[int, int], None] | None = None,
) -> SetFeatures:
    """Extract the features of an image set. All ranks call this together and share the batches; rank 0 has the result.

    An ``.npz`` also gives its statistics: ADM's reference files hold some images, for precision and recall, and the
    statistics of the full set. They must come from the same network, which a file does not name.

    Raises:
        StatisticsError: there is only one readable image.
        DataError: image sizes differ, or there are neither images nor statistics.
    """
    count, statistics = len(images), {}
    if isinstance(images, NpzFile):
        found = {kind: images.statistics(kind) for kind in STATISTICS}
        statistics = {kind: Gaussian(*values) for kind, values in found.items() if values is not None}
    if not count and "pooled" not in statistics:
        raise DataError(f"{images.name} holds neither images nor statistics of pooled features.")
    if not count:
        return SetFeatures(None, statistics)
    done, share, sizes, problem = 0, -(-count // world.size), set[torch.Size](), ""
    mine: dict[int, Features] = {}
    try:
        for number, batch in images.batches(batch_size, world.rank, world.size):
            done += len(batch)
            sizes.add(batch.shape[1:])
            features = in_fixed_batches(network, batch.to(device).float() / 127.5 - 1)
            mine[number] = Features(*(None if column is None else column.float().cpu() for column in features))
            if progress:
                progress(min(done, share), share)
    except DataError as error:  # of this rank: the others wait for it
        problem = str(error)
    every = world.gather((done, sizes, problem))
    done, problem = world.broadcast((sum(part[0] for part in every), _problem(every)) if every else (0, ""))
    if problem:
        raise DataError(problem if problem != SEVERAL_SIZES else f"{images.name}: {problem}")
    if done < 2:
        raise StatisticsError(f"{images.name}: {done} of {count} images can be read. A covariance needs two or more.")
    batches = {number: features for part in world.gather(mine) for number, features in part.items()}
    return SetFeatures(Features.cat(batches[number] for number in sorted(batches)) if batches else None, statistics)


def _problem(every: Sequence[tuple[int, set[torch.Size], str]]) -> str:
    """Return the first error of any rank, or that the sizes differ; empty if all is well."""
    several = len(set[torch.Size]().union(*(sizes for _, sizes, _ in every))) > 1
    return next((problem for *_, problem in every if problem), SEVERAL_SIZES if several else "")


@dataclass(frozen=True, kw_only=True)
class GenerationSummary(Metrics):
    """Metrics of generated images. A metric is ``None`` if its data are missing; ``missing`` says which.

    Attributes:
        frechet_bias: estimated excess due to few images; see ``distance_and_bias``.
        kernel_distance: unbiased.
        precision: share of generated images in the reference's manifold; ``recall`` the reverse.
        reference_statistics: the Fréchet distances are to statistics in the reference's file, not to its images.
    """

    reference: str
    reference_images: int
    frechet_distance: float = metric("FID ↓", 2, other="Fréchet distance ↓")
    frechet_bias: float | None = metric("bias of few images", 2)
    spatial_frechet_distance: float | None = metric("sFID ↓", 2, other="spatial Fréchet ↓")
    kernel_distance: float | None = metric("KID ↓", 5, other="kernel distance ↓")
    inception_score: float | None = metric("Inception Score ↑", 2)
    precision: float | None = metric("precision ↑", 4)
    recall: float | None = metric("recall ↑", 4)
    inception_score_spread: float | None = None
    missing: tuple[str, ...] = ()
    reference_statistics: bool = False

    @classmethod
    def of(
        cls, generated: SetFeatures, reference: SetFeatures, network: FeatureNetwork, names: tuple[str, str] = ("", "")
    ) -> GenerationSummary:
        """Compare two sets."""
        metrics: dict[str, Any] = {}
        missing = []
        pooled, spatial = (
            [generated.distribution(kind, False), reference.distribution(kind, True)] for kind in STATISTICS
        )
        metrics["frechet_distance"], metrics["frechet_bias"] = distance_and_bias(*pooled)
        if any(distribution is None for distribution in spatial):
            missing.append("no sFID: it needs a network with spatial features, of both sets")
        else:
            metrics["spatial_frechet_distance"] = frechet_distance(*map(Gaussian.of, spatial))
        features, real = generated.features, reference.features
        if features is None or real is None:
            which = "reference has" if real is None else "generated set has"
            missing.append(f"no kernel distance, precision and recall: the {which} statistics only, no images")
        else:
            metrics["kernel_distance"] = kernel_distance(features.pooled, real.pooled)
            try:
                metrics["precision"], metrics["recall"] = precision_and_recall(real.pooled, features.pooled)
            except StatisticsError as error:
                missing.append(f"no precision and recall: {error}")
        if features is None:
            missing.append("no Inception Score: the generated set has statistics only, no images")
        elif features.logits is None:
            missing.append("no Inception Score: these weights have no classifier")
        else:
            metrics["inception_score"], metrics["inception_score_spread"] = inception_score(features.logits)
        return cls(
            name=names[0],
            reference=names[1],
            images=generated.count,
            reference_images=reference.count,
            feature_network=network.name,
            is_fid=network.is_fid,
            missing=tuple(missing),
            reference_statistics="pooled" in reference.statistics,
            **metrics,
        )

    def lines(self) -> list[str]:
        reference = str(self.reference_images or "statistics")
        if self.reference_images and self.reference_statistics:
            reference += "; the Fréchet distance is to the statistics in the reference's file"
        return [f"{self.images} images against {reference}", *super().lines(), str(self.feature_network), *self.missing]
