"""How good generated pictures are: FID, sFID, Inception Score, precision and recall (table 2), as the ADM evaluator
takes them, against reference pictures or the statistics of a reference batch.
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
from flowmo.distributed import World
from flowmo.evaluate.measurement import KERNEL_PICTURES
from flowmo.evaluate.metrics.features import FeatureNetwork, features_of
from flowmo.evaluate.metrics.frechet import Moments, StatisticsError, frechet_distance
from flowmo.evaluate.metrics.kernel import kernel_distance
from flowmo.evaluate.npz import STATISTICS, NpzFile
from flowmo.evaluate.reconstruction import tell_unreadable
from flowmo.images import ImageError, to_bytes, to_tensor
from flowmo.streams import Stream, stream

SCORE_SPLIT = 5000
NEIGHBOURS = 3
AT_ONCE = 2048
"""Rows of the distance matrix of precision and recall that are held at a time."""


class ImageSet(Protocol):
    """A set of pictures of one size, in a fixed order."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 b × 3 × h × w."""


class NpzImages:
    """Of an ADM ``.npz``, which may also bring statistics."""

    def __init__(self, path: str | Path):
        self.file = NpzFile(path)
        self.name = str(path)

    def __len__(self) -> int:
        return self.file.shape[0] if self.file.shape else 0

    def batches(self, size: int) -> Iterator[Tensor]:
        return self.file.batches(size)


class SourceImages:
    """Of any source, as they are: generated pictures are not cropped."""

    def __init__(self, source: Source, name: str, on_unreadable: Callable[[str], None] = tell_unreadable):
        self.source, self.name, self.on_unreadable = source, name, on_unreadable

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Those that can be read. Raises ``DataError`` where a picture is of another size than the first."""
        first = None
        for start in range(0, len(self.source), size):
            batch = []
            for index in range(start, min(start + size, len(self.source))):
                try:
                    picture = self.source.read(index)
                except ImageError as error:
                    self.on_unreadable(str(error))
                    continue
                first = first or picture.size
                if picture.size != first:
                    raise DataError(
                        f"{self.source.name(index)} is {picture.width}×{picture.height}, the first is "
                        f"{first[0]}×{first[1]}; a set has pictures of one size"
                    )
                batch.append(to_tensor(picture))
            if batch:
                yield to_bytes(torch.stack(batch))


def open_image_set(path: str | Path) -> ImageSet:
    """A set of pictures: an ADM ``.npz``, or what ``flowmo.data.open_source`` takes."""
    if str(path).endswith(".npz"):
        return NpzImages(path)
    return SourceImages(open_source(path), str(path))


@dataclass
class Seen:
    """What a network saw in a set of N pictures.

    Attributes:
        count: N; 0 where only statistics are known.
        gaussians: mean and covariance of the ``pooled`` and ``spatial`` features.
        pooled: float32 N × channels, empty where only statistics are known.
        logits: float32 N × classes.
        given: kinds whose Gaussian a file brought; it is of a larger set than the N images.
    """

    count: int
    gaussians: dict[str, tuple[Tensor, Tensor]]
    pooled: Tensor
    logits: Tensor
    given: frozenset[str] = frozenset()

    def gaussian(self, kind: str) -> tuple[Tensor, Tensor, float]:
        """Mean, covariance, and the number of images they are of, infinite where a file brought them."""
        return *self.gaussians[kind], math.inf if kind in self.given else self.count

    def half(self, which: int) -> tuple[Tensor, Tensor, float]:
        """The same of the pooled features of every other image; a Gaussian from a file stays whole."""
        if "pooled" in self.given:
            return self.gaussian("pooled")
        moments = Moments.empty(self.pooled.shape[1])
        moments.add(self.pooled[which::2])
        return moments.mean(), moments.covariance(), moments.count


def look(
    pictures: ImageSet,
    network: FeatureNetwork,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    world: World = World(),
    progress: Callable[[int, int], None] | None = None,
) -> Seen:
    """Show a set to a network; all processes call this together and share the batches.

    Statistics that an ``.npz`` brings are taken in the place of its images': ADM's reference files hold some images,
    for precision and recall, and the statistics of the whole set. They must be of the same network; a file does not
    say of which they are.

    Raises:
        StatisticsError: one picture only.
        DataError: pictures of several sizes, or neither pictures nor statistics.
    """
    count = len(pictures)
    found = {kind: pictures.file.statistics(kind) for kind in STATISTICS} if isinstance(pictures, NpzImages) else {}
    given = {kind: pair for kind, pair in found.items() if pair is not None}
    if not count and given:
        return Seen(0, given, torch.empty(0, network.channels), torch.empty(0, network.classes), frozenset(given))
    if not count:
        raise DataError(f"{pictures.name}: neither pictures nor their statistics")
    if count < 2:
        raise StatisticsError(f"{pictures.name}: one picture has no covariance; give two or more")
    rows = {"pooled": torch.zeros(count, network.channels), "logits": torch.zeros(count, network.classes)}
    moments = {"pooled": Moments.empty(network.channels)}
    if network.spatial_channels:
        moments["spatial"] = Moments.empty(network.spatial_channels)
    done = 0
    for number, batch in enumerate(pictures.batches(batch_size)):
        places = slice(done, done + len(batch))
        done += len(batch)
        if number % world.size == world.rank:
            seen = features_of(network, batch.to(device).float() / 127.5 - 1)
            for kind in moments:
                moments[kind].add(getattr(seen, kind))
            for kind in rows:
                if rows[kind].shape[1]:
                    rows[kind][places] = getattr(seen, kind).float().cpu()
        if progress:
            progress(done, count)
    if done < 2:
        raise StatisticsError(f"{pictures.name}: {done} of {count} pictures can be read; give two or more")
    moments = {kind: moment.gather(world) for kind, moment in moments.items()}
    gaussians = {kind: (moment.mean(), moment.covariance()) for kind, moment in moments.items()} | given
    pooled, logits = (world.sum(rows[kind])[:done] for kind in ("pooled", "logits"))
    return Seen(done, gaussians, pooled, logits, frozenset(given))


@dataclass(frozen=True)
class GenerationSummary:
    """Figures of generated pictures; ``None`` where something is missing, which ``missing`` names.

    Attributes:
        frechet_distance: of the pooled features; the FID where ``is_fid``.
        frechet_bias: estimated, of so few pictures: the distance of halves of both sets less that of the whole.
        spatial_frechet_distance: the sFID where ``is_fid``.
        kernel_distance: unbiased; the KID where ``is_fid``.
        precision: share of the generated pictures within the reference's manifold; ``recall`` the other way around.
        reference_statistics: the Fréchet distances are to statistics in the reference's file, not to its pictures.
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
        cls, generated: Seen, reference: Seen, network: FeatureNetwork, names: tuple[str, str] = ("", "")
    ) -> GenerationSummary:
        """Raises ``StatisticsError`` where one of the sets has no statistics of that network's features."""
        facts: dict[str, Any] = {}
        missing = []
        for kind in ("pooled", "spatial"):
            if kind in generated.gaussians and kind in reference.gaussians:
                facts[kind] = distance(generated.gaussian(kind), reference.gaussian(kind))
            elif kind == "pooled":
                raise StatisticsError(f"{names}: no statistics of pooled features")
            else:
                missing.append("no sFID: needs spatial features of both sets, and a network that has them")
        facts["bias"] = halves_bias(generated, reference, facts["pooled"])
        if generated.count and reference.count:
            facts["kernel"] = kernel_distance(spread(generated.pooled), spread(reference.pooled))
            facts["precision"], facts["recall"] = precision_and_recall(reference.pooled, generated.pooled)
        else:
            missing.append("no kernel distance, precision and recall: the reference is statistics only, not pictures")
        if generated.logits.shape[1]:
            facts["score"], facts["score_spread"] = inception_score(generated.logits)
        else:
            missing.append("no Inception Score: these weights come without a classifier")
        return cls(
            *names,
            generated.count,
            reference.count,
            network.name,
            network.is_fid,
            facts["pooled"],
            facts.get("bias"),
            facts.get("spatial"),
            facts.get("kernel"),
            facts.get("score"),
            facts.get("score_spread"),
            facts.get("precision"),
            facts.get("recall"),
            tuple(missing),
            "pooled" in reference.given,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For a terminal, a figure a line."""
        distance, spatial, kernel = (
            ("FID", "sFID", "KID") if self.is_fid else ("Fréchet distance", "spatial Fréchet", "kernel distance")
        )
        bias = "" if self.frechet_bias is None else f"of which about {self.frechet_bias:.2f} for so few pictures; "
        spread_of_score = f"± {self.inception_score_spread or 0:.3g} over splits of {SCORE_SPLIT}"
        rows = (
            (distance, self.frechet_distance, 2, bias + self.feature_network),
            (spatial, self.spatial_frechet_distance, 2, ""),
            (kernel, self.kernel_distance, 5, "unbiased"),
            ("Inception Score", self.inception_score, 2, spread_of_score),
            ("precision", self.precision, 4, f"{NEIGHBOURS} neighbours"),
            ("recall", self.recall, 4, f"{NEIGHBOURS} neighbours"),
        )
        shown = [
            f"{name:18} {value:.{places}f}".ljust(30) + note for name, value, places, note in rows if value is not None
        ]
        reference = str(self.reference_pictures or "statistics")
        if self.reference_pictures and self.reference_statistics:
            reference += "; the distances are to the statistics in the reference's file"
        return [f"{self.pictures} pictures against {reference}", *shown, *self.missing]


def spread(rows: Tensor) -> Tensor:
    """At most ``KERNEL_PICTURES`` of them, evenly spread."""
    return rows[evenly_spread(KERNEL_PICTURES, len(rows))]


def distance(ours: tuple[Tensor, Tensor, float], theirs: tuple[Tensor, Tensor, float]) -> float:
    """Fréchet distance of two sets' Gaussians. Raises ``StatisticsError`` where they are of unequal width."""
    (mean, covariance, count), (mean_2, covariance_2, count_2) = ours, theirs
    if mean.shape != mean_2.shape:
        raise StatisticsError(f"statistics of {len(mean)} and {len(mean_2)} channels; another network's?")
    return frechet_distance(mean, covariance, mean_2, covariance_2, (count, count_2))


def halves_bias(ours: Seen, theirs: Seen, whole: float) -> float | None:
    """By how much a Fréchet distance of so few pictures is too large: that of halves is too large by twice as much.

    ``None`` where there are no halves: fewer than 4 pictures, or statistics alone.
    """
    counts = [seen.count for seen in (ours, theirs) if "pooled" not in seen.given]
    if min(counts, default=0) < 4:
        return None
    return sum(distance(ours.half(which), theirs.half(which)) for which in range(2)) / 2 - whole


def inception_score(logits: Tensor, split: int = SCORE_SPLIT) -> tuple[float, float]:
    """exp of the mean divergence of p(class | picture) from p(class), mean and standard deviation over splits.

    Splits are taken of the pictures in a seeded random order: of pictures sorted by class a split holds few classes,
    and its score cannot exceed their number.
    """
    scores = []
    order = torch.randperm(len(logits), generator=stream(0, Stream.SCORE_ORDER))
    for part in logits.double()[order].split(split):
        log_p = part.log_softmax(dim=1)
        p = log_p.exp()
        marginal = p.mean(dim=0, keepdim=True).clamp(min=1e-300).log()
        scores.append((p * (log_p - marginal)).sum(dim=1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


def precision_and_recall(reference: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Kynkäänniemi et al. 2019: shares of one set within balls around the other's, as wide as to the k-th neighbour.

    Raises:
        StatisticsError: a set has no more than ``neighbours`` pictures.
    """
    if min(len(reference), len(generated)) <= neighbours:
        raise StatisticsError(f"precision and recall need more than {neighbours} pictures a set")

    def covered(points: Tensor, manifold: Tensor) -> float:
        radii = neighbour_distances(manifold, neighbours)
        inside = [(torch.cdist(chunk, manifold) <= radii).any(dim=1) for chunk in points.split(AT_ONCE)]
        return float(torch.cat(inside).double().mean())

    reference, generated = reference.double(), generated.double()
    return covered(generated, reference), covered(reference, generated)


def neighbour_distances(x: Tensor, neighbours: int) -> Tensor:
    """Distance of each row to its k-th nearest other."""
    return torch.cat([torch.cdist(chunk, x).kthvalue(neighbours + 1, dim=1).values for chunk in x.split(AT_ONCE)])
