"""JPEG, WebP, AVIF and JPEG XL at a budget of bytes, as candidates of an evaluation.

Bisection finds the highest quality that fits. A WebP or AVIF can be some bytes smaller than one of a lower quality, so
the result can be a step or two below the best: once in 581 trials of WebP. At the lowest quality these formats need
some hundred bytes even for tiny images, and a file may exceed the budget. Its true bytes are then reported.
"""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from flowmo.errors import FlowMoError, one_line
from flowmo.evaluate.measurement import EvaluationError
from flowmo.evaluate.reconstruction import Reconstruction
from flowmo.images import to_pil, to_tensor


class CodecMissingError(FlowMoError, RuntimeError):
    """The installed Pillow does not have this codec."""


def jpeg_payload(data: bytes) -> int:
    """Bytes of the one scan of Pillow's baseline files, without markers and tables."""
    position = 2
    while data[position + 1] != 0xDA:
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    header = 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return len(data) - position - header - len(b"\xff\xd9")


def webp_payload(data: bytes) -> int:
    """Bytes of the VP8 chunk, the first of Pillow's files, after its frame header of 10 bytes."""
    return int.from_bytes(data[16:20], "little") - 10 if data[12:16] == b"VP8 " else len(data)


def avif_payload(data: bytes) -> int:
    """Bytes of the ``mdat`` box, which holds the AV1 stream."""
    position = 0
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big") or len(data) - position
        if data[position + 4 : position + 8] == b"mdat":
            return size - 8
        position += size
    return len(data)


def jxl_payload(data: bytes) -> int:
    """Bytes of a bare codestream without its signature; the rest of its header is a few bits."""
    return len(data) - 2


class Format(NamedTuple):
    """A format: its printed name, Pillow's name, settings for Pillow, and the bytes of content in a file."""

    name: str
    pillow: str
    settings: dict[str, Any]
    payload: Callable[[bytes], int]


FORMATS = {
    "jpeg": Format("JPEG", "JPEG", {"optimize": True}, jpeg_payload),
    "webp": Format("WebP", "WEBP", {"method": 6}, webp_payload),
    "avif": Format("AVIF", "AVIF", {"speed": 4}, avif_payload),
    "jxl": Format("JPEG XL", "JXL", {"effort": 9}, jxl_payload),
}
QUALITIES = range(101)


@dataclass
class CodecReconstructor:
    """A codec as a ``flowmo.evaluate.reconstruction.Reconstructor``.

    Args:
        codec: a key of ``FORMATS``.
        budget: bytes per image; or {dataset index: bytes}.
        headers: count the full file. Otherwise count only its content; a file cannot go without headers.
        at_least: take the lowest quality that reaches the budget, instead of the highest within it.
        suffix: of the name in tables.

    Raises:
        CodecMissingError: the installed Pillow does not have the codec.
    """

    codec: str
    budget: int | Mapping[int, int]
    headers: bool = True
    at_least: bool = False
    suffix: str = ""
    name: str = field(init=False)
    id_count: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.name = FORMATS[self.codec].name + ("" if self.headers else ", without headers") + self.suffix
        with suppress(ImportError):
            import pillow_jxl  # noqa: F401  # registers the format
        Image.init()
        if FORMATS[self.codec].pillow not in Image.SAVE:
            raise CodecMissingError(
                f"Pillow cannot write {self.name} here. JPEG XL needs pillow-jxl-plugin (pip install "
                "'flowmo[evaluate]'), WebP and AVIF another build of Pillow."
            )

    def reconstruct(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        budgets = [self.budget if isinstance(self.budget, int) else self.budget[index] for index in indices]
        files = [self.encode(to_pil(image), budget) for image, budget in zip(images, budgets, strict=True)]
        decoded = [to_tensor(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]
        bits, file_bits = (torch.tensor([8.0 * size(data) for data in files]) for size in (self.size, len))
        return Reconstruction(torch.stack(decoded), bits, file_bits=file_bits)

    def size(self, data: bytes) -> int:
        return len(data) if self.headers else FORMATS[self.codec].payload(data)

    def encode(self, image: Image.Image, budget: int) -> bytes:
        """Encode an image within ``budget`` bytes, or with at least so many.

        If no quality does, the lowest is taken; with ``at_least`` the highest.
        """
        codec = FORMATS[self.codec]

        @cache
        def encoded(quality: int) -> bytes:
            stream, settings = io.BytesIO(), codec.settings
            if codec.pillow == "JXL" and quality == 100:  # which its encoder refuses otherwise
                settings = settings | {"lossless": True}
            try:
                image.save(stream, codec.pillow, quality=quality, **settings)
            except (OSError, ValueError, RuntimeError) as error:  # WebP ends at 16 383 pixels a side, AVIF at 65 536
                size = f"{image.width}×{image.height}"
                raise EvaluationError(f"{codec.name} cannot write {size} pixels ({one_line(error)}).") from None
            return stream.getvalue()

        def size(quality: int) -> int:
            return self.size(encoded(quality))

        if self.at_least:
            return encoded(min(bisect_left(QUALITIES, budget, key=size), QUALITIES[-1]))
        return encoded(max(bisect_right(QUALITIES, budget, key=size) - 1, QUALITIES[0]))
