"""Pictures in and out: files to PIL to tensors and back, and the tiling that keeps a picture of any size whole."""

from __future__ import annotations

import contextlib
import io
import math
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from flowmo.errors import FlowMoError

MAX_PIXELS = 100_000_000
DRAFT_MARGIN = 2
ORIENTATION = 0x0112
"""Number of EXIF's tag for the orientation of an image."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of each orientation upright."""
ORIENTED = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Where Pillow keeps metadata that may hold an orientation; an image that was turned has none."""
COLOUR_MAP = 320
"""Number of TIFF's tag for a palette: all red values, all green, all blue."""
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Pillow's readers that are used. It has many more, of which one starts another program on what it reads (EPS)."""
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks of text and of the colour profile. Pillow refuses a PNG whose text or profile inflates to over a megabyte."""
PNG_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Texts that may hold the orientation."""
RAW_LEVELS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
"""Pillow scales the values of such PNGs to 8 bits, but not the transparent one."""


class ImageError(FlowMoError, ValueError):
    """A file that is no image, is damaged, or is too large. The message is one line that names the file."""


PictureError = ImageError  # its earlier name


def read_image(
    file: str | Path | BinaryIO, name: str | None = None, side: int | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read an image file as an upright PIL image in RGB. Transparent parts become white.

    16-bit values are scaled to 8 bits, floating-point values by the largest finite one (1 at least). Metadata never
    makes an image unreadable. Of an animation the first frame is read.

    Args:
        file: a path, or an open file.
        name: what messages call the file; its path by default.
        side: short side that the image will be reduced to. A much larger JPEG is then decoded at a half, a quarter
            or an eighth of its size, but at least twice ``side``: the decoder's own average over blocks, at a
            fraction of the time, before the resampling that follows (see ``benchmarks/loader.py``).
        max_pixels: refuse an image of more pixels, before it is decoded.

    Raises:
        ImageError: the file is missing, not an image of the formats ``PILLOW_FORMATS``, truncated, without pixels, or
            above ``max_pixels``.
    """
    path = name or str(file)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_whole_files_only())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of large images, which are counted below, and of odd metadata
            content = stack.enter_context(open(file, "rb")) if isinstance(file, str | Path) else file
            picture = stack.enter_context(Image.open(_without_text(content), formats=PILLOW_FORMATS))
            check_size(picture, path, max_pixels)
            if side is not None:
                picture.draft(None, (DRAFT_MARGIN * side, DRAFT_MARGIN * side))
            return to_rgb(_as_meant(picture))
    except Image.DecompressionBombError:
        raise ImageError(f"{path}: more than {max_pixels:,} pixels") from None
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"{path}: not a picture of a kind that is read ({', '.join(PILLOW_FORMATS)})") from None
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them into
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(f"{path}: cannot be read ({reason})") from None


def _without_text(file: BinaryIO) -> BinaryIO:
    """Drop the text chunks of a PNG. Any other file is returned as it is."""
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
    """Count of the reads in progress in this process, and Pillow's setting before the first of them."""

    lock = threading.Lock()
    count = 0
    truncated = False


@contextlib.contextmanager
def _whole_files_only() -> Iterator[None]:
    """Refuse truncated files even if other code has set ``ImageFile.LOAD_TRUNCATED_IMAGES`` for the whole process.

    With that setting the missing part of an image is grey, or a progressive JPEG black, without an error.
    """
    with _Readers.lock:
        if not _Readers.count:
            _Readers.truncated = ImageFile.LOAD_TRUNCATED_IMAGES
        _Readers.count += 1
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        with _Readers.lock:
            _Readers.count -= 1
            if not _Readers.count:
                ImageFile.LOAD_TRUNCATED_IMAGES = _Readers.truncated


def _as_meant(picture: Image.Image) -> Image.Image:
    """Read two kinds of file as browsers and libtiff do, and Pillow does not.

    A BMP whose alpha channel is zero throughout is opaque: its writer left the fourth byte unused. A TIFF whose palette
    has no value above 255 has 8-bit colours, not 16-bit ones that are nearly black.
    """
    if picture.format == "BMP" and picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (0, 0):
        return picture.convert("RGB")
    if picture.format == "TIFF" and picture.mode == "P":
        colours = np.array(picture.tag_v2.get(COLOUR_MAP, ()))
        if colours.size and colours.max() <= 255:
            picture.putpalette(colours.reshape(3, -1).T.astype(np.uint8).tobytes())
    return picture


def check_size(picture: Image.Image, name: str | Path = "picture", max_pixels: int = MAX_PIXELS) -> None:
    width, height = picture.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {width}×{height} has no pixels")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width}×{height} is more than {max_pixels:,} pixels")


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB as a viewer shows it: upright, 16 bits scaled to 8, transparency over white."""
    level = picture.info.get("transparency")
    scale = RAW_LEVELS.get(picture.tile[0][3]) if getattr(picture, "tile", None) else None
    picture.load()  # a TIFF is turned here
    turn = UPRIGHT.get(_orientation(picture))
    if turn is not None:
        picture = picture.transpose(turn)
        picture.info = {key: value for key, value in picture.info.items() if key not in ORIENTED}
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        values = np.asarray(picture, dtype=np.float64)
        grey = Image.fromarray(_to_8_bits(values, picture.mode == "F"))
        if isinstance(level, int):
            grey.putalpha(Image.fromarray(np.where(values == level, 0, 255).astype(np.uint8)))
        picture = grey
    elif scale is not None and level is not None:
        channels = level if isinstance(level, tuple) else (level,)
        scaled = tuple(int(channel * scale) for channel in channels)
        picture = picture.copy()
        picture.info["transparency"] = scaled if len(scaled) > 1 else scaled[0]
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _orientation(picture: Image.Image) -> int:
    """EXIF's orientation, 1 where it cannot be read."""
    try:
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever damaged metadata leads Pillow into
        return 1


def _to_8_bits(values: np.ndarray, floating: bool) -> np.ndarray:
    """Scale 16-bit values, or floating-point values of any range. Infinite ones are clipped, NaN is black."""
    top = 65535.0
    if floating:
        finite = values[np.isfinite(values)]
        if values.size and not finite.size:
            raise ValueError("none of its values is finite")
        top = max(float(finite.max(initial=1.0)), 1.0)
        values = np.nan_to_num(values, nan=0.0, posinf=top, neginf=0.0)
    return np.clip(values * (255 / top), 0, 255).round().astype(np.uint8)


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> float32 3 × h × w in [−1, 1]."""
    return torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1).float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Pictures in [−1, 1] -> uint8 0…255, rounded to the nearest and clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """3 × h × w in [−1, 1] -> RGB picture."""
    return Image.fromarray(to_bytes(image).permute(1, 2, 0).cpu().numpy())


def resize_and_crop(picture: Image.Image, side: int) -> Image.Image:
    """The paper's protocol: short side resized to ``side`` (bilinear, antialiased), then the central square."""
    width, height = (side * length // min(picture.size) for length in picture.size)  # in integers, as torchvision
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return picture.crop((left, top, left + side, top + side))


@dataclass(frozen=True)
class Tiling:
    """How square tiles of ``tile`` pixels cover a picture of ``height`` × ``width``, row by row.

    Neighbours overlap by at least an eighth of a tile and are blended there by linear ramps. A side shorter than a
    tile is padded by repeating its last line, and cut off again.
    """

    height: int
    width: int
    tile: int

    def along(self, length: int) -> int:
        """Tiles along a side of so many pixels."""
        overlap = self.tile // 8
        return max(math.ceil((length - overlap) / (self.tile - overlap)), 1)

    def starts(self, length: int) -> list[int]:
        count = self.along(length)
        if count == 1:
            return [0]
        return [round(i * (length - self.tile) / (count - 1)) for i in range(count)]

    @property
    def count(self) -> int:
        """Tiles in all."""
        return self.along(self.height) * self.along(self.width)

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Top and left of every tile."""
        return [(top, left) for top in self.starts(self.height) for left in self.starts(self.width)]

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the padded picture."""
        return max(self.height, self.tile), max(self.width, self.tile)

    def split(self, image: Tensor) -> Tensor:
        """c × height × width -> tiles × c × tile × tile."""
        rows = torch.arange(self.canvas[0], device=image.device).clamp(max=self.height - 1)
        columns = torch.arange(self.canvas[1], device=image.device).clamp(max=self.width - 1)
        return self.crop(image[:, rows][:, :, columns])

    def crop(self, canvas: Tensor) -> Tensor:
        """Tiles of something that has the padded picture's size already."""
        return torch.stack([canvas[:, y : y + self.tile, x : x + self.tile] for y, x in self.corners])

    def merge(self, tiles: Tensor) -> Tensor:
        """tiles × c × tile × tile -> c × height × width."""
        position = torch.arange(1, self.tile + 1, dtype=tiles.dtype, device=tiles.device)
        ramp = torch.minimum(position, position.flip(0)).clamp(max=max(self.tile // 8, 1))
        weight = ramp[:, None] * ramp
        total = tiles.new_zeros(tiles.shape[1], *self.canvas)
        weights = tiles.new_zeros(self.canvas)
        for (y, x), tile in zip(self.corners, tiles, strict=True):
            total[:, y : y + self.tile, x : x + self.tile] += weight * tile
            weights[y : y + self.tile, x : x + self.tile] += weight
        return (total / weights)[:, : self.height, : self.width]
