"""How close the pictures that a tokenizer makes come to the originals, under the paper's protocol (section 4.1)."""

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

from flowmo.checkpoint import files as checkpoint
from flowmo.checkpoint.pth import PthError, read_pth
from flowmo.codec.file import Codec
from flowmo.data import DataError, Source, evenly_spread
from flowmo.distributed import World
from flowmo.errors import FlowMoError
from flowmo.evaluate.measurement import COLUMNS, Measurement
from flowmo.evaluate.metrics.features import AT_ONCE, FeatureNetwork, build_features, features_of, in_one_shape
from flowmo.evaluate.metrics.pairs import squared_error, ssim
from flowmo.images import ImageError, Tiling, resize_and_crop, to_bytes, to_pil, to_tensor
from flowmo.losses.perceptual import LPIPS, WeightsNotFoundError
from flowmo.model.sampler import image_seed
from flowmo.tokenizer import Codes, FlowMo

SAVE_SECONDS = 60
WHOLE = "measured.pt"


class EvaluationError(DataError):
    """An evaluation that would mean nothing; the message says why."""


class Reconstruction(NamedTuple):
    """What pictures were made into: images b 3 h w in [−1, 1]; the bits that each took, b; their ids, if any; the bits
    of each as a file, b, where it would be one."""

    images: Tensor
    bits: Tensor
    ids: Tensor | None = None
    file_bits: Tensor | None = None


class Reconstructor(Protocol):
    """Anything that makes pictures into few bits and back: a FlowMo, another tokenizer, a codec.

    Attributes:
        name: as in a table's row.
        id_count: ids run from 0 to ``id_count`` − 1; ``None`` where there are none.
    """

    @property
    def name(self) -> str: ...

    @property
    def id_count(self) -> int | None: ...

    def reconstruct(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        """Pictures b 3 h w in [−1, 1], on the CPU; ``indices``, theirs in their source, seed what is random."""


@dataclass
class FlowMoReconstructor:
    """A FlowMo with its sampling settings, as a ``Reconstructor``; images of another size go through ``encode_image``.

    With a ``codec`` the files that images would be are measured too. ``bits_per_pixel`` is as in ``FlowMo.encode``.
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
        side = self.tokenizer.config.data.image_size
        if images.shape[-2:] != (side, side) or self.tokenizer.native_size:
            return self._one_by_one(images, seeds)
        codes = self.tokenizer.encode(images)
        pictures = self.tokenizer.decode(codes, self.steps, seeds, guidance=self.guidance, noise_scale=self.noise_scale)
        tiling, parts = Tiling(side, side, side), []
        if self.codec is not None:
            parts = [replace(codes, ids=ids[None], tiling=tiling) for ids in codes.ids]
        bits = torch.full((len(images),), codes.bits / len(codes))
        return Reconstruction(pictures, bits, codes.ids, self._file_bits(parts))

    def _file_bits(self, codes: Sequence[Codes]) -> Tensor | None:
        if self.codec is None:
            return None
        return torch.tensor([8.0 * len(self.codec.pack(one)) for one in codes])

    def _one_by_one(self, images: Tensor, seeds: Sequence[int]) -> Reconstruction:
        encode = partial(self.tokenizer.encode_image, bits_per_pixel=self.bits_per_pixel)
        codes = [encode(to_pil(image)) for image in images]
        pictures = [
            to_tensor(self.tokenizer.decode_image(code, self.steps, seed, guidance=self.guidance))
            for code, seed in zip(codes, seeds, strict=True)
        ]
        ids = torch.cat([code.ids for code in codes]) if self.id_count else None
        bits = torch.tensor([float(code.bits) for code in codes])
        return Reconstruction(torch.stack(pictures), bits, ids, self._file_bits(codes))


@dataclass
class Evaluators:
    """The networks that compare pictures; each may be missing, and its figures are then.

    With ``remember`` the features of originals are kept, for judging many candidates on the same pictures.
    """

    lpips_alex: LPIPS | None = None
    lpips_vgg: LPIPS | None = None
    features: FeatureNetwork | None = None
    remember: bool = False
    _remembered: dict[bytes, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def find(cls, lpips: Sequence[str] = ("alex", "vgg"), features: str = "auto") -> tuple[Evaluators, list[str]]:
        """The judges of those names that can be had, and why each other one cannot.

        Args:
            features: see ``build_features``; or ``none``.
        """
        builders: dict[str, Callable[[], LPIPS | FeatureNetwork]] = {
            f"lpips_{net}": partial(LPIPS, net) for net in lpips
        }
        if features != "none":
            builders["features"] = partial(build_features, features)
        found: dict[str, Any] = {}
        missing = []
        for name, build in builders.items():
            try:
                found[name] = build()
            except (FlowMoError, WeightsNotFoundError) as error:
                missing.append(f"no {name.replace('_', ' ')}: {error}")
        return cls(**found), missing

    def to(self, device: torch.device) -> Evaluators:
        for network in (self.lpips_alex, self.lpips_vgg, self.features):
            if network is not None:
                network.to(device)
        return self

    def describe(self) -> dict[str, str]:
        """Names of those at hand."""
        named = {"lpips_alex": self.lpips_alex, "lpips_vgg": self.lpips_vgg, "features": self.features}
        return {key: network.name for key, network in named.items() if network is not None}

    @torch.no_grad()
    def judge(
        self, measurement: Measurement, places: Tensor, x: Tensor, result: Reconstruction, batch_size: int = AT_ONCE
    ) -> None:
        """Add images x, b 3 h w, and their reconstructions to a measurement. ``batch_size`` is that of the networks."""
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
        for name in ("lpips_alex", "lpips_vgg"):
            if getattr(self, name) is not None:
                values[name] = in_one_shape(getattr(self, name), x, y, batch_size=batch_size)
        if self.features is not None:
            originals = self._features_of_originals(self.features, x, batch_size)
            measurement.add_features(places, originals, features_of(self.features, y, batch_size).pooled)
        measurement.add(places, values, result.ids)

    def _features_of_originals(self, network: FeatureNetwork, x: Tensor, batch_size: int) -> Tensor:
        if not self.remember:
            return features_of(network, x, batch_size).pooled
        names = [hashlib.blake2b(row.numpy().tobytes()).digest() for row in to_bytes(x).cpu()]
        if not self._remembered.keys() >= set(names):
            self._remembered |= dict(zip(names, features_of(network, x, batch_size).pooled.cpu(), strict=True))
        return torch.stack([self._remembered[name] for name in names])


def truncated(images: Tensor) -> Tensor:
    """8 bits as the release takes them for PSNR and SSIM: 255·(x / 2 + 1/2) without its fraction."""
    return ((images.clamp(-1, 1) + 1) / 2 * 255.0).to(torch.uint8)


@dataclass
class Pace:
    """Seconds spent, in this process, with the candidate, with judging, and with reading pictures."""

    pictures: int = 0
    reconstructing: float = 0.0
    judging: float = 0.0
    reading: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """Pictures a second: of the candidate alone, of the evaluator without it, and of reading."""
        parts = {"reconstructing": self.reconstructing, "judging": self.judging, "reading": self.reading}
        return {f"{name}_per_second": self.pictures / seconds for name, seconds in parts.items() if seconds}

    def timed(self, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        setattr(self, part, getattr(self, part) + time.perf_counter() - start)
        return result


def tell_unreadable(message: str) -> None:
    """Name an image that is left out, on standard error."""
    print(f"left out: {message}", file=sys.stderr, flush=True)


def measure(
    candidate: Reconstructor,
    source: Source,
    side: int | None,
    judges: Evaluators,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    world: World = World(),
    enlarge: bool = False,
    folder: Path | None = None,
    facts: Mapping[str, Any] | None = None,
    pace: Pace | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_unreadable: Callable[[str], None] = tell_unreadable,
) -> Measurement:
    """Make images into bits and back, and compare them with the originals.

    All processes call this together and share the pictures; each has the whole result.

    Args:
        side: short side that images are resized to, before the central square is cut; ``None`` takes every image whole,
            at its own size, one at a time.
        limit: this many pictures only, spread evenly over the source.
        device: where the judges are.
        enlarge: take pictures smaller than ``side`` too.
        folder: where what is measured is kept while it grows; the same call goes on from there, on any number of
            processes.
        facts: what else the result depends on, such as the steps and the seed; the folder is refused to another.
        progress: called with (pictures done, pictures in all), both of this process.
        on_unreadable: called with the error message of each image that this process cannot read. It is left out of
            all metrics alike: it is not ``done`` in the result. By default it is named on standard error.

    Raises:
        DataError: no pictures.
        EvaluationError: none of them can be read, one is smaller than the crop, or a folder with another evaluation in
            it.
    """
    pace = pace or Pace()
    chosen = torch.tensor(evenly_spread(limit or len(source), len(source)))
    channels = judges.features.channels if judges.features is not None else None
    identity = {
        "columns": COLUMNS,
        "candidate": candidate.name,
        "pictures": len(chosen),
        "of": len(source),
        "side": side,
    }
    parts = Parts(folder, json.dumps({**identity, **judges.describe(), **(facts or {})}, sort_keys=True), world)
    earlier = parts.take_over() or Measurement.empty(len(chosen), candidate.id_count, channels)
    mine = Measurement.empty(len(chosen), candidate.id_count, channels)
    todo = (~earlier.done).nonzero().flatten()[world.rank :: world.size]
    done = 0
    batch_size, network_batch = (batch_size, AT_ONCE) if side else (1, 1)
    for places in todo.split(batch_size) if len(todo) else ():
        indices = chosen[places].tolist()
        x, unreadable = pace.timed("reading", readable_crops, source, indices, side, enlarge)
        done += len(places)
        for message in unreadable.values():
            on_unreadable(message)
        readable = [i for i, index in enumerate(indices) if index not in unreadable]
        if not readable:
            continue
        places, indices = places[readable], [indices[i] for i in readable]
        result = pace.timed("reconstructing", candidate.reconstruct, x, indices)
        broken = ~result.images.isfinite().flatten(1).all(dim=1).cpu()
        if broken.any():
            name = source.name(indices[broken.nonzero()[0]])
            raise EvaluationError(f"{candidate.name} makes {name} into values that are not finite")
        pace.timed("judging", judges.judge, mine, places, x.to(device), result, network_batch)
        pace.pictures += len(places)
        parts.save_now_and_then(mine)
        if progress:
            progress(done, len(todo))
    whole = earlier.merge(mine.gather(world))
    parts.finish(whole)
    if not whole.done.any():
        raise EvaluationError(f"none of {len(chosen)} images can be read, such as {source.name(int(chosen[0]))}")
    return whole


def read_crops(source: Source, indices: Sequence[int], side: int | None, enlarge: bool = False) -> Tensor:
    """Central squares b 3 side side in [−1, 1], or one whole image; see ``measure``.

    Raises:
        ImageError: an image cannot be read.
    """
    crops, unreadable = readable_crops(source, indices, side, enlarge)
    for message in unreadable.values():
        raise ImageError(message)
    return crops


def readable_crops(
    source: Source, indices: Sequence[int], side: int | None, enlarge: bool = False
) -> tuple[Tensor, dict[int, str]]:
    """Central squares b 3 side side of the images that can be read, and by index the error of each other one.

    Without a ``side`` the one image of ``indices`` is taken whole.
    """
    crops, unreadable = [], {}
    for index in indices:
        try:
            picture = source.read(index)
        except ImageError as error:
            unreadable[index] = str(error)
            continue
        if side is None:
            crops.append(to_tensor(picture))
            continue
        if min(picture.size) < side and not enlarge:
            raise EvaluationError(
                f"{source.name(index)} is {picture.width}×{picture.height}, smaller than the crop of {side}×{side}; "
                "leave it out, or enlarge such pictures knowingly"
            )
        crops.append(to_tensor(resize_and_crop(picture, side)))
    return torch.stack(crops) if crops else torch.empty(0, 3, side or 0, side or 0), unreadable


class Parts:
    """What the processes of an evaluation have measured, in a folder: one file each, and one of what they took over.

    Nothing is counted twice, wherever a process is killed: a part that the whole already holds is left out.
    """

    def __init__(self, folder: Path | None, identity: str, world: World):
        self.folder, self.identity, self.world = folder, identity, world
        self.saved = time.monotonic()

    def take_over(self) -> Measurement | None:
        """All that is there, which the main process then keeps as one file; ``None`` where nothing is."""
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = None
        for path in sorted(self.folder.glob("*.pt"), key=lambda path: path.name != WHOLE):
            part = self._read(path)
            if whole is None:
                whole = part
            elif not (whole.done & part.done).any():
                whole = whole.merge(part)
        self.world.barrier()  # until all have read, before one removes
        if whole is not None:
            self.finish(whole)
        return whole

    def _read(self, path: Path) -> Measurement:
        try:
            content = read_pth(path)
            identity, state = content["identity"], content["measurement"]
        except (PthError, KeyError) as error:
            raise EvaluationError(f"{path}: not part of an evaluation ({' '.join(str(error).split())[:100]})") from None
        if identity != self.identity:
            raise EvaluationError(f"{self.folder} holds another evaluation; name an empty folder, or remove it")
        return Measurement.from_state(state)

    def _write(self, path: Path, measurement: Measurement) -> None:
        content = {"identity": self.identity, "measurement": measurement.state()}
        checkpoint.write_whole(path, lambda temporary: torch.save(content, temporary))

    def save_now_and_then(self, measurement: Measurement) -> None:
        """Once a minute."""
        if self.folder is not None and time.monotonic() - self.saved > SAVE_SECONDS:
            self._write(self.folder / f"part-{self.world.rank:05d}.pt", measurement)
            self.saved = time.monotonic()

    def finish(self, whole: Measurement) -> None:
        """Keep the whole in the place of its parts."""
        if self.folder is not None and self.world.main:
            self._write(self.folder / WHOLE, whole)
            for path in self.folder.glob("part-*.pt"):
                path.unlink()
        self.world.barrier()
