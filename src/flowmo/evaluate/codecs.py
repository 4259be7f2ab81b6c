"""The codecs that a person would otherwise use, as candidates: JPEG, WebP, AVIF and JPEG XL at a budget of bytes.

Each picture gets the highest quality that bisection finds to fit. A WebP or AVIF can be some bytes smaller than one of
a lower quality, so this may be a step or two below the best: once in 581 trials of WebP. These formats stop shrinking
at some hundred bytes for the smallest pictures, so a file may exceed the budget at the lowest quality; its bytes are
then what it takes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
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
        budget: bytes a picture.
        headers: whether the budget is for the whole file; otherwise for its content alone, which no real file is.

    Raises:
        CodecMissingError: this Pillow does not have it.
    """

    id_count = None

    def __init__(self, codec: str, budget: int, headers: bool = True):
        self.format, self.budget, self.headers = FORMATS[codec], budget, headers
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
        for image in images:
            data = self.encode(to_pil(image))
            sizes.append(8.0 * self.size(data))
            files.append(8.0 * len(data))
            pictures.append(to_tensor(Image.open(io.BytesIO(data)).convert("RGB")))
        return Reconstruction(torch.stack(pictures), torch.tensor(sizes), file_bits=torch.tensor(files))

    def size(self, data: bytes) -> int:
        return len(data) if self.headers else self.format.payload(data)

    def encode(self, picture: Image.Image) -> bytes:
        """The file of the highest quality that fits, by bisection; of the smallest size where none does."""
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
            low, high = (middle, high) if self.size(at(middle)) <= self.budget else (low, middle - 1)
        at(low)
        fitting = [quality for quality, data in tried.items() if self.size(data) <= self.budget]
        return tried[max(fitting)] if fitting else min(tried.values(), key=self.size)
