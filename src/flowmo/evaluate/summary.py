"""The metrics of one candidate from its measurement: means over images, rFID and use of ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from flowmo.evaluate.measurement import Measurement
from flowmo.evaluate.metrics.features import FeatureNetwork
from flowmo.evaluate.metrics.fid import StatisticsError, distance_and_bias
from flowmo.evaluate.metrics.pairs import decibels
from flowmo.evaluate.metrics.sets import kernel_distance

LEGACY_GROUP = 5
"""The release takes the PSNR of this many images at once."""


def metric(heading: str, digits: int, missing: Any = None, other: str = "") -> Any:
    """Declare a field that tables show. ``other`` is its heading if the features are not FID's."""
    return field(default=missing, metadata={"headings": (other or heading, heading), "digits": digits})


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of ``images`` images. ``metric`` makes the columns of tables, in their order.

    Attributes:
        is_fid: ``feature_network`` is FID's, so its Fréchet distance is an FID.
    """

    name: str
    images: int
    feature_network: str | None = None
    is_fid: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def cells(self) -> dict[str, str]:
        """Heading and text of each measured metric, with ± its spread."""
        cells = {}
        for column in fields(self):
            value, spread = getattr(self, column.name), getattr(self, f"{column.name}_spread", None)
            if column.metadata and value not in (None, ()):
                heading, digits = column.metadata["headings"][self.is_fid], column.metadata["digits"]
                values = value if isinstance(value, tuple) else (value,)
                text = " ".join("equal" if each is None else f"{each:.{digits}f}" for each in values)
                cells[heading] = text if spread is None else f"{text} ± {spread:.{min(digits, 3)}f}"
        return cells

    def lines(self) -> list[str]:
        """For a terminal, one metric per line."""
        return [f"{heading:20} {text}" for heading, text in self.cells().items()]


@dataclass(frozen=True, kw_only=True)
class Summary(Metrics):
    """Means over images; a ``…_spread`` is the standard deviation over images.

    Attributes:
        bytes_per_image: of packed ids, or of a codec's file.
        frechet_bias: estimated excess due to few images.
        kernel_distance: unbiased.
        psnr: dB, over the images that differ from their originals; ``equal_images`` counts the others.
        psnr_of_channels, ssim_of_channels: means of each channel, for images of 2 or of more than 3 channels.
        psnr_legacy: as the release, of five images at once, truncated to 8 bits; ``None`` for mixed sizes.
        ssim_legacy: as the release, of images truncated to 8 bits instead of rounded.
        ids_used: share of the vocabulary that occurs.
        id_entropy: of the id frequencies.
        missing: why distances of features are missing.
        unreadable: number of images that cannot be read and are in no metric.
    """

    bits_per_pixel: float = metric("bits/pixel", 4)
    bytes_per_image: float = metric("bytes", 1)
    file_bytes: float | None = metric("bytes, file", 1)
    frechet_distance: float | None = metric("rFID ↓", 2, other="Fréchet distance ↓")
    frechet_bias: float | None = metric("bias of few images", 2)
    kernel_distance: float | None = metric("rKID ↓", 5, other="kernel distance ↓")
    psnr: float | None = metric("PSNR ↑", 2)
    psnr_of_channels: tuple[float | None, ...] = metric("PSNR of channels ↑", 2, ())
    ssim: float = metric("SSIM ↑", 4)
    ssim_of_channels: tuple[float | None, ...] = metric("SSIM of channels ↑", 4, ())
    lpips_alex: float | None = metric("LPIPS Alex ↓", 4)
    lpips_vgg: float | None = metric("LPIPS VGG ↓", 4)
    ids_used: float | None = metric("ids used", 3)
    id_entropy: float | None = metric("bits/id", 3)
    psnr_spread: float | None = None
    ssim_spread: float | None = None
    lpips_alex_spread: float | None = None
    lpips_vgg_spread: float | None = None
    psnr_legacy: float | None = None
    ssim_legacy: float
    equal_images: int
    id_count: int | None = None
    missing: str = ""
    unreadable: int = 0

    @classmethod
    def of(cls, name: str, measurement: Measurement, network: FeatureNetwork | None = None) -> Summary:
        """Summarize a measurement, whose features come from ``network``. Without features it has no distances."""
        rows = measurement.rows
        errors = decibels(rows["squared_error"])
        metrics: dict[str, Any] = {}
        for key, column in {"psnr": errors, **rows}.items():
            if key in ("psnr", "ssim", "lpips_alex", "lpips_vgg"):
                metrics[key], metrics[f"{key}_spread"] = mean_and_spread(column)
        if (rows["pixels"] == rows["pixels"][0]).all():
            groups = rows["truncated_squared_error"].split(LEGACY_GROUP)
            metrics["psnr_legacy"] = mean_and_spread(decibels(torch.stack([group.mean() for group in groups])))[0]
        if "file_bits" in rows:
            metrics["file_bytes"] = float(rows["file_bits"].mean()) / 8
        if "channel_ssim" in rows:
            columns = {"psnr": decibels(rows["channel_squared_error"]), "ssim": rows["channel_ssim"]}
            for key, column in columns.items():
                metrics[f"{key}_of_channels"] = tuple(mean_and_spread(channel)[0] for channel in column.T)
        if network is not None and "originals" in rows:
            metrics |= {"feature_network": network.name, "is_fid": network.is_fid}
            originals, results = rows["originals"], rows["results"]
            try:
                metrics["frechet_distance"], metrics["frechet_bias"] = distance_and_bias(originals, results)
                metrics["kernel_distance"] = kernel_distance(originals, results, paired=True)
            except StatisticsError as error:
                metrics["missing"] = f"no distances of features: {error}"
        if len(measurement.usage):
            shares = measurement.usage.double() / measurement.usage.sum()
            metrics["id_count"] = len(shares)
            metrics["ids_used"] = float((shares > 0).double().mean())
            metrics["id_entropy"] = float(torch.special.entr(shares).sum() / math.log(2))
        return cls(
            name=name,
            images=len(rows["bits"]),
            bits_per_pixel=float((rows["bits"] / rows["pixels"]).mean()),
            bytes_per_image=float(rows["bits"].mean()) / 8,
            equal_images=int(errors.isinf().sum()),
            ssim_legacy=float(rows["truncated_ssim"].mean()),
            unreadable=measurement.unreadable,
            **metrics,
        )


def notes(rows: Sequence[Summary]) -> list[str]:
    """Return notes on how to compare the rows."""

    def listed(key: str, digits: int) -> str:
        values = ((row.name, getattr(row, key)) for row in rows)
        return ", ".join(f"{name} {value:.{digits}f}" for name, value in values if value is not None)

    first = rows[0]
    lines = [
        f"{first.images} images; ± is the standard deviation over images, not an error of the mean.",
        "PSNR is the mean over images of 8-bit pixels.",
    ]
    if first.psnr_legacy is not None:
        lines[-1] += (
            " The release takes five images at once and truncates pixels to 8 bits; that gives "
            f"{listed('psnr_legacy', 2)}. SSIM of truncated images: {listed('ssim_legacy', 4)}."
        )
    if first.frechet_distance is not None:
        lines.append(
            f"Distances of features: {first.feature_network}. A Fréchet distance of few images is biased upwards; "
            "half-sets give an estimate of the bias. The kernel distance is unbiased. Compare at equal counts only."
        )
    for row in rows:
        lines += [f"{row.name}: {row.missing}"] if row.missing else []
        lines += [f"{row.name}: {row.equal_images} images equal their originals."] if row.equal_images else []
        lines += [f"{row.name}: {row.unreadable} images left out: unreadable or too small."] if row.unreadable else []
    return lines


def mean_and_spread(values: Tensor) -> tuple[float | None, float | None]:
    """Mean and standard deviation of all values but infinite ones; ``None`` if there are no others."""
    values = values[~values.isinf()]
    return (float(values.mean()), float(values.std(correction=0))) if len(values) else (None, None)
