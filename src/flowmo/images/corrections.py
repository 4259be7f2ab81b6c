"""What Pillow reads otherwise than browsers and libtiff: orientation, and some kinds of TIFF and BMP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

ORIENTATION = 0x0112
"""EXIF tag."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the operation that turns the image upright. ``ImageOps.exif_transpose`` fails on odd tags."""
ORIENTED = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Keys of Pillow's metadata that may hold an orientation. They are removed once an image is upright."""
WHITE_16 = 65535
COLOUR_MAP = 320
"""TIFF tag of a palette: all red values, all green, all blue."""
WHITE_IS_ZERO, RGB, LAB, SIGNED = 0, 2, 8, 2
"""Values of the TIFF tags PhotometricInterpretation, three times, and SampleFormat."""
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
REDUCED = 254
"""TIFF tag; bit 0 marks a smaller copy of another page."""


def upright(image: Image.Image) -> Image.Image:
    """Load an image and turn it as its metadata says."""
    image.load()  # turns a TIFF
    turn = UPRIGHT.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
        image.info = {key: value for key, value in image.info.items() if key not in ORIENTED}
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 if it cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata makes Pillow raise anything
        return 1


def _tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    """Tags of a TIFF's page; none of another image."""
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def _is_deep(tags: Mapping[int, Any]) -> bool:
    """True for a TIFF of more than 8 bits a value."""
    return max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (8,))) > 8


def _is_planar(tags: Mapping[int, Any]) -> bool:
    """True for a TIFF that stores its bands one after another."""
    return tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1) > 1


def _is_signed(tags: Mapping[int, Any]) -> bool:
    """True for a TIFF of signed 8-bit values, which Pillow takes for unsigned ones."""
    return SIGNED in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()) and not _is_deep(tags)


def misread(image: Image.Image) -> str:
    """Say why Pillow would get the colours of a TIFF wrong; empty if it does not."""
    tags = _tiff_tags(image)
    if _is_signed(tags):
        return "its values are signed"
    if _is_planar(tags) and (_is_deep(tags) or tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == LAB):
        return "its bands are stored one after another, not pixel by pixel"
    return ""


def loses_bands(image: Image.Image, channels: int) -> bool:
    """True for a TIFF whose bands Pillow would drop, mix up, or divide by one another, for a model of ``channels``."""
    tags = _tiff_tags(image)
    if _is_planar(tags):  # Pillow mixes up such bands, unless they are 8-bit RGB
        return _is_deep(tags) or tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) != RGB
    if _is_signed(tags):
        return True
    # Pillow drops bands X, and divides premultiplied colours ("RGBa") by alpha
    return re.match("RGB(A?X|a)", raw_mode(image)) is not None and (_is_deep(tags) or channels not in (1, 3))


def reinterpreted(image: Image.Image, full_range: bool = True) -> Image.Image:
    """Read four kinds of file as browsers and libtiff do, unlike Pillow.

    A BMP with zero alpha everywhere is opaque: its writer left the fourth byte unused. A TIFF palette without a value
    above 255 has 8-bit colours, not nearly black 16-bit ones. 0 is white in a 16-bit TIFF that says so, as in others.
    White is 4095 in a 12-bit TIFF; ``full_range`` scales it to 65535.
    """
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")
    tags = _tiff_tags(image)
    if tags and image.mode == "P":
        colours = np.array(tags.get(COLOUR_MAP, ()))
        if colours.size and colours.max() <= 255:
            image.putpalette(colours.reshape(3, -1).T.astype(np.uint8).tobytes())
    if not (tags and image.mode.startswith("I;16")):
        return image
    white = 2 ** max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))) - 1
    inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
    scaled = full_range and white < WHITE_16
    if not (inverted or scaled):
        return image
    values = np.asarray(upright(image)).astype(np.uint32)
    values = white - values if inverted else values
    return Image.fromarray((values * WHITE_16 // white if scaled else values).astype(np.uint16))


def full_pages(image: Any) -> dict[int, tuple[int, int]]:
    """Indices and sizes of a TIFF's pages, without smaller copies of others."""
    pages = {}
    for index in range(image.n_frames):
        image.seek(index)
        if not image.tag_v2.get(REDUCED, 0) & 1:
            pages[index] = image.size
    return pages


def raw_mode(image: Image.Image) -> str:
    """Pillow's name of the values in an open file, such as ``RGB;16B``; empty for an image without a file."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
    return arguments if isinstance(arguments, str) else str(arguments[0]) if arguments else ""
