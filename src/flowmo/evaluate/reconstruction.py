"""Evaluation of reconstructions: a candidate encodes and decodes images, and evaluators compare (section 4.1)."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from flowmo.codec.file import Codec
from flowmo.data import Source, evenly_spread
from flowmo.distributed import World
from flowmo.errors import FlowMoError
from flowmo.evaluate.measurement import EvaluationError, Measurement, in_parts, read_parts, write_part
from flowmo.evaluate.metrics import build_features
from flowmo.evaluate.metrics.features import BATCH, FeatureNetwork, in_fixed_batches
from flowmo.evaluate.metrics.pairs import per_channel, squared_error, ssim
from flowmo.images import ImageError, resize_and_crop, size_of, to_bytes, to_tensor
from flowmo.images.pixels import PixelFormat
from flowmo.losses.perceptual import LPIPS
from flowmo.model.autoencoder import RateError
from flowmo.model.sampler import image_seed
from flowmo.model.tiling import LARGEST, Tiling
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
    """Encodes and decodes images: a FlowMo, another tokenizer or a codec. Without ids its ``id_count`` is ``None``."""

    name: str
    id_count: int | None

    def reconstruct(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        """Reconstruct images b × c × h × w in [−1, 1] on the CPU. Their dataset ``indices`` seed random draws."""


@dataclass
class FlowMoReconstructor:
    """A FlowMo with its sampling settings. A ``codec`` also measures the size of files.

    Images that are not of the model's size go through ``encode_image``.
    """

    tokenizer: FlowMo
    steps: int | None = None
    seed: int = 0
    guidance: float | None = None
    name: str = "FlowMo"
    codec: Codec | None = None
    noise_scale: float = 1.0
    bits_per_pixel: float | None = None
    id_count: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.id_count = self.tokenizer.quantizer.id_count

    def reconstruct(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        seeds = [image_seed(self.seed, index) for index in indices]
        tokenizer, config = self.tokenizer, self.tokenizer.config
        height, width = images.shape[-2:]
        one_batch = height == width == config.data.image_size
        if tokenizer.native_size:
            patch = config.model.patch_size
            # larger images are decoded in blocks, as by decode_image
            one_batch = height % patch == 0 == width % patch and max(height, width) <= LARGEST * patch
        settings: dict[str, Any] = {"guidance": self.guidance, "noise_scale": self.noise_scale}
        if one_batch:
            batch = tokenizer.encode(images, self.bits_per_pixel)
            decoded = tokenizer.decode(batch, self.steps, seeds, **settings)
            tiling = None if tokenizer.native_size else Tiling(height, width, height)
            codes = [replace(batch[[i]], tiling=tiling) for i in range(len(batch))]
        else:
            codes = [tokenizer.encode_image(image, bits_per_pixel=self.bits_per_pixel) for image in images]
            pairs = zip(codes, seeds, strict=True)
            decoded = torch.stack([tokenizer.decode_tensor(c, self.steps, seed, **settings) for c, seed in pairs])
        ids = torch.cat([code.ids for code in codes]) if self.id_count else None
        bits = torch.tensor([float(code.bits) for code in codes])
        files = [] if self.codec is None else [8.0 * len(self.codec.pack(code)) for code in codes]
        return Reconstruction(decoded, bits, ids, torch.tensor(files) if files else None)


class Evaluators(nn.Module):
    """The networks that compare images. A metric without its network is skipped."""

    cache_originals = False
    """Keep the features of originals, to evaluate several candidates on the same images."""

    def __init__(
        self, lpips_alex: LPIPS | None = None, lpips_vgg: LPIPS | None = None, features: FeatureNetwork | None = None
    ):
        super().__init__()
        self.lpips_alex, self.lpips_vgg, self.features = lpips_alex, lpips_vgg, features
        self._cache: dict[bytes, Tensor] = {}

    @classmethod
    def find(
        cls, lpips: Sequence[str] = ("alex", "vgg"), features: str = "auto", download: bool = True
    ) -> tuple[Evaluators, list[str]]:
        """Build the networks of these names. Returns also a message for each that cannot be built.

        Args:
            features: see ``build_features``; or ``none``.
            download: allow downloads of missing weights of LPIPS.
        """
        build_lpips = partial(LPIPS, download=download)
        builders: dict[str, Callable[[], Any]] = {f"lpips_{net}": partial(build_lpips, net) for net in lpips}
        if features != "none":
            builders["features"] = partial(build_features, features)
        found, missing = {}, []
        for name, build in builders.items():
            try:
                found[name] = build()
            except FlowMoError as error:
                missing.append(f"no {name.replace('_', ' ')}: {error}")
        return cls(**found), missing

    def describe(self) -> dict[str, str]:
        return {key: network.name for key, network in self.named_children()}

    @torch.no_grad()
    def compare(
        self, x: Tensor, result: Reconstruction, batch_size: int = BATCH, pixels: PixelFormat = PixelFormat()
    ) -> dict[str, Tensor]:
        """Compare images x, b × c × h × w, with their reconstructions. Returns columns of a ``Measurement``.

        Args:
            batch_size: of the networks.
            pixels: which channels the networks see. If there are 2 or more than 3, metrics are also taken of each.
        """
        y = result.images.to(x.device)
        original8, reconstructed8 = to_bytes(x), to_bytes(y)
        rows = {
            "bits": result.bits,
            "pixels": torch.full((len(x),), float(x.shape[-2] * x.shape[-1])),
            "squared_error": squared_error(original8, reconstructed8),
            "truncated_squared_error": squared_error(truncated(x), truncated(y)),
            "ssim": ssim(original8, reconstructed8),
            "truncated_ssim": ssim(truncated(x), truncated(y)),
        }
        if result.file_bits is not None:
            rows["file_bits"] = result.file_bits
        if pixels.channels not in (1, 3):
            rows["channel_squared_error"] = per_channel(squared_error, original8, reconstructed8)
            rows["channel_ssim"] = per_channel(ssim, original8, reconstructed8)
        x, y = pixels.visible(x), pixels.visible(y)
        for name, network in self.named_children():
            if name != "features":
                rows[name] = in_fixed_batches(network, x, y, batch_size=batch_size)
        rows = {name: column.cpu().double() for name, column in rows.items()}
        if self.features is not None:
            rows["originals"] = self._features_of_originals(self.features, x, batch_size)
            rows["results"] = in_fixed_batches(self.features, y, batch_size=batch_size).pooled.float().cpu()
        return rows

    def _features_of_originals(self, network: FeatureNetwork, x: Tensor, batch_size: int) -> Tensor:
        key = hashlib.blake2b(x.cpu().numpy().tobytes()).digest()
        pooled = self._cache.get(key)
        if pooled is None:
            pooled = in_fixed_batches(network, x, batch_size=batch_size).pooled.float().cpu()
        if self.cache_originals:
            self._cache[key] = pooled
        return pooled


def truncated(images: Tensor) -> Tensor:
    """Convert to 8 bits as the release does for PSNR and SSIM: 255·(x / 2 + 1/2), truncated instead of rounded."""
    return ((images.clamp(-1, 1) + 1) / 2 * 255.0).to(torch.uint8)


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
    progress: Callable[[int, int], None] | None = None,
    on_unreadable: Callable[[str], None] = print_unreadable,
    pixels: PixelFormat = PixelFormat(),
) -> Measurement:
    """Reconstruct images and compare them with the originals.

    All ranks call this together and split the images. Each returns the complete result, but only rank 0 its features.

    Args:
        side: resize the short side to this and cut the central square; ``None`` takes each image at its own size, in a
            batch of one.
        limit: use this many images, spread evenly over the source.
        device: of the evaluators.
        enlarge: accept images smaller than ``side``.
        folder: keep measurements here. The same call resumes from them, on any number of ranks.
        metadata: other settings of the result, such as steps and seed. A folder with other metadata is refused.
        progress: callback with (images done, images in total) of this rank.
        on_unreadable: callback with the error message of each unreadable or too small image of this rank. Such an image
            has no row in the result.
        pixels: channels and values of the images.

    Raises:
        EvaluationError: no image can be used, one has a reconstruction that is not finite, or the folder holds another
            evaluation.
    """
    chosen = evenly_spread(limit or len(source), len(source))
    names = hashlib.sha256("\n".join(map(source.name, chosen)).encode(errors="surrogateescape")).hexdigest()
    identity = {"version": 4, "candidate": candidate.name, "images": len(chosen), "of": len(source), "names": names}
    identity |= {"side": side, "enlarge": enlarge, **evaluators.describe(), **(metadata or {})}
    identity |= {} if pixels.is_rgb else {"pixels": str(pixels)}
    key = json.dumps(identity, sort_keys=True)
    earlier = [part if world.main else part.without_features() for part in (read_parts(folder, key) if folder else ())]
    world.barrier()  # no rank writes a file that another still reads
    changed = world.broadcast(_changed(earlier, source) if world.main else "")
    if changed:
        raise EvaluationError(f"{changed} has changed since {folder} was written. Remove that folder.")
    done = {index for part in earlier for index in part.rows["index"].tolist()}
    remaining = [index for index in chosen if index not in done][world.rank :: world.size]
    batch_size, network_batch = (batch_size, BATCH) if side else (1, 1)  # whole images differ in size

    def batches() -> Iterator[Measurement]:
        for start in range(0, len(remaining), batch_size):
            indices = remaining[start : start + batch_size]
            unreadable: dict[int, str] = {}
            x = read_crops(source, indices, side, enlarge, pixels, unreadable)
            for reason in unreadable.values():
                on_unreadable(reason)
            indices = [index for index in indices if index not in unreadable]
            if indices:
                try:
                    result = candidate.reconstruct(x, indices)
                except (EvaluationError, ImageError, RateError) as error:
                    more = f" and {len(indices) - 1} more" if len(indices) > 1 else ""
                    name = source.name(indices[0])
                    raise EvaluationError(f"{candidate.name} cannot reconstruct {name}{more}: {error}") from None
                finite = result.images.isfinite().flatten(1).all(dim=1).tolist()
                if not all(finite):
                    name = source.name(indices[finite.index(False)])
                    raise EvaluationError(f"{candidate.name} reconstructs {name} with values that are not finite.")
                columns = evaluators.compare(x.to(device), result, network_batch, pixels)
                ids = torch.empty(0, dtype=torch.int64) if result.ids is None else result.ids.flatten().cpu()
                usage = torch.bincount(ids, minlength=candidate.id_count or 0)
                kept = {"index": torch.tensor(indices)}
                for name, number in VERSIONS.items() if folder else ():
                    kept[name] = torch.tensor([number(source, index) for index in indices])
                yield Measurement(kept | columns, usage)
            if progress:
                progress(min(start + batch_size, len(remaining)), len(remaining))

    mine = []
    for part in in_parts(batches()):
        mine.append(part)
        if folder:
            write_part(folder, key, part)
    every, measured = earlier + [part for parts in world.gather(mine) for part in parts], None
    if every and world.main:
        measured = Measurement.join([part.rows for part in every], torch.stack([part.usage for part in every]).sum(0))
        measured.unreadable = len(chosen) - len(measured.rows["index"])
        for name in VERSIONS:
            measured.rows.pop(name, None)
    shared = world.broadcast(measured.without_features() if measured else None)
    if shared is None:
        raise EvaluationError(f"None of the {len(chosen)} images can be used.")
    return measured or shared


def _number(data: bytes) -> int:
    """Hash bytes to 63 bits."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def _version(source: Source, index: int) -> int:
    return _number(source.version(index).encode())


def _content(source: Source, index: int) -> int:
    try:
        file = source.file(index)
        return _number(file.read_bytes() if isinstance(file, Path) else file.read())
    except (ImageError, OSError):  # it is gone
        return 0


VERSIONS = {"version": _version, "content": _content}
"""Columns of kept rows by which a replaced image is found."""


def _changed(parts: Sequence[Measurement], source: Source) -> str:
    """Return the name of an image that was replaced after its measurement. A copy with the same content is none."""
    for part in parts:
        columns = (part.rows[name].tolist() for name in ("index", "version", "content"))
        for index, version, content in zip(*columns, strict=True):
            if version != _version(source, index) and content != _content(source, index):
                return source.name(index)
    return ""


def read_crops(
    source: Source,
    indices: Sequence[int],
    side: int | None,
    enlarge: bool = False,
    pixels: PixelFormat = PixelFormat(),
    unreadable: dict[int, str] | None = None,
) -> Tensor:
    """Read central squares b × c × side × side in [−1, 1]. Without a ``side``, read one image that is not cropped.

    Args:
        unreadable: receives {index: error} of images that cannot be used, which are left out.

    Raises:
        ImageError: an image cannot be used, and there is no ``unreadable``.
    """
    crops = []
    for index in indices:
        try:
            image = source.read(index, pixels=pixels)
            width, height = size_of(image)
            size = f"{source.name(index)} is {width}×{height}"
            if side and min(width, height) < side and not enlarge:
                raise ImageError(f"{size}, smaller than the crop of {side}×{side}. --enlarge takes such images.")
            if side is None and min(width, height) < SMALLEST_WHOLE:
                raise ImageError(f"{size}. Metrics need at least {SMALLEST_WHOLE} pixels a side.")
            crops.append(to_tensor(resize_and_crop(image, side, source.name(index)) if side else image))
        except ImageError as error:
            if unreadable is None:
                raise
            unreadable[index] = str(error)
    return torch.stack(crops) if crops else torch.empty(0, pixels.channels, side or 0, side or 0)
