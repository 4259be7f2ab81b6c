"""AVIF and HEIC, the formats of phones: read upright where a package can, and told what to install where none can."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from flowmo.cli.output import image_suffixes
from flowmo.images import ImageError, read_image


def encoded(image, kind, **settings):
    file = io.BytesIO()
    image.save(file, kind, quality=90, **settings)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_read_as_saved(kind, picture):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    elif ".avif" not in image_suffixes():
        pytest.skip("this Pillow has no AVIF")
    small = picture.resize((90, 60))
    found = read_image(encoded(small, kind), "a")
    assert (found.mode, found.size) == ("RGB", (90, 60))
    assert np.abs(np.asarray(found, dtype=float) - np.asarray(small)).mean() < 4
    clear = small.convert("RGBA")
    clear.putalpha(0)
    assert np.asarray(read_image(encoded(clear, kind), "a")).min() == 255, "transparent is white"
    content = encoded(small, kind).getvalue()
    for cut in (12, 40, len(content) // 2):
        with pytest.raises(ImageError, match=r"^a: "):
            read_image(io.BytesIO(content[:cut]), "a")
    with pytest.raises(ImageError, match="90×60 is more than 5,000 pixels"):
        read_image(io.BytesIO(content), "a", max_pixels=5000)


def test_avif_is_turned_upright(picture):
    if ".avif" not in image_suffixes():
        pytest.skip("this Pillow has no AVIF")
    exif = Image.Exif()
    exif[0x0112] = 6
    small = picture.resize((90, 60))
    found = read_image(encoded(small, "AVIF", exif=exif), "a")
    assert np.abs(np.asarray(found.rotate(90, expand=True), dtype=float) - np.asarray(small)).mean() < 4


def test_without_the_packages(monkeypatch):
    start = b"\0\0\0\x1cftyp"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(
        ImageError, match=r"a\.heic: not an image .* HEIF pillow-heif \(pip install 'flowmo\[phone\]'\)"
    ):
        read_image(io.BytesIO(start + b"heic" + bytes(40)), "a.heic")
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    monkeypatch.setattr(Image, "init", lambda: 0)
    with pytest.raises(ImageError, match=r"a: not an image .* AVIF needs Pillow 11\.3 or newer"):
        read_image(io.BytesIO(start + b"avif" + bytes(40)), "a")
