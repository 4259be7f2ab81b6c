"""The metrics of one candidate from its measurement: means over images, rFID and use of ids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flowmo.evaluate.measurement import Measurement
from flowmo.evaluate.metrics.features import FeatureNetwork
from flowmo.evaluate.metrics.fid import StatisticsError, distance_and_bias
from flowmo.evaluate.metrics.pairs import decibels
from flowmo.evaluate.metrics.sets import kernel_distance

Columns = Sequence[tuple[str, str, int]]
"""Attribute of a summary, heading, and digits."""
COLUMNS: Columns = (
    ("bits_per_pixel", "bits/pixel", 4),
    ("bytes_per_image", "bytes", 1),
    ("file_bytes", "bytes, file", 1),
    ("frechet_distance", "rFID ↓", 2),
    ("frechet_bias", "bias of few images", 2),
    ("kernel_distance", "rKID ↓", 5),
    ("psnr", "PSNR ↑", 2),
    ("psnr_of_channels", "PSNR of channels ↑", 2),
    ("ssim", "SSIM ↑", 4),
    ("ssim_of_channels", "SSIM of channels ↑", 4),
    ("lpips_alex", "LPIPS Alex ↓", 4),
    ("lpips_vgg", "LPIPS VGG ↓", 4),
    ("ids_used", "ids used", 3),
    ("id_entropy", "bits/id", 3),
)
WITHOUT_INCEPTION = {
    **dict.fromkeys(("rFID ↓", "FID ↓"), "Fréchet distance ↓"),
    **dict.fromkeys(("rKID ↓", "KID ↓"), "kernel distance ↓"),
    "sFID ↓": "spatial Fréchet ↓",
}
"""Headings of the distances of another network's features."""
LEGACY_GROUP = 5
"""The release takes the PSNR of this many images at once."""


@dataclass(frozen=True)
class Summary:
    """Means over images; a ``…_spread`` is the standard deviation over images. ``None`` if not measured.

    Attributes:
        bytes_per_image: of packed ids, or of a codec's file.
        file_bytes: of the full file.
        psnr: dB, over the images that differ from their originals; ``equal_images`` counts the others.
        psnr_legacy: as the release, of five images at once, truncated to 8 bits; ``None`` for mixed sizes.
        ssim_legacy: as the release, of images truncated to 8 bits instead of rounded.
        frechet_distance: of the features of ``feature_network``; the rFID if ``is_fid``.
        frechet_bias: estimated excess due to few images.
        kernel_distance: unbiased; the rKID if ``is_fid``.
        missing: why distances of features are missing.
        unreadable: number of images that cannot be read and are in no metric.
        ids_used: share of the vocabulary that occurs.
        id_entropy: entropy of the id frequencies, in bits per id.
        psnr_of_channels, ssim_of_channels: means of each channel, for images of 2 or of more than 3 channels.
    """

    name: str
    images: int
    bits_per_pixel: float
    bytes_per_image: float
    psnr: float | None
    psnr_spread: float | None
    equal_images: int
    ssim: float
    ssim_spread: float
    psnr_legacy: float | None = None
    lpips_alex: float | None = None
    lpips_alex_spread: float | None = None
    lpips_vgg: float | None = None
    lpips_vgg_spread: float | None = None
    frechet_distance: float | None = None
    frechet_bias: float | None = None
    kernel_distance: float | None = None
    feature_network: str | None = None
    is_fid: bool = False
    missing: str = ""
    id_count: int | None = None
    ids_used: float | None = None
    file_bytes: float | None = None
    id_entropy: float | None = None
    ssim_legacy: float | None = None
    unreadable: int = 0
    psnr_of_channels: tuple[float | None, ...] = ()
    ssim_of_channels: tuple[float | None, ...] = ()

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
            name,
            images=len(rows["bits"]),
            bits_per_pixel=float((rows["bits"] / rows["pixels"]).mean()),
            bytes_per_image=float(rows["bits"].mean()) / 8,
            equal_images=int(errors.isinf().sum()),
            ssim_legacy=float(rows["truncated_ssim"].mean()),
            unreadable=measurement.unreadable,
            **metrics,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def cells(self) -> dict[str, str]:
        """Heading and text of each metric."""
        return cells_of(self, COLUMNS)

    def lines(self) -> list[str]:
        """For a terminal, one metric per line."""
        return lines_of(self.cells())


def cells_of(summary: Any, columns: Columns) -> dict[str, str]:
    """Heading and text of each measured metric, with ± its spread. Only FID's network gives distances called FID."""
    cells = {}
    for key, heading, digits in columns:
        value, spread = getattr(summary, key), getattr(summary, f"{key}_spread", None)
        values = value if isinstance(value, tuple) else (value,)
        text = " ".join("equal" if each is None else f"{each:.{digits}f}" for each in values)
        heading = heading if summary.is_fid else WITHOUT_INCEPTION.get(heading, heading)
        if value is not None and value != ():
            cells[heading] = text if spread is None else f"{text} ± {spread:.{min(digits, 3)}f}"
    return cells


def lines_of(cells: Mapping[str, str]) -> list[str]:
    return [f"{heading:20} {text}" for heading, text in cells.items()]


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
