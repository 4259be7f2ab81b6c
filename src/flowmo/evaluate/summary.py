"""The figures of one candidate, out of its measurement."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from flowmo.evaluate.measurement import Measurement
from flowmo.evaluate.metrics.features import FeatureNetwork
from flowmo.evaluate.metrics.frechet import StatisticsError
from flowmo.evaluate.metrics.pairs import decibels

LEGACY_GROUP = 5
"""The release takes its PSNR of so many pictures at once."""


@dataclass(frozen=True)
class Summary:
    """Means over pictures, with standard deviations over pictures as spreads; ``None`` where not measured.

    Attributes:
        bytes_per_picture: of ids, packed; of a codec's budget.
        file_bytes: of whole files, whatever their coding.
        psnr: dB; of the pictures that are not equal to their originals, whose number is ``equal_pictures``.
        psnr_legacy: as the release computes it: of five images at once, truncated to 8 bits; ``None`` of mixed sizes.
        ssim_legacy: likewise of images truncated, not rounded, to 8 bits.
        frechet_distance: of the features of ``feature_network``; the rFID where that is FID's Inception.
        frechet_bias: by how much so few pictures overstate it, estimated.
        kernel_distance: unbiased; the KID where the network is FID's Inception.
        missing: why a figure is not there.
        unreadable: images that could not be read and are in no metric.
        ids_used: share of the ids that occur at all.
        id_entropy: bits an id, of their frequencies; at most the bits that an id takes.
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

    @classmethod
    def of(cls, name: str, measurement: Measurement, network: FeatureNetwork | None = None) -> Summary:
        """Summarize a measurement.

        Raises:
            StatisticsError: nothing was measured.
        """
        if not measurement.done.any():
            raise StatisticsError("no picture was measured")
        bits = measurement.column("bits")
        decibel = decibels(measurement.column("squared_error"))
        facts: dict[str, Any] = {}
        facts["psnr"], facts["psnr_spread"] = mean_and_spread(decibel[decibel.isfinite()])
        pixels = measurement.column("pixels")
        legacy = measurement.column("truncated_squared_error").split(LEGACY_GROUP)
        groups = decibels(measurement.column("truncated_squared_error").new_tensor([g.mean() for g in legacy]))
        if (pixels == pixels[0]).all():
            facts["psnr_legacy"] = mean_and_spread(groups[groups.isfinite()])[0]
        facts["ssim_legacy"] = mean_and_spread(measurement.column("truncated_ssim"))[0]
        in_files = mean_and_spread(measurement.column("file_bits"))[0]
        facts["file_bytes"] = None if in_files is None else in_files / 8
        for column in ("ssim", "lpips_alex", "lpips_vgg"):
            facts[column], facts[f"{column}_spread"] = mean_and_spread(measurement.column(column))
        if network is not None:
            facts |= {"feature_network": network.name, "is_fid": network.is_fid}
            try:
                facts["frechet_distance"], facts["frechet_bias"] = measurement.frechet()
                facts["kernel_distance"] = measurement.kernel()
            except StatisticsError as error:
                facts["missing"] = f"no distances of features: {error}"
        if len(measurement.usage):
            shares = measurement.usage.double() / measurement.usage.sum()
            facts["id_count"] = len(shares)
            facts["ids_used"] = float((shares > 0).double().mean())
            facts["id_entropy"] = -float((shares * shares.clamp(min=1e-300).log2()).sum())
        return cls(
            name,
            pictures=len(bits),
            bits_per_pixel=float((bits / pixels).mean()),
            bytes_per_picture=float(bits.mean()) / 8,
            equal_pictures=int(decibel.isinf().sum()),
            unreadable=int((~measurement.done).sum()),
            **facts,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For a terminal, a figure a line."""

        def row(name: str, value: float | None, places: int, note: str) -> list[str]:
            return [] if value is None else [f"{name:16} {value:.{places}f}".ljust(28) + note]

        def spread(value: float | None) -> str:
            return f"± {value:.3g} over pictures" if value is not None else ""

        def legacy(value: float | None, places: int) -> str:
            return f"; as the release: {value:.{places}f}" if value is not None else ""

        equal = f", {self.equal_pictures} equal their originals" if self.equal_pictures else ""
        distance, kernel = ("rFID", "rKID") if self.is_fid else ("Fréchet distance", "kernel distance")
        bias = f"of which about {self.frechet_bias or 0:.2f} for so few pictures; {self.feature_network}"
        ids = f"of {self.id_count} used, {self.id_entropy or 0:.2f} bits an id"
        return [
            *row("bits per pixel", self.bits_per_pixel, 4, f"{self.bytes_per_picture:.1f} bytes a picture"),
            *row("bytes a file", self.file_bytes, 1, "header included"),
            *row("PSNR", self.psnr, 2, f"dB {spread(self.psnr_spread)}{equal}{legacy(self.psnr_legacy, 2)}"),
            *row("SSIM", self.ssim, 4, spread(self.ssim_spread) + legacy(self.ssim_legacy, 4)),
            *row("LPIPS (AlexNet)", self.lpips_alex, 4, spread(self.lpips_alex_spread)),
            *row("LPIPS (VGG)", self.lpips_vgg, 4, spread(self.lpips_vgg_spread)),
            *row(distance, self.frechet_distance, 2, bias),
            *row(kernel, self.kernel_distance, 5, "unbiased"),
            *row("ids", None if self.ids_used is None else 100 * self.ids_used, 1, f"% {ids}"),
            *([self.missing] if self.missing else []),
            *([f"{self.unreadable} images cannot be read and are in no metric"] if self.unreadable else []),
        ]


def mean_and_spread(values: Tensor) -> tuple[float | None, float | None]:
    """Mean and standard deviation, ``None`` of no values."""
    if not len(values):
        return None, None
    mean = math.fsum(values.tolist()) / len(values)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values.tolist()) / len(values))
