"""Images in and out: files to PIL to tensors and back."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile
from torch import Tensor

from flowmo.errors import FlowMoError, one_line
from flowmo.images.corrections import TIFF_MAGICS, WHITE_16, misread, reinterpreted, upright

MAX_PIXELS = 100_000_000
DRAFT_MARGIN = 2
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "HEIF")
"""The allowed Pillow readers. Others are unsafe: EPS starts another program."""
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif"),
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks with text or a colour profile. Pillow refuses a PNG if one of them inflates to more than a megabyte."""
PNG_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Starts of text chunks that may hold the orientation."""
RAW_LEVELS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
"""Raw PNG modes whose values Pillow scales to 8 bits, but not their transparent value -> that scale."""


class ImageError(FlowMoError, ValueError):
    """An image file that cannot be read. The message is one line that names the file."""


def read_image(
    file: str | Path | BinaryIO, name: str | None = None, side: int | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read an image file as an upright RGB image. Transparent parts become white.

    16-bit values are scaled to 8 bits, floating-point values by the largest finite one (at least 1). Broken metadata is
    ignored. Of an animation only the first frame is read.

    Args:
        file: a path or an open file.
        name: name of the file in messages; its path by default.
        side: short side to which the caller will resize. A much larger JPEG is then decoded at 1/2, 1/4 or 1/8 of its
            size, but at least twice ``side``, which is much faster (see ``benchmarks/loader.py``).
        max_pixels: refuse a larger image before it is decoded.

    Raises:
        ImageError: the file is missing, truncated, too large, without pixels, or in none of ``PILLOW_FORMATS``; or its
            format needs another package.
    """
    with open_file(file, name, max_pixels) as (content, path), open_image(content, path, side, max_pixels) as image:
        if reason := misread(image):
            raise ValueError(reason)
        return to_rgb(reinterpreted(image))


@contextlib.contextmanager
def open_file(
    file: str | Path | BinaryIO, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[BinaryIO, str]]:
    """Open a path; an open file stays as it is. Yields the file and its name for messages.

    Every error inside the block becomes an ``ImageError`` of one line that names the file.
    """
    path, start = name or str(file), b""
    try:
        with open(file, "rb") if isinstance(file, str | Path) else contextlib.nullcontext(file) as content:
            start = content.read(8)
            content.seek(0)
            yield content, path
        return
    except ImageError:
        raise
    except Image.DecompressionBombError:
        reason = f"more than {max_pixels:,} pixels"
    except FileNotFoundError:
        reason = "no such file"
    except Image.UnidentifiedImageError:
        reason = f"not an image in a supported format ({', '.join(PILLOW_FORMATS)})"
        if start.startswith(TIFF_MAGICS):
            reason = "a TIFF of a kind that Pillow does not read. Save it as 8-bit RGB"
        elif start[4:] == b"ftyp":
            reason += ". AVIF needs Pillow 11.3 or newer, HEIF pillow-heif (pip install 'flowmo[phone]')"
    except Exception as error:  # Pillow's readers raise anything on damaged files
        reason = f"cannot be read ({one_line(error)})"
    raise ImageError(f"{path}: {reason}.") from None


@contextlib.contextmanager
def open_image(file: BinaryIO, path: str, side: int | None, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image file with Pillow, as safely as ``read_image`` does, and check its size."""
    with _whole_files_only():
        content = _without_text(file)
        with Image.open(content, formats=_formats(content)) as image:
            check_pixels(*size_of(image), path, max_pixels)
            if side is not None:
                image.draft(None, (DRAFT_MARGIN * side, DRAFT_MARGIN * side))
            yield image


def _formats(file: BinaryIO) -> list[str]:
    """Pillow's readers for a file, among those that are installed."""
    start = file.read(8)
    if not start:
        raise ValueError("the file is empty")
    if start[4:] == b"ftyp":  # HEIF or AVIF
        with contextlib.suppress(ImportError):
            from pillow_heif import register_heif_opener

            register_heif_opener()
    file.seek(0)
    Image.init()
    return [reader for reader in PILLOW_FORMATS if reader in Image.OPEN]


def _without_text(file: BinaryIO) -> BinaryIO:
    """Drop the text chunks of a PNG. Any other file is returned unchanged."""
    if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
        file.seek(0)
        return file
    data, start, kept = file.read(), 0, [PNG_SIGNATURE]
    while start < len(data):
        kind, end = data[start + 4 : start + 8], start + 12 + int.from_bytes(data[start : start + 4], "big")
        if kind not in PNG_TEXT or data.startswith(PNG_ORIENTATION, start + 8):
            kept.append(data[start:end])
        start = end
    return io.BytesIO(b"".join(kept))


class _Readers:
    """Number of reads in progress in this process, and what the first of them changed for all."""

    lock = threading.Lock()
    count = 0
    truncated = False
    quiet = warnings.catch_warnings()


@contextlib.contextmanager
def _whole_files_only() -> Iterator[None]:
    """Refuse truncated files, which Pillow fills with grey or black if other code has asked it to, and warn of nothing.

    Pillow warns about metadata, and about sizes, which are checked here. Both settings belong to the whole process, so
    the first of several concurrent reads makes them, and the last one restores them.
    """
    with _Readers.lock:
        if not _Readers.count:
            _Readers.truncated = ImageFile.LOAD_TRUNCATED_IMAGES
            _Readers.quiet = warnings.catch_warnings(action="ignore")
            _Readers.quiet.__enter__()
        _Readers.count += 1
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        with _Readers.lock:
            _Readers.count -= 1
            if not _Readers.count:
                ImageFile.LOAD_TRUNCATED_IMAGES = _Readers.truncated
                _Readers.quiet.__exit__(None, None, None)


def check_pixels(width: int, height: int, name: str = "image", max_pixels: int = MAX_PIXELS) -> None:
    """Raise ``ImageError`` for an image without pixels or with too many."""
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {width}×{height} has no pixels.")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width}×{height} is more than {max_pixels:,} pixels.")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB as a viewer shows it: upright, 8 bits, transparency over white."""
    transparent = image.info.get("transparency")
    scale = RAW_LEVELS.get(image.tile[0][3]) if getattr(image, "tile", None) else None
    image = upright(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(_to_8_bits(values, image.mode == "F"))
        if isinstance(transparent, int):
            image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    elif scale is not None and transparent is not None:
        image = image.copy()
        levels = transparent if isinstance(transparent, tuple) else (transparent,)
        scaled = tuple(int(level * scale) for level in levels)
        image.info["transparency"] = scaled if len(scaled) > 1 else scaled[0]
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def check_16_bits(values: np.ndarray) -> None:
    """Raise ``ValueError`` for 32-bit values that are not 16-bit ones."""
    if values.size and not 0 <= values.min() <= values.max() <= WHITE_16:
        raise ValueError("its 32-bit values have no known range")


def _to_8_bits(values: np.ndarray, floating: bool) -> np.ndarray:
    """Scale 16-bit or floating-point values to 8 bits. Infinities are clipped; NaN becomes black."""
    top = float(WHITE_16)
    if not floating:
        check_16_bits(values)
    else:
        finite = values[np.isfinite(values)]
        if values.size and not finite.size:
            raise ValueError("none of its values is finite")
        top = max(float(finite.max(initial=1.0)), 1.0)
        values = np.nan_to_num(values, nan=0.0, posinf=top, neginf=0.0)
    return np.clip(values * (255 / top), 0, 255).round().astype(np.uint8)


def to_tensor(image: Image.Image | Tensor) -> Tensor:
    """RGB image -> float32 3 × h × w in [−1, 1]. A tensor is returned as it is."""
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Images in [−1, 1] -> uint8 in [0, 255], rounded and clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """3 × h × w in [−1, 1] -> RGB image."""
    return Image.fromarray(to_bytes(image).permute(1, 2, 0).cpu().numpy())


def select_channels(images: Tensor, channels: Sequence[int] | None) -> Tensor:
    """Select ``channels`` of images b × c × h × w; ``None`` is all."""
    if channels is None or [*channels] == [*range(images.shape[1])]:
        return images
    return torch.stack([images[:, channel] for channel in channels], dim=1)


AnyImage = TypeVar("AnyImage", Image.Image, Tensor)
"""A PIL image, or a tensor c × h × w."""


def size_of(image: Image.Image | Tensor) -> tuple[int, int]:
    """Width and height."""
    return (image.shape[2], image.shape[1]) if isinstance(image, Tensor) else image.size


def crop(image: AnyImage, left: int, top: int, width: int, height: int) -> AnyImage:
    if isinstance(image, Tensor):
        return image[:, top : top + height, left : left + width]
    return image.crop((left, top, left + width, top + height))


def resize_and_crop(image: AnyImage, side: int, name: str = "image") -> AnyImage:
    """Resize the short side to ``side`` (bilinear, antialiased) and crop the central square, as the release.

    Raises:
        ImageError: the image is so thin that the resized one has too many pixels.
    """
    size = size_of(image)
    width, height = (side * length // min(size) for length in size)  # rounds as torchvision
    check_pixels(width, height, f"{name}, resized")
    if size != (width, height):
        if isinstance(image, Tensor):
            image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
        else:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
    return crop(image, round((width - side) / 2), round((height - side) / 2), side, side)
