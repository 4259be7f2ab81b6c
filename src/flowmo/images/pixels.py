"""Images of any number of channels and bits per value: files to tensors and back."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flowmo.config import Config
from flowmo.errors import one_line
from flowmo.images import (
    MAX_PIXELS,
    ImageError,
    check_16_bits,
    check_pixels,
    open_file,
    open_image,
    read_image,
    select_channels,
    size_of,
    to_pil,
    to_rgb,
    to_tensor,
)
from flowmo.images.corrections import (
    TIFF_MAGICS,
    full_pages,
    loses_bands,
    misread,
    raw_mode,
    reinterpreted,
    upright,
)

ARRAY = ".npy"
NPY_MAGIC = b"\x93NUMPY"
RAW_FORMATS = (".tif", ".tiff", ARRAY)
"""Suffixes of files that hold any number of channels and any depth."""
STORED = {8: "uint8", 16: "uint16", 32: "float32"}
"""Bits per value -> type of an array."""
WHITE = {"bool": 1.0, "uint8": 255.0, "uint16": 65535.0, "float32": 1.0}


class ChannelsError(ImageError):
    """An image has another number of channels than the model takes."""


def is_array(name: str) -> bool:
    return name.lower().endswith(ARRAY)


@dataclass(frozen=True)
class PixelFormat:
    """Channels, bit depth and value range of a model's images.

    Attributes:
        channels: values per pixel.
        bits: per value in the files that are written: 8, 16, or 32 for floats. Files of any depth are read.
        value_range: file values that become −1 and 1. ``None`` is the full range of an 8- or 16-bit type, and 0 to 1
            for floats.
        colours: the three channels shown as RGB.

    Raises:
        ValueError: the first value of the range is not the smaller one.
    """

    channels: int = 3
    bits: int = 8
    value_range: tuple[float, float] | None = None
    colours: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        if self.value_range and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range {self.value_range}: the first value must be the smaller one.")

    @classmethod
    def of(cls, config: Config) -> PixelFormat:
        data, colours = config.data, tuple(config.perceptual_channels)
        return cls(config.model.channels, data.bit_depth, data.value_limits, colours)

    @property
    def is_rgb(self) -> bool:
        """True for 8-bit RGB, whose images are PIL images."""
        return (self.channels, self.bits, self.value_range) == (3, 8, None)

    @property
    def suffix(self) -> str:
        """Usual suffix of a file: ``.png``, or ``.tif`` where PNG has no such images."""
        return ".png" if self.is_rgb or (self.channels == 1 and self.bits < 32) else ".tif"

    def fits(self, suffix: str) -> bool:
        """True if files of this suffix hold such images at their full depth."""
        if self.is_rgb or suffix in RAW_FORMATS:
            return True
        return self.channels == 1 and (self.bits == 8 or (self.bits == 16 and suffix in (".png", ".ppm")))

    # Read

    def read(
        self,
        file: str | Path | BinaryIO,
        name: str | None = None,
        side: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> Image.Image | Tensor:
        """Read an image file: as an RGB image for 8-bit RGB, else as float32 c × h × w in [−1, 1].

        A ``.npy`` file holds h × w × c, c × h × w or h × w values. The pages of a TIFF are its channels. A TIFF whose
        pages have more bands than Pillow reads needs ``tifffile``. A colour file of equal channels counts as grey.

        Args:
            file, name, side, max_pixels: as in ``read_image``.

        Raises:
            ImageError: as ``read_image``; the file has another number of channels; or its values have no known range.
        """
        if self.is_rgb and not is_array(name or str(file)):
            return read_image(file, name, side, max_pixels)
        with open_file(file, name, max_pixels) as (content, path):
            return self._read(content, path, side, max_pixels)

    def _read(self, file: BinaryIO, path: str, side: int | None, max_pixels: int) -> Tensor:
        start = file.read(len(NPY_MAGIC))
        file.seek(0)
        if start == NPY_MAGIC:
            return self.tensor(self._read_npy(file, path, max_pixels), path)
        try:
            with open_image(file, path, side, max_pixels) as image:
                if not loses_bands(image, self.channels):
                    return self.tensor(self._values(image, path, max_pixels), path)
        except (UnidentifiedImageError, ValueError) as error:
            if isinstance(error, ImageError) or not start.startswith(TIFF_MAGICS):
                raise
        file.seek(0)
        return self.tensor(self._read_bands(file, path, max_pixels), path)

    def _read_npy(self, file: BinaryIO, path: str, max_pixels: int) -> np.ndarray:
        header = np.lib.format
        read = header.read_array_header_1_0 if header.read_magic(file) == (1, 0) else header.read_array_header_2_0
        axis = self._channel_axis(read(file)[0], path, max_pixels)
        file.seek(0)
        return np.moveaxis(np.atleast_3d(np.load(file, allow_pickle=False)), axis, 2)

    def _read_bands(self, file: BinaryIO, path: str, max_pixels: int) -> np.ndarray:
        try:
            import tifffile
        except ImportError:
            raise ImageError(f"{path}: has bands that only tifffile reads. Run pip install 'flowmo[tiff]'.") from None
        with tifffile.TiffFile(file) as tiff:
            axis = self._channel_axis(tiff.series[0].shape, path, max_pixels)
            return np.moveaxis(np.atleast_3d(tiff.series[0].asarray()), axis, 2)

    def _channel_axis(self, shape: Sequence[int], path: str, max_pixels: int) -> int:
        """Check the shape of an array before it is read, and return the axis of its channels."""
        if len(shape) not in (2, 3):
            raise ImageError(f"{path}: is an array of {len(shape)} axes. An image has 2 or 3.")
        channels_first = len(shape) == 3 and shape[0] == self.channels != shape[2]
        height, width, found = (*shape[1:], shape[0]) if channels_first else (*shape, 1)[:3]
        self._check_channels(found, path)
        check_pixels(width, height, path, max_pixels)
        return 0 if channels_first else 2

    def _check_channels(self, found: int, path: str) -> None:
        if found != self.channels:
            plural = "s" * (found != 1)
            raise ChannelsError(f"{path}: has {found} channel{plural}, but the model takes {self.channels}.")

    def _values(self, image: Image.Image, path: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Values h × w × c of an open image file."""
        if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            pages = full_pages(image)
            for size in pages.values():
                check_pixels(*size, path, max_pixels)
            if len(pages) > 1:
                return self._stacked(image, pages, path)
            image.seek(next(iter(pages), 0))
        image = reinterpreted(image, self.value_range is None)
        values = high_bit_depth_values(image)
        if values is None and self.channels in (1, 3):
            values = np.asarray(to_rgb(image))
        elif values is None:
            image = upright(image)
            if image.has_transparency_data:
                image = image.convert("LA" if image.mode in ("L", "LA") else "RGBA")
            elif image.mode not in ("L", "RGB"):
                image = image.convert("RGB")
            values = np.asarray(image)
        values = values.reshape(*values.shape[:2], -1)
        if self.channels == 1 and (values == values[..., :1]).all():
            values = values[..., :1]
        self._check_channels(values.shape[2], path)
        return values

    def _stacked(self, image: Any, indices: Mapping[int, tuple[int, int]], path: str) -> np.ndarray:
        self._check_channels(len(indices), path)
        if len({*indices.values()}) > 1:
            raise ImageError(f"{path}: has pages of several sizes.")
        pages = []
        for index in indices:
            image.seek(index)
            page = reinterpreted(image, self.value_range is None)
            values = high_bit_depth_values(page)
            if values is None:
                values = np.asarray(page.convert("L") if page.mode in ("1", "P") else page)
            pages.append(values)
            if pages[-1].ndim != 2:
                raise ImageError(f"{path}: has several pages of several channels. Each page is one channel.")
        return np.stack(pages, axis=-1)

    def tensor(self, values: np.ndarray, name: str) -> Tensor:
        """Values h × w × c of a file -> float32 c × h × w in [−1, 1]. NaN becomes −1; values outside are clipped.

        Raises:
            ImageError: values without a known range, or floats outside 0 to 1 if no range is set.
        """
        advice = "Set data.value_range=LOW,HIGH, the values of black and white."
        low, high = self.value_range or (0.0, WHITE.get(values.dtype.name, 1.0))
        if values.dtype.kind == "f":
            finite = values[np.isfinite(values)]
            if not finite.size:
                raise ImageError(f"{name}: none of its values is finite.")
            if self.value_range is None and not (finite.min() >= 0 and finite.max() <= 1):
                raise ImageError(f"{name}: its values run from {finite.min():g} to {finite.max():g}. {advice}")
        elif values.dtype.kind not in "uib" or (values.dtype.name not in WHITE and self.value_range is None):
            raise ImageError(f"{name}: its values of type {values.dtype.name} have no range. {advice}")
        scaled = (values.astype(np.result_type(values.dtype, np.float32)) - low) / ((high - low) / 2) - 1
        scaled = np.nan_to_num(scaled, nan=-1.0, posinf=1.0, neginf=-1.0).clip(-1, 1).astype(np.float32)
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))

    def prepare(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        """Convert a PIL image, or a tensor c × h × w in [−1, 1], to the form that ``read`` returns.

        An image that PIL has opened and not loaded gives what its file gives.

        Raises:
            ImageError: no pixels, too many, another number of channels, or a PIL image that cannot be decoded.
        """
        check_pixels(*size_of(image))
        if isinstance(image, Tensor):
            self._check_channels(len(image), "image")
            return image.float() if image.is_floating_point() else image
        try:
            image = unloaded_copy(image)
            if reason := misread(image):
                raise ValueError(f"{reason}; give the file instead")
            if self.is_rgb:
                return to_rgb(reinterpreted(image))
            if loses_bands(image, self.channels):
                raise ValueError("PIL loses bands of it; give the file instead")
            return self.tensor(self._values(image, "image"), "image")
        except ImageError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            raise ImageError(f"image: cannot be decoded ({one_line(error)}).") from None

    def visible(self, images: Tensor) -> Tensor:
        """Select the RGB channels: b × c × h × w -> b × 3 × h × w."""
        return select_channels(images, self.colours)

    # Write

    def stored(self, image: Tensor) -> np.ndarray:
        """c × h × w in [−1, 1] -> values h × w × c as files hold them."""
        kind = STORED[self.bits]
        low, high = self.value_range or (0.0, WHITE[kind])
        values = (image.detach().cpu().double().clamp(-1, 1).numpy().transpose(1, 2, 0) + 1) * ((high - low) / 2) + low
        return (values if self.bits == 32 else values.round()).astype(kind)

    def to_pil(self, image: Tensor) -> Image.Image:
        """c × h × w in [−1, 1] -> PIL image: RGB, or a single channel of 8, 16 or 32 bits.

        Raises:
            ImageError: PIL does not support this many channels.
        """
        if self.is_rgb:
            return to_pil(image)
        if self.channels != 1:
            raise ImageError(
                f"Images of {self.channels} channels of {self.bits} bits cannot be PIL images. Write .tif or .npy "
                "files, or take the tensors that decode_tensor returns."
            )
        return Image.fromarray(self.stored(image)[..., 0])

    def to_file(self, image: Tensor, suffix: str) -> bytes:
        """c × h × w in [−1, 1] -> content of a ``.png``, ``.tif``, ``.tiff`` or ``.npy`` file.

        Raises:
            ImageError: PNG has no such images.
        """
        stream = io.BytesIO()
        if suffix == ARRAY:
            np.save(stream, np.squeeze(self.stored(image), 2) if self.channels == 1 else self.stored(image))
        elif suffix == ".png" or self.is_rgb:
            self.to_pil(image).save(stream, "PNG" if suffix == ".png" else "TIFF")
        else:
            first, *more = (Image.fromarray(page) for page in np.moveaxis(self.stored(image), 2, 0))
            first.save(stream, "TIFF", save_all=True, append_images=more, compression="tiff_adobe_deflate")
        return stream.getvalue()


def unloaded_copy(image: Image.Image) -> Image.Image:
    """Open the file of an image once more, at the same page, if PIL has opened it and would lose something of it.

    Once PIL has loaded an image, values of another depth or kind than its mode are lost. So the caller's object stays
    as it is, and a second call sees the same. An image that is loaded already is what PIL made of it.
    """
    file = getattr(image, "fp", None)
    if file is None or raw_mode(image) in ("", image.mode):
        return image
    position = file.tell()
    file.seek(0)
    content = io.BytesIO(file.read())
    file.seek(position)
    copy = Image.open(content, formats=[image.format] if image.format else None)
    if page := image.tell():
        copy.seek(page)
    return copy


def high_bit_depth_values(image: Image.Image) -> np.ndarray | None:
    """Values h × w or h × w × c of more than 8 bits, upright; ``None`` for an 8-bit image."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(upright(image))
        if image.mode == "I" and image.format != "TIFF":
            check_16_bits(values)
            return values.astype(np.uint16)
        return values
    raw = raw_mode(image)
    if raw == "LA;16B":  # grey with alpha: four bytes a pixel, like RGBA
        return np.ascontiguousarray(_decoded_as("RGBA", image)).view(">u2").astype(np.uint16)
    if not re.fullmatch("RGBA?;16[BLN]", raw):
        return None
    # Pillow keeps the high bytes; in the other byte order it keeps the low ones
    swapped = raw[:-1] + ("L" if raw[-1] == "B" or (raw[-1] == "N" and sys.byteorder == "big") else "B")
    low: np.ndarray = _decoded_as(swapped, image).astype(np.uint16)
    return np.asarray(upright(image), dtype=np.uint16) << 8 | low


def _decoded_as(raw: str, image: Any) -> np.ndarray:
    """Decode an open file once more, upright, with its values taken for another raw mode."""
    position = image.fp.tell()
    image.fp.seek(0)
    with Image.open(io.BytesIO(image.fp.read()), formats=[image.format]) as other:
        image.fp.seek(position)
        other.seek(image.tell())
        for i, tile in enumerate(other.tile):
            arguments = raw if isinstance(tile[3], str) else (raw, *tile[3][1:])
            other.tile[i] = getattr(tile, "_make", tuple)((*tile[:3], arguments))
        return np.asarray(upright(other))


def read_tensor(
    file: str | Path | BinaryIO,
    channels: int = 3,
    value_range: tuple[float, float] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Read an image file of any number of channels as float32 channels × h × w in [−1, 1].

    With three channels, a file is read as by ``read_image``: as 8-bit RGB. With other numbers, and from ``.npy`` files,
    values keep their depth: −1 and 1 are the ends of an 8- or 16-bit type, and 0 and 1 for floats. See
    ``flowmo.images.pixels.PixelFormat`` for the kinds of files.

    Args:
        channels: number of channels that the file must have.
        value_range: file values that become −1 and 1, such as ``(0, 4095)``.

    Raises:
        ImageError: as ``read_image``; the file has other channels; or its values have no known range.
    """
    return to_tensor(PixelFormat(channels, 8, value_range).read(file, max_pixels=max_pixels))
