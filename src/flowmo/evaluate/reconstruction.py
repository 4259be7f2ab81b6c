"""Evaluation of reconstructions: a candidate encodes and decodes images, and evaluators compare (section 4.1)."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flowmo.codec.file import Codec
from flowmo.data import Source, evenly_spread
from flowmo.data.sources.base import read_as
from flowmo.distributed import World
from flowmo.errors import FlowMoError
from flowmo.evaluate.measurement import COLUMNS, EvaluationError, Measurement, MeasurementFolder
from flowmo.evaluate.metrics import build_features
from flowmo.evaluate.metrics.features import BATCH, FeatureNetwork, in_fixed_batches
from flowmo.evaluate.metrics.pairs import per_channel, squared_error, ssim
from flowmo.images import ImageError, Tiling, resize_and_crop, size_of, to_bytes, to_tensor
from flowmo.images.pixels import PixelFormat
from flowmo.losses.perceptual import LPIPS
from flowmo.model.sampler import image_seed
from flowmo.tokenizer import FlowMo

SMALLEST_WHOLE = 32
"""Pixels a side of the smallest image that every metric takes: AlexNet of LPIPS needs 31."""


class Reconstruction(NamedTuple):
    """Reconstructions of b images.

    Attributes:
        images: b × c × h × w in [−1, 1].
        bits: b, bits of each image's code.
        ids: the ids, if any.
        file_bits: b, bits of each image's file, if it has one.
    """

    images: Tensor
    bits: Tensor
    ids: Tensor | None = None
    file_bits: Tensor | None = None


class Reconstructor(Protocol):
    """Encodes and decodes images: a FlowMo, another tokenizer or a codec.

    Attributes:
        name: its name in tables.
        id_count: vocabulary size; ``None`` without ids.
    """

    @property
    def name(self) -> str: ...

    @property
    def id_count(self) -> int | None: ...

    def reconstruct(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        """Reconstruct images b × c × h × w in [−1, 1] on the CPU. Their dataset ``indices`` seed random draws."""


@dataclass
class FlowMoReconstructor:
    """A FlowMo with its sampling settings, as a ``Reconstructor``; images of another size go through ``encode_image``.

    Attributes:
        codec: measures the size of files too.
        bits_per_pixel: as in ``FlowMo.encode_image``.
    """

    tokenizer: FlowMo
    steps: int | None = None
    seed: int = 0
    guidance: float | None = None
    name: str = "FlowMo"
    codec: Codec | None = None
    noise_scale: float = 1.0
    bits_per_pixel: float | None = None

    @property
    def id_count(self) -> int | None:
        return self.tokenizer.quantizer.id_count

    def reconstruct(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        seeds = [image_seed(self.seed, index) for index in indices]
        tokenizer, model = self.tokenizer, self.tokenizer.config
        height, width = images.shape[-2:]
        if tokenizer.native_size:
            together = height % model.model.patch_size == 0 == width % model.model.patch_size
        else:
            together = height == width == model.data.image_size
        if together:
            batch = tokenizer.encode(images, self.bits_per_pixel)
            decoded = tokenizer.decode(batch, self.steps, seeds, guidance=self.guidance, noise_scale=self.noise_scale)
            tiling = None if tokenizer.native_size else Tiling(height, width, height)
            codes = [replace(batch[[i]], tiling=tiling) for i in range(len(batch))]
        else:
            codes = [tokenizer.encode_image(image, bits_per_pixel=self.bits_per_pixel) for image in images]
            decode = partial(tokenizer.decode_tensor, guidance=self.guidance)
            pairs = zip(codes, seeds, strict=True)
            decoded = torch.stack([decode(code, self.steps, seed) for code, seed in pairs])
            decoded = to_bytes(decoded).float() / 127.5 - 1
        ids = torch.cat([code.ids for code in codes]) if self.id_count else None
        bits = torch.tensor([float(code.bits) for code in codes])
        files = [] if self.codec is None else [8.0 * len(self.codec.pack(code)) for code in codes]
        return Reconstruction(decoded, bits, ids, torch.tensor(files) if files else None)


@dataclass
class Evaluators:
    """The networks that compare images. Metrics of a missing network are missing too.

    Attributes:
        remember: keep the features of originals, to evaluate several candidates on the same images.
    """

    lpips_alex: LPIPS | None = None
    lpips_vgg: LPIPS | None = None
    features: FeatureNetwork | None = None
    remember: bool = False
    _remembered: dict[bytes, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def find(cls, lpips: Sequence[str] = ("alex", "vgg"), features: str = "auto") -> tuple[Evaluators, list[str]]:
        """Build the networks of these names. Returns also a message for each that cannot be built.

        Args:
            features: see ``build_features``; or ``none``.
        """
        builders: dict[str, Callable[[], Any]] = {f"lpips_{net}": partial(LPIPS, net) for net in lpips}
        if features != "none":
            builders["features"] = partial(build_features, features)
        found, missing = {}, []
        for name, build in builders.items():
            try:
                found[name] = build()
            except FlowMoError as error:
                missing.append(f"no {name.replace('_', ' ')}: {error}")
        return cls(**found), missing

    def networks(self) -> dict[str, LPIPS | FeatureNetwork]:
        named = {"lpips_alex": self.lpips_alex, "lpips_vgg": self.lpips_vgg, "features": self.features}
        return {key: network for key, network in named.items() if network is not None}

    def to(self, device: torch.device) -> Evaluators:
        for network in self.networks().values():
            network.to(device)
        return self

    def describe(self) -> dict[str, str]:
        return {key: network.name for key, network in self.networks().items()}

    @torch.no_grad()
    def evaluate(
        self,
        measurement: Measurement,
        positions: Tensor,
        x: Tensor,
        result: Reconstruction,
        batch_size: int = BATCH,
        pixels: PixelFormat = PixelFormat(),
    ) -> None:
        """Add images x, b × c × h × w, and their reconstructions to a measurement.

        Args:
            batch_size: of the networks.
            pixels: which channels the networks see.
        """
        y = result.images.to(x.device)
        ours, theirs = to_bytes(x), to_bytes(y)
        values = {
            "bits": result.bits,
            "pixels": torch.full((len(x),), float(x.shape[-2] * x.shape[-1])),
            "squared_error": squared_error(ours, theirs),
            "truncated_squared_error": squared_error(truncated(x), truncated(y)),
            "ssim": ssim(ours, theirs),
            "truncated_ssim": ssim(truncated(x), truncated(y)),
        }
        if result.file_bits is not None:
            values["file_bits"] = result.file_bits
        if measurement.channel_count:
            metrics = [per_channel(metric, ours, theirs) for metric in (squared_error, ssim)]
            measurement.add_channels(positions, torch.cat(metrics))
        x, y = pixels.visible(x), pixels.visible(y)
        for name, network in self.networks().items():
            if name != "features":
                values[name] = in_fixed_batches(network, x, y, batch_size=batch_size)
        if self.features is not None:
            originals = self._features_of_originals(self.features, x, batch_size)
            results = in_fixed_batches(self.features, y, batch_size=batch_size).pooled
            measurement.add_features(positions, originals, results)
        measurement.add(positions, values, result.ids)

    def _features_of_originals(self, network: FeatureNetwork, x: Tensor, batch_size: int) -> Tensor:
        if not self.remember:
            return in_fixed_batches(network, x, batch_size=batch_size).pooled
        keys = [hashlib.blake2b(row.numpy().tobytes()).digest() for row in to_bytes(x).cpu()]
        if not self._remembered.keys() >= set(keys):
            pooled = in_fixed_batches(network, x, batch_size=batch_size).pooled.cpu()
            self._remembered |= dict(zip(keys, pooled, strict=True))
        return torch.stack([self._remembered[key] for key in keys])


def truncated(images: Tensor) -> Tensor:
    """Convert to 8 bits as the release does for PSNR and SSIM: 255·(x / 2 + 1/2), truncated instead of rounded."""
    return ((images.clamp(-1, 1) + 1) / 2 * 255.0).to(torch.uint8)


@dataclass
class Throughput:
    """Seconds of this process per part of an evaluation: ``reading``, ``reconstructing`` and ``judging``."""

    images: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        """Images per second of each part."""
        return {f"{part}_per_second": self.images / seconds for part, seconds in self.seconds.items() if seconds}

    def timed(self, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
        return result


def print_unreadable(message: str) -> None:
    """Report an image that is left out on standard error."""
    print(f"left out: {message}", file=sys.stderr, flush=True)


def measure(
    candidate: Reconstructor,
    source: Source,
    side: int | None,
    evaluators: Evaluators,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    world: World = World(),
    enlarge: bool = False,
    folder: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    throughput: Throughput | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_unreadable: Callable[[str], None] = print_unreadable,
    pixels: PixelFormat = PixelFormat(),
) -> Measurement:
    """Reconstruct images and compare them with the originals.

    All ranks call this together and share the images; each returns the complete result.

    Args:
        side: resize the short side to this and cut the central square; ``None`` takes each image at its own size, in a
            batch of one.
        limit: use this many images, spread evenly over the source.
        device: that of the evaluators.
        enlarge: accept images smaller than ``side``.
        folder: keep measurements here. The same call resumes from them, on any number of ranks.
        metadata: what else the result depends on, such as steps and seed. A folder with other metadata is refused.
        progress: callback with (images done, images in total) of this rank.
        on_unreadable: callback with the error message of each unreadable or too small image of this rank. Such an image
            is not ``done`` in the result and is in no metric.
        pixels: channels and values of the images.

    Raises:
        EvaluationError: no image can be used, one has a reconstruction that is not finite, or the folder holds another
            evaluation.
    """
    throughput = throughput or Throughput()
    chosen = torch.tensor(evenly_spread(limit or len(source), len(source)))
    identity = {"columns": COLUMNS, "candidate": candidate.name, "pictures": len(chosen), "of": len(source)}
    identity |= {"side": side, **evaluators.describe(), **(metadata or {})}
    identity |= {} if pixels.is_rgb else {"pixels": str(pixels)}
    files = MeasurementFolder(folder, json.dumps(identity, sort_keys=True), world)
    widths = getattr(evaluators.features, "channels", None), 0 if pixels.channels in (1, 3) else pixels.channels
    empty = partial(Measurement.empty, len(chosen), candidate.id_count, *widths)
    earlier, mine = files.resume() or empty(), empty()
    reason = ""
    remaining = (~earlier.done).nonzero().flatten()[world.rank :: world.size]
    done = 0
    batch_size, network_batch = (batch_size, BATCH) if side else (1, 1)
    for positions in remaining.split(batch_size) if len(remaining) else ():
        indices = chosen[positions].tolist()
        x, unreadable = throughput.timed("reading", readable_crops, source, indices, side, enlarge, pixels)
        done += len(positions)
        for reason in unreadable.values():
            on_unreadable(reason)
        readable = [i for i, index in enumerate(indices) if index not in unreadable]
        if not readable:
            continue
        positions, indices = positions[readable], [indices[i] for i in readable]
        result = throughput.timed("reconstructing", candidate.reconstruct, x, indices)
        finite = result.images.isfinite().flatten(1).all(dim=1).tolist()
        if not all(finite):
            name = source.name(indices[finite.index(False)])
            raise EvaluationError(f"{candidate.name} reconstructs {name} with values that are not finite.")
        throughput.timed("judging", evaluators.evaluate, mine, positions, x.to(device), result, network_batch, pixels)
        throughput.images += len(positions)
        files.save_periodically(mine)
        if progress:
            progress(done, len(remaining))
    merged = earlier.merge(mine.gather(world))
    files.finish(merged)
    if not merged.done.any():
        raise EvaluationError(f"None of {len(chosen)} images can be used. The last: {reason}")
    return merged


def read_crops(
    source: Source, indices: Sequence[int], side: int | None, enlarge: bool = False, pixels: PixelFormat = PixelFormat()
) -> Tensor:
    """Read central squares b × c × side × side in [−1, 1], or one full image. Raises ``ImageError``."""
    crops, unreadable = readable_crops(source, indices, side, enlarge, pixels)
    for message in unreadable.values():
        raise ImageError(message)
    return crops


def readable_crops(
    source: Source, indices: Sequence[int], side: int | None, enlarge: bool = False, pixels: PixelFormat = PixelFormat()
) -> tuple[Tensor, dict[int, str]]:
    """Read central squares b × c × side × side in [−1, 1]. Returns also {index: error} of images left out.

    Without a ``side``, the one image of ``indices`` is not cropped.
    """
    crops, unreadable = [], {}
    for index in indices:
        try:
            image = read_as(source, index, pixels)
            width, height = size_of(image)
            size = f"{source.name(index)} is {width}×{height}"
            if side and min(width, height) < side and not enlarge:
                raise ImageError(f"{size}, smaller than the crop of {side}×{side}. --enlarge takes such images.")
            if side is None and min(width, height) < SMALLEST_WHOLE:
                raise ImageError(f"{size}. Metrics need at least {SMALLEST_WHOLE} pixels a side.")
        except ImageError as error:
            unreadable[index] = str(error)
            continue
        crops.append(to_tensor(resize_and_crop(image, side) if side else image))
    return torch.stack(crops) if crops else torch.empty(0, pixels.channels, side or 0, side or 0), unreadable
