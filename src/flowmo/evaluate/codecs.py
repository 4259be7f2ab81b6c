"""The codecs that a person would otherwise use, as candidates: JPEG, WebP, AVIF and JPEG XL at a budget of bytes.

Each picture gets the highest quality that bisection finds to fit. A WebP or AVIF can be some bytes smaller than one of
a lower quality, so this may be a step or two below the best: once in 581 trials of WebP. These formats stop shrinking
at some hundred bytes for the smallest pictures, so a file may exceed the budget at the lowest quality; its bytes are
then what it takes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image, features
from torch import Tensor

from flowmo.errors import FlowMoError
from flowmo.evaluate.reconstruction import Reconstruction
from flowmo.images import to_pil, to_tensor


class CodecMissingError(FlowMoError, RuntimeError):
    """A codec that this machine's Pillow does not have."""


class Format(NamedTuple):
    """How Pillow calls a format, the settings it is given, and the bytes of content in a file of it."""

    pillow: str
    settings: dict[str, Any]
    payload: Callable[[bytes], int]


def jpeg_payload(data: bytes) -> int:
    """Bytes of the scans: all but markers and tables."""
    at, total = 2, 0
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xD9:
        marker = data[at + 1]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # a scan's data follows its header, up to the next marker that is no escape or restart
            start = at
            while at + 1 < len(data) and not (data[at] == 0xFF and data[at + 1] not in (0x00, *range(0xD0, 0xD8))):
                at += 1
            total += at - start
    return total


def webp_payload(data: bytes) -> int:
    """Bytes of the VP8 chunk behind its frame header."""
    frame_header = 10
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"VP8 ":
            return size - frame_header
        at += 8 + size + size % 2
    return len(data)


def avif_payload(data: bytes) -> int:
    """Bytes of the ``mdat`` box, which holds the AV1 stream."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"mdat":
            return (size or len(data) - at) - 8
        if size < 8:
            break
        at += size
    return len(data)


def jxl_payload(data: bytes) -> int:
    """Of a bare codestream, whose header is a few bits, all but its two bytes of signature."""
    return len(data) - 2


FORMATS = {
    "jpeg": Format("JPEG", {"optimize": True}, jpeg_payload),
    "webp": Format("WEBP", {"method": 6}, webp_payload),
    "avif": Format("AVIF", {"speed": 4}, avif_payload),
    "jxl": Format("JXL", {"effort": 9}, jxl_payload),
}
QUALITIES = range(101)


class CodecReconstructor:
    """A codec as a ``flowmo.evaluate.reconstruction.Reconstructor``.

    Args:
        codec: a key of ``FORMATS``.
        budget: bytes per image; or the bytes of each, by the image's index in its source.
        headers: whether the budget is for the whole file; otherwise for its content alone, which no real file is.
        at_least: take the lowest quality whose file has no fewer bytes than the budget, in place of the highest
            quality within it. The codec then never has less to work with.

    Raises:
        CodecMissingError: this Pillow does not have it.
    """

    id_count = None

    def __init__(self, codec: str, budget: int | Mapping[int, int], headers: bool = True, at_least: bool = False):
        self.format, self.budget, self.headers, self.at_least = FORMATS[codec], budget, headers, at_least
        self.name = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF", "jxl": "JPEG XL"}[codec]
        self.name += "" if headers else ", without headers"
        if codec == "jxl":
            try:
                import pillow_jxl  # noqa: F401  # registers the format
            except ImportError:
                raise CodecMissingError("JPEG XL needs pillow-jxl-plugin: pip install 'flowmo[evaluate]'") from None
        elif codec != "jpeg" and not features.check(codec):
            raise CodecMissingError(f"this Pillow was built without {self.name}")

    def reconstruct(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        pictures, sizes, files = [], [], []
        for image, index in zip(images, indices, strict=True):
            budget = self.budget if isinstance(self.budget, int) else self.budget[index]
            data = self.encode(to_pil(image), budget)
            sizes.append(8.0 * self.size(data))
            files.append(8.0 * len(data))
            pictures.append(to_tensor(Image.open(io.BytesIO(data)).convert("RGB")))
        return Reconstruction(torch.stack(pictures), torch.tensor(sizes), file_bits=torch.tensor(files))

    def size(self, data: bytes) -> int:
        return len(data) if self.headers else self.format.payload(data)

    def encode(self, picture: Image.Image, budget: int | None = None) -> bytes:
        """Find the file for a budget, by default the codec's own, by bisection.

        It is the highest quality that fits, or the smallest file where none does. With ``at_least`` it is the lowest
        quality that reaches the budget, or the largest file where none does.
        """
        if budget is None:
            assert isinstance(self.budget, int), "each image has a budget of its own"
            budget = self.budget
        tried: dict[int, bytes] = {}

        def at(quality: int) -> bytes:
            if quality not in tried:
                stream = io.BytesIO()
                picture.save(stream, self.format.pillow, quality=quality, **self.format.settings)
                tried[quality] = stream.getvalue()
            return tried[quality]

        low, high = QUALITIES[0], QUALITIES[-1]
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.size(at(middle)) <= budget else (low, middle - 1)
        if self.at_least:
            quality = next((q for q in range(low, len(QUALITIES)) if self.size(at(q)) >= budget), QUALITIES[-1])
            return at(quality)
        at(low)
        fitting = [quality for quality, data in tried.items() if self.size(data) <= budget]
        return tried[max(fitting)] if fitting else min(tried.values(), key=self.size)
