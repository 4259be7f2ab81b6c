"""Reading image files: every format upright and in RGB, whatever metadata and odd values come with it."""

import io
import json
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import CASES
from PIL import Image, PngImagePlugin

import flowmo
from flowmo.cli import main
from flowmo.images import open_image, resize_and_crop, to_rgb

EXIF_ORIENTATION = 0x0112
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def read(content):
    return flowmo.read_image(io.BytesIO(content), "image")


def png(depth, colour, rows, *chunks):
    """A PNG written by hand. ``rows``: bytes of each row; ``chunks``: (type, data) before the image data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    channels = {0: 1, 2: 3}[colour]
    header = struct.pack(">IIBBBBB", 8 * len(rows[0]) // (depth * channels), len(rows), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def exif_block(*entries):
    """EXIF written by hand: (tag, type, count, four bytes) of each entry, little-endian."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)


def corners(image):
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(at) for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


# The small inputs that people's files look like


def test_the_cases_that_are_images():
    expected = json.loads((CASES / "expected.json").read_text())
    images = {name for name in expected if not name.endswith(".tar")}
    assert images == {"exif_odd_tag.jpg", "float_one_inf.tif", "grey16_transparent.png", "long_text.png"}

    assert flowmo.read_image(CASES / "exif_odd_tag.jpg").size == (20, 40)

    stored = np.array(Image.open(CASES / "float_one_inf.tif"))
    assert np.isposinf(stored).sum() == 1
    ramp = np.asarray(flowmo.read_image(CASES / "float_one_inf.tif"))
    assert (ramp[np.isposinf(stored)] == 255).all()
    wanted = np.broadcast_to(np.round(stored[np.isfinite(stored)])[:, None], (stored.size - 1, 3))
    assert (ramp[np.isfinite(stored)] == wanted).all()

    levels = np.array(Image.open(CASES / "grey16_transparent.png")).astype(int)
    grey = np.asarray(flowmo.read_image(CASES / "grey16_transparent.png"))
    assert (levels == 24158).any()
    assert (grey[levels == 24158] == 255).all()
    assert (grey[levels != 24158] == np.round(levels[levels != 24158] / 257)[:, None]).all()

    text = flowmo.read_image(CASES / "long_text.png")
    assert (text.mode, text.size, text.getcolors()) == ("RGB", (48, 32), [(48 * 32, (10, 200, 90))])


# Orientation


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_format_is_upright(form, orientation, tmp_path):
    """A file of each orientation is made by where EXIF 2.32 (section 4.6.4) puts its row 0 and column 0."""
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:16, :32], upright[:16, 32:], upright[16:, :32], upright[16:, 32:] = RED, GREEN, BLUE, WHITE
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],  # row 0 is the right-hand side
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],  # row 0 is the left-hand side, column 0 the bottom
    }[orientation]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a", form, exif=exif, **options)
    image = flowmo.read_image(tmp_path / "a")
    assert (image.mode, image.size) == ("RGB", (64, 32))
    assert to_rgb(image).size == (64, 32), "it is turned once"
    difference = np.abs(np.array(corners(image)) - np.array([RED, GREEN, BLUE, WHITE]))
    assert difference.max() <= 4


@pytest.mark.parametrize(
    "odd",
    [
        (0x0128, 2, 4, b"abc\0"),  # ResolutionUnit as text
        (0x011A, 3, 1, b"\1\0\0\0"),  # XResolution as an integer
        (0x0132, 3, 1, b"\1\0\0\0"),  # DateTime as a number
        (0x8769, 2, 4, b"abc\0"),  # pointer to the EXIF directory as text
        (0x8825, 4, 1, b"\xff\xff\xff\x7f"),  # pointer to GPS data beyond the end
        (0x9286, 7, 4000, b"\xff\xff\xff\x7f"),  # a comment that lies beyond the end
        (0x0129, 99, 1, b"\0\0\0\0"),  # a type that does not exist
    ],
    ids=["text", "integer", "number", "directory", "pointer", "beyond", "type"],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_odd_tags_beside_a_sound_orientation(odd, form):
    entries = sorted([(EXIF_ORIENTATION, 3, 1, b"\6\0\0\0"), odd])
    content = io.BytesIO()
    Image.new("RGB", (40, 20), RED).save(content, form, exif=exif_block(*entries))
    assert read(content.getvalue()).size == (20, 40)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0", exif_block()[:9], exif_block((274, 3, 1, b"\x09\0\0\0"))]
)
def test_metadata_without_a_sound_orientation_leaves_the_image_as_it_is(exif):
    content = io.BytesIO()
    Image.new("RGB", (40, 20), RED).save(content, "JPEG", exif=exif)
    assert read(content.getvalue()).size == (40, 20)


# Values


@pytest.mark.parametrize(
    ("odd", "grey"), [(np.inf, 255), (-np.inf, 0), (np.nan, 0)], ids=["infinity", "minus infinity", "NaN"]
)
@pytest.mark.parametrize("top", [1.0, 255.0, 4095.0])
def test_one_value_that_is_not_finite(odd, grey, top, tmp_path):
    values = np.linspace(0, top, 48, dtype=np.float32).reshape(6, 8)
    values[2, 3] = odd
    Image.fromarray(values).save(tmp_path / "a.tif")
    image = np.asarray(flowmo.read_image(tmp_path / "a.tif"))[..., 0].astype(int)
    expected = np.round(np.linspace(0, 255, 48)).astype(int).reshape(6, 8)
    expected[2, 3] = grey
    assert np.abs(image - expected).max() <= 1  # the ramp is of 32 bits
    assert image[2, 3] == grey


def test_a_float_image_without_a_finite_value_is_refused(tmp_path):
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(flowmo.ImageError, match=r"a\.tif: cannot be read \(none of its values is finite\)"):
        flowmo.read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("depth", "row", "level", "expected"),
    [
        (1, b"\x40", 1, [0, 255, 0, 0, 0, 0, 0, 0]),
        (1, b"\xbf", 0, [255] * 8),
        (2, b"\x1b", 2, [0, 85, 255, 255]),
        (4, b"\x3a", 10, [51, 255]),
        (8, b"\x03\x0a", 3, [255, 10]),
        (16, b"\x03\x00\x0a\x00", 0x0A00, [3, 255]),
        (16, b"\x0a\x01\x0a\x00", 0x0A00, [10, 255]),  # all 16 bits count
    ],
)
def test_the_transparent_level_of_a_grey_png(depth, row, level, expected):
    """The PNG specification compares the stored values, before they are scaled to 8 bits."""
    image = read(png(depth, 0, [row], (b"tRNS", struct.pack(">H", level))))
    assert [pixel[0] for pixel in (image.getpixel((x, 0)) for x in range(image.width))] == expected


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_a_png(depth):
    scale, form = (1, "B") if depth == 8 else (256, "H")
    colours = [(10, 20, 30), (10, 20, 31)]
    row = struct.pack(f">6{form}", *(scale * value for colour in colours for value in colour))
    key = struct.pack(">3H", *(scale * value for value in colours[0]))
    image = read(png(depth, 2, [row], (b"tRNS", key)))
    assert [image.getpixel((x, 0)) for x in range(2)] == [WHITE, colours[1]]


# Text


def text_chunks():
    long = b"parameters " * 300_000
    plain = b"Comment\0" + long
    packed = b"Comment\0\0" + zlib.compress(long)
    return {
        "tEXt": [(b"tEXt", plain)],
        "zTXt": [(b"zTXt", packed)],
        "iTXt": [(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(long))],
        "iCCP": [(b"iCCP", packed)],
        "many": [(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 900_000))] * 80,
    }


@pytest.mark.parametrize("kind", list(text_chunks()))
def test_any_amount_of_text_in_a_png(kind):
    image = read(png(8, 2, [bytes((10, 200, 90))], *text_chunks()[kind]))
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (10, 200, 90))


def test_text_behind_the_image_data():
    content = png(8, 2, [bytes((10, 200, 90))])
    data = b"zTXt" + text_chunks()["zTXt"][0][1]
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    assert read(content[:-12] + chunk + content[-12:]).getpixel((0, 0)) == (10, 200, 90)


def test_an_orientation_in_the_text_of_a_png_counts():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    content = io.BytesIO()
    Image.new("RGB", (40, 20), RED).save(content, "PNG", pnginfo=info)
    assert read(content.getvalue()).size == (20, 40)


def test_a_png_cut_anywhere_is_refused_by_its_name():
    content = png(8, 2, [bytes(range(90))] * 20, (b"tEXt", b"Comment\0hello"))
    for end in range(0, len(content) - 30, 7):
        with pytest.raises(flowmo.ImageError, match=r"^image: "):
            read(content[:end])


# Everywhere


def test_errors_are_one_line_that_names_the_file(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for path in (tmp_path / "text.png", tmp_path / "none.png", tmp_path):
        with pytest.raises(flowmo.ImageError, match=f"^{path}: ") as error:
            flowmo.read_image(path)
        assert "\n" not in str(error.value)


def test_more_pixels_than_asked_for_are_refused_before_they_are_decoded():
    with pytest.raises(flowmo.ImageError, match="image: 3×1 is more than 2 pixels"):
        flowmo.read_image(io.BytesIO(png(8, 0, [b"abc"])), "image", max_pixels=2)


@pytest.mark.parametrize("thin", [Image.new("RGB", (20_000, 1)), torch.zeros(3, 1, 20_000)])
def test_a_thin_image_is_refused_before_it_is_enlarged(thin):
    with pytest.raises(flowmo.ImageError, match="image, resized: 5120000×256 is more than"):
        resize_and_crop(thin, 256)


def test_concurrent_reads_restore_the_filters_of_warnings():
    """The read that ends last, not the one that began last, restores them."""
    before = warnings.filters[:]
    first, second = (open_image(io.BytesIO(png(8, 0, [b"a"])), "image", None, 10) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    warnings.warn("nothing is shown while an image is read", stacklevel=1)
    second.__exit__(None, None, None)
    assert warnings.filters == before


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".pgm", ".pbm", ".pnm"])
def test_further_names_of_the_formats(suffix, tmp_path):
    mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
    Image.new(mode, (4, 3)).save(tmp_path / f"a{suffix}", "JPEG" if suffix[1] == "j" else "PPM")
    assert flowmo.data.open_source(tmp_path).read(0).size == (4, 3)


def test_commands_read_such_images(tiny_model, tmp_path, capsys):
    files = [CASES / name for name in ("exif_odd_tag.jpg", "float_one_inf.tif", "long_text.png")]
    words = ["reconstruct", *files, "--model", tiny_model, "--out", tmp_path / "out", "--json"]
    assert main([str(word) for word in words]) == 0
    sizes = [(row["width"], row["height"]) for row in json.loads(capsys.readouterr().out)]
    assert sizes == [(20, 40), (48, 32), (48, 32)]


@pytest.mark.parametrize("kind", ["truncated", "integers"])
def test_a_pil_image_that_cannot_be_decoded_is_an_image_error(tiny, picture_files, kind):
    if kind == "truncated":
        content = picture_files[0].read_bytes()
        image = Image.open(io.BytesIO(content[: len(content) // 2]))
    else:  # of no known range
        image = Image.fromarray(np.full((40, 40), 100_000, dtype=np.int32))
    with pytest.raises(flowmo.ImageError, match="cannot be decoded"):
        tiny.encode_image(image)
