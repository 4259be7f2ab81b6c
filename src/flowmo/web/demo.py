"""The operations behind ``flowmo demo``, without a user interface; ``page.py`` builds the web page on them.

Every request is bounded: image pixels, samples and kept files here, upload bytes and sampling steps on the page.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from flowmo.codec.file import Codec, CodecError
from flowmo.data.bits import packed_size
from flowmo.errors import FlowMoError
from flowmo.evaluate.codecs import FORMATS, CodecMissingError, CodecReconstructor
from flowmo.evaluate.metrics.pairs import heat_map, psnr
from flowmo.generate.generator import Generator
from flowmo.generate.samples import SampleSettings, check_pair, sample_images
from flowmo.images import read_image, resize_and_crop, to_pil, to_tensor
from flowmo.streams import Stream, stream
from flowmo.tokenizer import Codes, FlowMo

MAX_PIXELS = 4_000_000
MAX_PIXELS_FOR_CODECS = 600_000
"""Larger images take too long, because each codec searches for its quality."""
MAX_STEPS, MAX_SAMPLES, MAX_GENERATED = 50, 16, 32
MAX_FILES = 256
MAX_IDS_SHOWN = 4096
RANDOM, FLIPPED, TYPED = "drawn at random", "all bits flipped", "the ids below"


class DemoError(FlowMoError):
    """An impossible request; the page shows the message."""


class Result(NamedTuple):
    """A reconstructed upload. ``original`` is ``None`` for a ``.flowmo`` upload."""

    original: Image.Image | None
    decoded: Image.Image
    codes: Codes
    file: str
    """Path of the ``.flowmo`` file to download."""
    nbytes: int
    """Size of that file."""
    metrics: dict[str, str]


class Peer(NamedTuple):
    """The same image through another codec."""

    name: str
    image: Image.Image
    nbytes: int
    psnr: float
    fits: bool


class Demo:
    """A tokenizer, and optionally a generator of its ids, behind the web page.

    Args:
        codec: writes and reads this tokenizer's files.
        folder: keeps the newest of these files.
        name: the tokenizer's name on the page.
    """

    def __init__(
        self, tokenizer: FlowMo, codec: Codec, folder: Path, generator: Generator | None = None, name: str = "tokenizer"
    ):
        self.tokenizer, self.codec, self.folder, self.generator, self.name = tokenizer, codec, folder, generator, name
        if generator is not None:
            check_pair(generator, tokenizer)

    def about(self) -> str:
        """Describe the tokenizer in one sentence."""
        side, tokens, ids = self.codec.tile, self.codec.tokens, self.codec.sub_tokens
        size = packed_size(tokens * ids, self.codec.bits)
        return (
            f"{self.name} makes {plural(tokens, 'token')} of {plural(ids, 'id')} below {self.codec.id_count} of each "
            f"{side} × {side} pixels: {plural(size, 'byte')}."
        )

    def open(self, file: str | None, fit: str) -> tuple[Image.Image | None, Codes]:
        """Read an upload. Returns the image, ``None`` for a ``.flowmo`` file, and its codes."""
        path = uploaded(file)
        if path.suffix == ".flowmo":
            try:
                return None, self.codec.unpack(path.read_bytes(), MAX_PIXELS)
            except CodecError as error:
                raise DemoError(f"{path.name}: {error}") from None
        image = read_image(path, path.name, max_pixels=MAX_PIXELS)
        if fit == "crop":
            image = resize_and_crop(image, self.tokenizer.config.data.image_size)
        return image, self.tokenizer.encode_image(image)

    def decode(self, codes: Codes, steps: int, seed: int, guidance: float) -> Image.Image:
        return self.tokenizer.decode_image(codes, int(steps), int(seed), guidance=float(guidance))

    def reconstruct(self, file: str | None, fit: str, steps: int, seed: int, guidance: float) -> Result:
        """Encode an upload, decode it and write its ``.flowmo`` file."""
        original, codes = self.open(file, fit)
        decoded = self.decode(codes, steps, seed, guidance)
        content = self.codec.pack(codes)
        height, width = codes.output_size
        ids = codes.ids
        assert ids is not None  # a codec's tokenizer has ids
        metrics = {
            "file": f"{len(content):,} bytes",
            "bits per pixel": f"{8 * len(content) / (height * width):.4f}",
            "ids": f"{ids.numel():,} in {codes.nbytes:,} bytes packed",
            "picture": f"{width} × {height} pixels, {plural(len(codes), 'tile')}",
        }
        if ids.shape[2] < self.codec.sub_tokens:
            metrics["planes"] = f"{ids.shape[2]} of {self.codec.sub_tokens}: a coarser picture"
        if original is not None:
            metrics["PSNR"] = f"{psnr_of(original, decoded):.2f} dB"
        path = self._keep(content, f"{uploaded(file).stem[:60]}.flowmo")
        return Result(original, decoded, codes, str(path), len(content), metrics)

    def _keep(self, content: bytes, name: str) -> Path:
        """Write a file into its own folder and delete the oldest of too many folders."""
        folder = self.folder / hashlib.blake2b(content, digest_size=8).hexdigest()
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        others = sorted((path for path in self.folder.iterdir() if path != folder), key=lambda p: p.stat().st_mtime)
        for old in others[: max(len(others) - MAX_FILES + 1, 0)]:
            shutil.rmtree(old, ignore_errors=True)
        return folder / name

    def at_equal_bytes(self, result: Result | None) -> list[Peer]:
        """Compress the original with the usual codecs to at most the bytes of its ``.flowmo`` file, or their least."""
        original = encoded(result).original
        if original is None:
            raise DemoError("A .flowmo file has no original to compress. Upload an image.")
        if original.width * original.height > MAX_PIXELS_FOR_CODECS:
            raise DemoError(f"Codecs are compared up to {MAX_PIXELS_FOR_CODECS:,} pixels. Choose the central square.")
        budget, peers = encoded(result).nbytes, []
        for name in FORMATS:
            try:
                peer = CodecReconstructor(name, budget)
            except CodecMissingError:
                continue
            data = peer.encode(original)
            decoded = Image.open(io.BytesIO(data)).convert("RGB")
            peers.append(Peer(peer.name, decoded, len(data), psnr_of(original, decoded), len(data) <= budget))
        return peers

    def samples(
        self, result: Result | None, count: int, steps: int, seed: int, guidance: float
    ) -> tuple[list[tuple[Image.Image, str]], Image.Image]:
        """Decode the same codes with consecutive seeds.

        Returns the images with captions, and a heat map of each pixel's standard deviation over them.
        """
        codes = encoded(result).codes
        seeds = [int(seed) + i for i in range(min(int(count), MAX_SAMPLES))]
        images = [self.decode(codes, steps, s, guidance) for s in seeds]
        deviation = torch.stack([to_tensor(image) for image in images]).std(dim=0).mean(dim=0)
        return [(image, f"seed {s}") for image, s in zip(images, seeds, strict=True)], to_pil(heat_map(deviation))

    def edit(
        self, result: Result | None, first: int, last: int, how: str, typed: str, steps: int, seed: int, guidance: float
    ) -> tuple[Image.Image, Image.Image]:
        """Decode before and after tokens ``first`` to ``last`` of every tile are replaced.

        Args:
            how: ``RANDOM`` (drawn from the seed), ``FLIPPED`` or ``TYPED``.
            typed: ids as ``show_ids`` writes them, used by ``TYPED``.
        """
        codes = encoded(result).codes
        assert codes.ids is not None
        first, last = sorted((int(first), int(last)))
        ids = codes.ids.clone()
        part = ids[:, first : last + 1]
        if how == FLIPPED:
            part.copy_(self.codec.id_count - 1 - part)
        elif how == TYPED:
            part.copy_(self._parse_ids(typed, part.shape[1:]))
        else:
            part.copy_(torch.randint(self.codec.id_count, part.shape, generator=stream(int(seed), Stream.EDIT)))
        edited = replace(codes, ids=ids)
        return self.decode(codes, steps, seed, guidance), self.decode(edited, steps, seed, guidance)

    def _parse_ids(self, typed: str, shape: Sequence[int]) -> torch.Tensor:
        """Parse typed ids into a tensor tokens × sub-tokens."""
        words, (tokens, ids) = re.split(r"[\s,;:\[\]]+", typed.strip(" \n[],")), shape
        if len(words) != tokens * ids or not all(re.fullmatch(r"[0-9]{1,9}", word) for word in words):
            raise DemoError(f"Type {tokens * ids} numbers: {plural(tokens, 'token')} of {plural(ids, 'id')}.")
        values = torch.tensor([int(word) for word in words]).reshape(tokens, ids)
        if values.max() >= self.codec.id_count:
            raise DemoError(f"{int(values.max())} is not an id. Ids run from 0 to {self.codec.id_count - 1}.")
        return values

    def generate(self, name: str | int | None, count: int, seed: int, guidance: float) -> list[Image.Image]:
        """Generate images of a class, or of no class if ``name`` is ``None``."""
        assert self.generator is not None  # the page has no such tab otherwise
        labels = [self.generator.label(-1 if name is None else name)] * min(int(count), MAX_GENERATED)
        drawing = SampleSettings(seed=int(seed), guidance=float(guidance))
        return [to_pil(x) for x in sample_images(self.generator, self.tokenizer, labels, range(len(labels)), drawing)]


def uploaded(file: str | None) -> Path:
    if not file:
        raise DemoError("Choose a picture first.")
    return Path(file)


def encoded(result: Result | None) -> Result:
    if result is None:
        raise DemoError("Encode a picture first.")
    return result


def psnr_of(image: Image.Image, other: Image.Image) -> float:
    return float(psnr(to_tensor(image)[None], to_tensor(other)[None]))


def show_ids(result: Result | None, first: int = 0, last: int | None = None) -> str:
    """Write the ids of tokens ``first`` to ``last`` of the first tile, one token per line."""
    if result is None or result.codes.ids is None:
        return ""
    ids = result.codes.ids[0]
    first, last = sorted((int(first), len(ids) - 1 if last is None else int(last)))
    rows = ids[first : last + 1].tolist()
    shown = rows[: max(MAX_IDS_SHOWN // len(rows[0]), 1)]
    return "\n".join(" ".join(str(i) for i in row) for row in shown) + ("\n…" if len(shown) < len(rows) else "")


def plural(count: int, name: str) -> str:
    return f"{count:,} {name}" + "s" * (count != 1)
