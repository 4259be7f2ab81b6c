"""The metrics of one candidate from its measurement: means over images, rFID and use of ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Summary:
    """Means over images; a ``…_spread`` is the standard deviation over images. ``None`` if not measured.

    Attributes:
        bytes_per_picture: of packed ids, or of a codec's file.
        file_bytes: of the full file.
        psnr: dB, over the images that differ from their originals; ``equal_pictures`` do not.
        psnr_legacy: the release's: of five images at once, truncated to 8 bits; ``None`` for mixed sizes.
        ssim_legacy: the release's: of images truncated to 8 bits instead of rounded.
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
    pictures: int
    bits_per_pixel: float
    bytes_per_picture: float
    psnr: float | None
    psnr_spread: float | None
    equal_pictures: int
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
        """Summarize a measurement, whose features come from ``network``."""
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
        if network is not None:
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
            pictures=len(rows["bits"]),
            bits_per_pixel=float((rows["bits"] / rows["pixels"]).mean()),
            bytes_per_picture=float(rows["bits"].mean()) / 8,
            equal_pictures=int(errors.isinf().sum()),
            ssim_legacy=float(rows["truncated_ssim"].mean()),
            unreadable=measurement.unreadable,
            **metrics,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For a terminal, one metric per line."""

        def spread(value: float | None) -> str:
            return "" if value is None else f"± {value:.3g} over images"

        def legacy(value: float | None, digits: int) -> str:
            return "" if value is None else f"; as the release: {value:.{digits}f}"

        def each(values: Sequence[float | None], digits: int) -> str:
            return "".join(f" {value:.{digits}f}" if value is not None else " equal" for value in values)

        channels = [("PSNR of channels", self.psnr_of_channels, 2), ("SSIM of channels", self.ssim_of_channels, 4)]
        equal = f", {self.equal_pictures} equal their originals" if self.equal_pictures else ""
        distance, kernel = ("rFID", "rKID") if self.is_fid else ("Fréchet distance", "kernel distance")
        bias = "" if self.frechet_bias is None else f"of which about {self.frechet_bias:.2f} for so few images; "
        ids = f"% of {self.id_count} used, {self.id_entropy or 0:.2f} bits an id"
        rows = (
            ("bits per pixel", self.bits_per_pixel, 4, f"{self.bytes_per_picture:.1f} bytes an image"),
            ("bytes a file", self.file_bytes, 1, "header included"),
            ("PSNR", self.psnr, 2, f"dB {spread(self.psnr_spread)}{equal}{legacy(self.psnr_legacy, 2)}"),
            ("SSIM", self.ssim, 4, spread(self.ssim_spread) + legacy(self.ssim_legacy, 4)),
            ("LPIPS (AlexNet)", self.lpips_alex, 4, spread(self.lpips_alex_spread)),
            ("LPIPS (VGG)", self.lpips_vgg, 4, spread(self.lpips_vgg_spread)),
            (distance, self.frechet_distance, 2, f"{bias}{self.feature_network}"),
            (kernel, self.kernel_distance, 5, "unbiased"),
            ("ids", None if self.ids_used is None else 100 * self.ids_used, 1, ids),
        )
        notes = [f"{name:16}{each(values, digits)}" for name, values, digits in channels if values]
        notes += [self.missing] if self.missing else []
        if self.unreadable:
            notes.append(f"{self.unreadable} images left out: unreadable or too small")
        return [*table_lines(rows, 16), *notes]


def table_lines(rows: Sequence[tuple[str, float | None, int, str]], width: int) -> list[str]:
    """Format rows (name, value, digits, note) for a terminal; rows without a value are left out."""
    return [
        f"{name:{width}} {value:.{digits}f}".ljust(width + 12) + note
        for name, value, digits, note in rows
        if value is not None
    ]


def mean_and_spread(values: Tensor) -> tuple[float | None, float | None]:
    """Mean and standard deviation of all values but infinite ones; ``None`` if there are no others."""
    values = values[~values.isinf()]
    return (float(values.mean()), float(values.std(correction=0))) if len(values) else (None, None)
