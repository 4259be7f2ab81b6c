"""Images of 1, 4 and more channels: networks, files, sources, training and evaluation."""

import io
import json
import re
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from conftest import PICTURES, ROOT, TINY, TINY_NATIVE, open_gates, run_command
from PIL import Image

import flowmo
from flowmo import Config, ConfigError, FlowMo, save
from flowmo.codec.file import Codec
from flowmo.data import DataError, ImageDataset, Source, build_index, open_source
from flowmo.evaluate.reconstruction import Evaluators, Reconstruction, measure
from flowmo.evaluate.summary import Summary
from flowmo.generate.tokenize import tokenize
from flowmo.images import ImageError, to_tensor
from flowmo.images.pixels import PixelFormat
from flowmo.losses.perceptual import LPIPS, build_distance
from flowmo.losses.stages import perceptual_loss


def tokenizer(channels, native=False, **settings):
    torch.manual_seed(0)
    config = Config.from_dict(TINY_NATIVE if native else TINY).updated({"model.channels": channels, **settings})
    return open_gates(FlowMo(config)).eval().requires_grad_(False)


def noise_images(channels, size=32, count=2):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1


# Networks


@pytest.mark.parametrize("native", [False, True], ids=["double_stream", "windowed"])
@pytest.mark.parametrize("channels", [1, 4, 7])
def test_images_of_any_channels_go_through_both_networks(channels, native):
    tok = tokenizer(channels, native)
    images = noise_images(channels, 64 if native else 32)
    codes = tok.encode(images)
    assert codes.ids.shape[1] == tok.code_length, "the number of tokens does not depend on the channels"
    decoded = tok.decode(codes, steps=2)
    assert decoded.shape == images.shape
    changed = images.clone()
    changed[:, -1] = -changed[:, -1]
    code, other = (tok.encoder(x) for x in (images, changed))
    assert (code - other).abs().max() > 1e-4, "the last channel is read"
    assert (decoded[:, -1] - decoded[:, 0]).abs().max() > 1e-4 or channels == 1, "and written"


def test_the_identity_of_colour_models_is_what_it_was():
    assert Config.from_dict(TINY).updated({"model.channels": 3}) == Config.from_dict(TINY)
    assert tokenizer(3).identity() == tokenizer(3).identity() != tokenizer(4).identity()
    assert Config().override("data.channels=4").model.channels == 4


def test_images_of_other_channels_are_refused(tiny):
    with pytest.raises(ValueError, match=r"\(2, 4, 32, 32\); give at least one as \(batch, 3, height, width\)"):
        tiny.encode(noise_images(4))
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\); give at least one as \(batch, 4, height, width\)"):
        tokenizer(4).encode(noise_images(3))


# Perceptual channels


def test_perceptual_channels():
    named = {(1, ""): [0, 0, 0], (2, "1"): [1, 1, 1], (3, ""): [0, 1, 2], (5, ""): [0, 1, 2], (5, "4,2,1"): [4, 2, 1]}
    for (channels, text), expected in named.items():
        config = Config().updated({"model.channels": channels, "opt.perceptual_channels": text})
        assert config.perceptual_channels == expected
    with pytest.raises(ConfigError, match=r"0,1,4 must be from 0 to 3, since model\.channels=4"):
        Config().override("model.channels=4", "opt.perceptual_channels=0,1,4")
    for text in ("0,1", "red", "0,1,2,3", "-1"):
        with pytest.raises(ConfigError, match="three channels such as"):
            Config().override("model.channels=4", f"opt.perceptual_channels={text}")


@pytest.mark.parametrize("mode", ["alex", "resnet"])
def test_a_perceptual_network_sees_the_named_channels(tiny_config, mode):
    torch.manual_seed(0)
    distance = build_distance(mode, pretrained=False)
    x, y = noise_images(5, 64), noise_images(5, 64).flip(0)
    for named, channels in (("4,2,1", [4, 2, 1]), ("3", [3, 3, 3])):
        config = tiny_config.override("model.channels=5", f"opt.perceptual_channels={named}")
        loss = perceptual_loss(distance, FlowMo(config), x, y)
        assert torch.equal(loss, distance(x[:, channels], y[:, channels]).mean())
    assert isinstance(build_distance("vgg", None, False), LPIPS)


# Files


RNG = np.random.default_rng(0)


def write_png16(path, values):
    """A 16-bit PNG h × w × c, written by hand."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_pages(path, values):
    first, *more = (Image.fromarray(page) for page in values)
    first.save(path, "TIFF", save_all=True, append_images=more)


def write_npy(path, values):
    np.save(path, values)


def unit(values, low, high):
    """The formula of the documentation: low is −1, high is 1."""
    return torch.from_numpy(2 * (values.astype(np.float64) - low) / (high - low) - 1).float()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_keeps_every_bit(channels, tmp_path):
    values = RNG.integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    write_png16(tmp_path / "a.png", values)
    read = PixelFormat(channels, 16).read(tmp_path / "a.png")
    assert torch.allclose(read, unit(values.transpose(2, 0, 1), 0, 65535), atol=1e-7)
    assert len(torch.unique(read)) == len(np.unique(values)), "no two values become one"


@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_16_bit_colour_tiff_keeps_every_bit(compression, byteorder, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", compression=compression, byteorder=byteorder)
    read = PixelFormat(3, 16).read(tmp_path / "a.tif")
    assert torch.allclose(read, unit(values.transpose(2, 0, 1), 0, 65535), atol=1e-7)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_tiffs_whose_bands_pillow_drops_or_mixes_up(dtype, compression, tmp_path):
    """Bands beyond RGB of no meaning or of premultiplied alpha, and one band after another."""
    tifffile = pytest.importorskip("tifffile")
    values = RNG.integers(0, np.iinfo(dtype).max + 1, (5, 7, 4), dtype=dtype)
    expected = unit(values.transpose(2, 0, 1), 0, np.iinfo(dtype).max)
    kinds = [{"photometric": "rgb", "extrasamples": [extra]} for extra in ("unspecified", "assocalpha")]
    kinds += [{"photometric": kind, "planarconfig": "separate"} for kind in ("rgb", "minisblack")]
    for kind in kinds:
        bands = values.transpose(2, 0, 1) if "planarconfig" in kind else values
        tifffile.imwrite(tmp_path / "a.tif", bands, compression=compression, **kind)
        assert torch.allclose(PixelFormat(4, 16).read(tmp_path / "a.tif"), expected, atol=1e-6), kind


def test_tiffs_that_pillow_misreads_are_refused_or_put_right(tmp_path):
    """Deep bands one after another, signed values, and values of which 0 is white."""
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "a.tif"
    colours = RNG.integers(0, 65536, (3, 5, 7), dtype=np.uint16)
    tifffile.imwrite(path, colours, photometric="rgb", planarconfig="separate")
    with pytest.raises(ImageError, match="one after another"):
        flowmo.read_image(path)
    tifffile.imwrite(path, (colours >> 8).astype(np.uint8), photometric="rgb", planarconfig="separate")
    assert (np.asarray(flowmo.read_image(path)) == (colours >> 8).transpose(1, 2, 0)).all()
    tifffile.imwrite(path, np.full((4, 4), -100, np.int8), photometric="minisblack")
    with pytest.raises(ImageError, match="signed"):
        flowmo.read_image(path)
    with pytest.raises(ImageError, match="type int8 have no range"):
        flowmo.read_tensor(path, 1)
    assert flowmo.read_tensor(path, 1, (-128, 127)).mean() == pytest.approx(28 / 127.5 - 1)
    for dtype in (np.uint8, np.uint16):
        grey, top = RNG.integers(0, np.iinfo(dtype).max, (5, 7), dtype=dtype), np.iinfo(dtype).max
        tifffile.imwrite(path, grey, photometric="miniswhite")
        assert torch.allclose(flowmo.read_tensor(path, 1), unit(top - grey[None], 0, top), atol=1e-6)
        shown = np.asarray(flowmo.read_image(path))[..., 0]
        assert (shown == np.round((top - grey) * (255 / top))).all()


def write_12_bit_tiff(path, values):
    """Values h × w below 4096, w even, packed without compression. Pillow writes no such file."""
    height, width = values.shape
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: height}
    tags[279] = len(packed)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + packed)


def test_white_is_4095_in_a_tiff_of_12_bits(tmp_path):
    path, values = tmp_path / "twelve.tif", np.array([[0, 1024], [2048, 4095]])
    write_12_bit_tiff(path, values)
    read = flowmo.read_tensor(path, 1)[0]
    assert torch.allclose(read, torch.tensor(values / 4095 * 2 - 1).float(), atol=4e-5)
    assert np.array_equal(np.asarray(flowmo.read_image(path))[..., 0], [[0, 64], [128, 255]])
    assert torch.allclose(flowmo.read_tensor(path, 1, (0, 4095)), unit(values[None], 0, 4095), atol=1e-6)


@pytest.mark.parametrize("subfiletype", [0, 1])
def test_every_page_of_a_tiff_counts_against_the_limit(subfiletype, tmp_path):
    """A large page behind a small one that is a channel, too, or a smaller copy."""
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(np.zeros((4, 4), np.uint16), photometric="minisblack", subfiletype=subfiletype)
        tiff.write(np.zeros((40, 40), np.uint16), photometric="minisblack")
    with pytest.raises(ImageError, match="40×40 is more than 100 pixels"):
        flowmo.read_tensor(tmp_path / "a.tif", 2 - subfiletype, max_pixels=100)


def test_a_pil_image_is_what_its_file_is(tmp_path):
    """Files that Pillow reads in its own way, opened by the user and by us."""
    white = Image.fromarray(np.full((4, 6), 65535, np.uint16))
    white.save(tmp_path / "inverted.tif", tiffinfo={262: 0})
    write_png16(tmp_path / "deep.png", np.arange(4 * 6 * 3, dtype=np.uint16).reshape(4, 6, 3) * 811)
    write_12_bit_tiff(tmp_path / "twelve.tif", np.full((4, 6), 4095))
    for name, pixels in (
        ("inverted.tif", PixelFormat()),
        ("inverted.tif", PixelFormat(1, 16)),
        ("deep.png", PixelFormat(3, 16)),
        ("deep.png", PixelFormat()),
        ("twelve.tif", PixelFormat()),
    ):
        with Image.open(tmp_path / name) as image:
            first, second, file = pixels.prepare(image), pixels.prepare(image), pixels.read(tmp_path / name)
        for ours in (first, second):
            assert torch.equal(to_tensor(ours), to_tensor(file)), (name, pixels)
    for value in (65536, -1):
        with pytest.raises(ImageError, match="no known range"):
            PixelFormat(1, 16).prepare(Image.new("I", (4, 4), value))
    half = torch.zeros(3, 4, 6, dtype=torch.float16)
    assert PixelFormat().prepare(half).dtype == torch.float32


def test_a_transparent_colour_is_a_fourth_channel(tmp_path):
    image = Image.new("RGB", (4, 4), (10, 20, 30))
    image.putpixel((1, 0), (1, 2, 3))
    image.save(tmp_path / "keyed.png", transparency=(1, 2, 3))
    read = flowmo.read_tensor(tmp_path / "keyed.png", 4)
    assert read.shape == (4, 4, 4)
    assert read[3, 0].tolist() == [1, -1, 1, 1]


@pytest.mark.parametrize("first", [False, True])
def test_a_smaller_copy_in_a_tiff_is_no_channel(first, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = RNG.integers(0, 65536, (6, 8, 3), dtype=np.uint16)
    pages = [(values, 0), (values[::2, ::2], 1)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for page, subfiletype in pages[::-1] if first else pages:
            tiff.write(page, photometric="rgb", subfiletype=subfiletype)
    read = PixelFormat(3, 16).read(tmp_path / "a.tif")
    assert torch.allclose(read, unit(values.transpose(2, 0, 1), 0, 65535), atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "limits", "value_range"),
    [
        ("uint8", (0, 255), None),
        ("uint16", (0, 65535), None),
        ("uint16", (0, 4095), (0, 4095)),
        ("float32", (0, 1), None),
        ("float32", (-3, 5), (-3, 5)),
    ],
)
@pytest.mark.parametrize("kind", ["pages", "channels last", "channels first", "bands"])
def test_many_channels_of_every_type(kind, dtype, limits, value_range, tmp_path):
    low, high = limits
    values = (RNG.random((4, 6, 5)) * (high - low) + low).astype(dtype)
    path = tmp_path / ("a.npy" if "channels" in kind else "a.tif")
    if kind == "pages":
        write_pages(path, values)
    elif kind == "bands":
        how = {"photometric": "minisblack", "planarconfig": "contig"}
        pytest.importorskip("tifffile").imwrite(path, values.transpose(1, 2, 0), **how)
    else:
        np.save(path, values if kind == "channels first" else values.transpose(1, 2, 0))
    read = flowmo.read_tensor(path, 4, value_range)
    assert read.dtype == torch.float32
    assert torch.allclose(read, unit(values, low, high), atol=1e-6)


def test_grey_files(tmp_path):
    grey = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
    expected = unit(grey[None], 0, 255)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.repeat(grey[..., None], 3, 2)).save(tmp_path / "colour.png")
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(grey[::-1, ::-1].copy()).save(tmp_path / "turned.png", exif=exif)
    write_png16(tmp_path / "deep.png", np.repeat(257 * grey[..., None].astype(np.uint16), 3, 2))
    np.save(tmp_path / "a.npy", grey)
    for name in ("grey.png", "colour.png", "turned.png", "deep.png", "a.npy"):
        assert torch.allclose(flowmo.read_tensor(tmp_path / name, 1), expected, atol=1e-7), name
    Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / "float.tif")
    assert torch.allclose(flowmo.read_tensor(tmp_path / "float.tif", 1), expected, atol=1e-6)
    exif[274] = 6
    deep = RNG.integers(0, 65536, (4, 6), dtype=np.uint16)
    Image.fromarray(np.rot90(deep).copy()).save(tmp_path / "deep.tif", tiffinfo={274: 6})
    assert torch.allclose(flowmo.read_tensor(tmp_path / "deep.tif", 1), unit(deep[None], 0, 65535), atol=1e-6)


def test_colour_is_read_as_ever(picture_files, tmp_path):
    for file in picture_files[:2]:
        assert torch.equal(flowmo.read_tensor(file), to_tensor(flowmo.read_image(file)))
    colour = np.asarray(flowmo.read_image(picture_files[0]))
    np.save(tmp_path / "a.npy", colour)
    assert torch.equal(flowmo.read_tensor(tmp_path / "a.npy"), to_tensor(flowmo.read_image(picture_files[0])))


def test_not_finite_values(tmp_path):
    values = np.array([[0.25, np.nan, np.inf, -np.inf]], np.float32)
    np.save(tmp_path / "a.npy", values)
    assert flowmo.read_tensor(tmp_path / "a.npy", 1).flatten().tolist() == [-0.5, -1, 1, -1]


@pytest.mark.parametrize(
    ("name", "values", "channels", "reason"),
    [
        ("a.npy", np.zeros((8, 8, 3), np.uint8), 4, "has 3 channels, but the model takes 4"),
        ("a.npy", np.zeros((8, 8), np.uint8), 4, "has 1 channel, but the model takes 4"),
        ("a.npy", np.zeros((5, 8, 8, 3), np.uint8), 3, "is an array of 4 axes. An image has 2 or 3"),
        ("a.npy", np.zeros((0, 8, 3), np.uint8), 3, "8×0 has no pixels"),
        ("a.npy", np.full((8, 8, 4), 9, np.float32), 4, "its values run from 9 to 9. Set data.value_range=LOW,HIGH"),
        ("a.npy", np.full((8, 8, 4), np.nan, np.float32), 4, "none of its values is finite"),
        ("a.npy", np.zeros((8, 8, 4), np.int32), 4, "its values of type int32 have no range"),
        ("a.npy", np.zeros((8, 8, 4), np.complex64), 4, "its values of type complex64 have no range"),
        ("a.npy", np.array([[{}]], object), 1, "cannot be read"),
        ("a.tif", np.zeros((5, 8, 8), np.uint16), 4, "has 5 channels, but the model takes 4"),
        ("a.png", np.zeros((8, 8, 3), np.uint8) + np.arange(3, dtype=np.uint8), 1, "has 3 channels, but the model"),
        ("a.png", np.zeros((8, 8), np.uint8), 4, "has 1 channel, but the model takes 4"),
        ("a.png", np.zeros((8, 8, 3), np.uint8), 5, "has 3 channels, but the model takes 5"),
    ],
)
def test_files_that_do_not_fit(name, values, channels, reason, tmp_path):
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, values, allow_pickle=True)
    elif name == "a.tif":
        write_pages(path, values)
    else:
        Image.fromarray(values).save(path)
    with pytest.raises(flowmo.ImageError, match=f"^{re.escape(f'{path}: {reason}')}") as error:
        flowmo.read_tensor(path, channels)
    assert "\n" not in str(error.value)


def test_damaged_and_oversized_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((40, 50, 4), np.uint8))
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:-100])
    (tmp_path / "head.npy").write_bytes(content[:9])
    (tmp_path / "text.npy").write_text("no array")
    for name in ("cut", "head", "text", "none"):
        with pytest.raises(flowmo.ImageError, match=rf"^{tmp_path}/{name}\.npy: "):
            flowmo.read_tensor(tmp_path / f"{name}.npy", 4)
    with pytest.raises(flowmo.ImageError, match="50×40 is more than 1,999 pixels"):
        flowmo.read_tensor(tmp_path / "a.npy", 4, max_pixels=1999)


FORMATS = [PixelFormat(1), PixelFormat(1, 16), PixelFormat(1, 32), PixelFormat(4), PixelFormat(5, 16, (0, 4095))]
FORMATS += [PixelFormat(2, 32, (-3, 5)), PixelFormat(3, 16)]


@pytest.mark.parametrize("pixels", FORMATS, ids=str)
def test_what_is_written_is_read(pixels, tmp_path):
    low, high = pixels.value_range or (0, {8: 255, 16: 65535, 32: 1}[pixels.bits])
    values = RNG.random((pixels.channels, 6, 5)) * (high - low) + low
    values = values.astype(np.float32) if pixels.bits == 32 else values.round()
    image = unit(values, low, high)
    expected = ".png" if pixels.channels == 1 and pixels.bits < 32 else ".tif"
    assert pixels.suffix == expected
    for suffix in {expected, ".tif", ".tiff", ".npy"}:
        path = tmp_path / f"a{suffix}"
        path.write_bytes(pixels.to_file(image, suffix))
        assert torch.allclose(pixels.read(path), image, atol=1e-6), suffix
        if suffix == ".npy":
            assert np.allclose(np.squeeze(np.load(path)), np.squeeze(values.transpose(1, 2, 0)), atol=1e-5)


def test_formats_that_would_cut_values(tmp_path, capsys, picture):
    """Pillow clips 16-bit and floating-point grey to 8 bits where a format has no more."""
    files = {8: (".jpg", ".webp", ".png", ".ppm"), 16: (".png", ".ppm"), 32: ()}
    picture.convert("L").resize((40, 32)).save(tmp_path / "grey.png")
    for bits, holding in files.items():
        save(tokenizer(1, **{"data.bit_depth": bits}), tmp_path / "model.safetensors")
        model = ("--model", tmp_path / "model.safetensors", "--force")
        assert run_command(capsys, "encode", tmp_path / "grey.png", tmp_path / "a.flowmo", *model)[0] == 0
        assert run_command(capsys, "decode", tmp_path / "a.flowmo", tmp_path / "a.tif", *model)[0] == 0
        for suffix in (".jpg", ".webp", ".png", ".ppm"):
            file = tmp_path / f"a{suffix}"
            status, _, err = run_command(capsys, "decode", tmp_path / "a.flowmo", file, *model)
            if suffix in holding:
                limit = 0.1 if suffix == ".jpg" else 1 / 255
                written, expected = (flowmo.read_tensor(path, 1) for path in (file, tmp_path / "a.tif"))
                assert (written - expected).abs().mean() < limit, (bits, suffix)
            else:
                assert (status, "1 × " in err) == (2, True), err


def test_settings_of_files():
    with pytest.raises(ValueError, match="first value must be the smaller one"):
        PixelFormat(1, 8, (3, 3))
    config = Config().override("data.channels=2", "data.bit_depth=16", "data.value_range=0,4095")
    assert PixelFormat.of(config) == PixelFormat(2, 16, (0, 4095), (0, 0, 0))
    assert PixelFormat.of(Config()).is_rgb
    for text, reason in {"5,1": "smaller one", "0,5000": "8 bits", "-1,1": "8 bits", "black": "two numbers"}.items():
        with pytest.raises(ConfigError, match=reason):
            Config().override(f"data.value_range={text}")
    with pytest.raises(ConfigError, match="8, 16 or 32"):
        Config().override("data.bit_depth=12")


# Sources


def write_bands(folder, count=3, size=(40, 32), dtype=np.uint16):
    """``.npy`` files of four channels: photographs with a fourth channel made of the others."""
    folder.mkdir(parents=True, exist_ok=True)
    scale = 257 if dtype == np.uint16 else 1
    for i, file in enumerate(sorted(PICTURES.glob("*.jpg"))[:count]):
        colour = np.asarray(flowmo.read_image(file).resize(size)).astype(int)
        infrared = np.clip(2 * colour[..., 1] - colour[..., 0], 0, 255)[..., None]
        np.save(folder / f"{i}.npy", (np.concatenate((colour, infrared), axis=2) * scale).astype(dtype))
    return folder


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, file in files.items():
            tar.add(file, name)
    return path


@pytest.mark.parametrize("kind", ["folder", "tar", "webdataset", "indexed"])
def test_arrays_are_items_of_every_source(kind, tmp_path):
    bands = write_bands(tmp_path / "bands")
    (tmp_path / "0.cls").write_text("7")
    source = bands
    if kind != "folder":
        source = tmp_path / "shard-000.tar"
        files = {f"{i}.npy": bands / f"{i}.npy" for i in range(3)}
        labels = {f"{i}.cls": tmp_path / "0.cls" for i in range(3)}
        tar_of(source, files | labels if kind != "tar" else files)
        if kind == "indexed":
            (tmp_path / "shard-000.index.json").write_text(json.dumps(build_index(source)[0]))
    found = open_source(source)
    assert [found.name(i).rpartition("/")[2].rpartition(":")[2] for i in range(len(found))] == [
        "0.npy",
        "1.npy",
        "2.npy",
    ]
    assert list(found.labels) == [None if kind in ("folder", "tar") else 7] * 3
    images = ImageDataset(found, 32, pixels=PixelFormat(4, 16))
    image, errors = images.load(1, 0)
    assert errors == {}
    expected = unit(np.load(bands / "1.npy").transpose(2, 0, 1), 0, 65535)[:, :, 4:36]
    assert torch.allclose(image, expected, atol=1e-6), "the central square"
    with pytest.raises(DataError, match=r"\.npy: has 4 channels, but the model takes 3"):
        ImageDataset(found, 32).load(0, 0)


def test_arrays_beside_images_are_no_items(tmp_path, picture):
    bands = write_bands(tmp_path / "bands")
    picture.save(bands / "photo.jpg")
    assert [file.name for file in open_source(bands).files] == ["photo.jpg"]
    tar = tar_of(tmp_path / "a.tar", {"0.npy": bands / "0.npy", "0.jpg": bands / "photo.jpg"})
    assert [entry["name"] for entry in build_index(tar)[0]] == ["0.jpg"]


def test_pages_are_items(tmp_path):
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        write_pages(tmp_path / str(i) / "a.tif", RNG.integers(0, 65536, (5, 40, 32), dtype=np.uint16))
    source = open_source(tmp_path)
    assert source.classes == ("0", "1")
    assert ImageDataset(source, 16, pixels=PixelFormat(5, 16)).load(0, 0)[0].shape == (5, 16, 16)


def test_crops_of_tensors_are_those_of_images(picture):
    """Crop and flip depend on the seed alone. Resizing agrees with Pillow's up to its rounding to 8 bits."""

    class One(Source):
        classes, labels = (), (None,)

        def name(self, index):
            return "photo"

        def file(self, index):
            stream = io.BytesIO()
            picture.crop((0, 0, 180, 120)).save(stream, "PNG")
            return io.BytesIO(stream.getvalue())

    plain, deep = (
        ImageDataset(One(), 64, random_crop=True, random_flip=True, pixels=PixelFormat(3, bits)) for bits in (8, 16)
    )
    for seed in range(6):
        difference = (plain.load(0, seed)[0] - deep.load(0, seed)[0]).abs()
        assert difference.max() <= 1.6 / 127.5


# Images of any size, evaluation, training


@pytest.mark.parametrize("native", [False, True], ids=["double_stream", "windowed"])
def test_whole_images_and_their_files(native, tmp_path):
    tok = tokenizer(4, native, **{"data.bit_depth": 16})
    values = RNG.integers(0, 65536, (4, 50, 90), dtype=np.uint16)
    write_pages(tmp_path / "a.tif", values)
    image = tok.pixels.read(tmp_path / "a.tif")
    codes = tok.encode_image(image)
    assert codes.output_size == (50, 90)
    codec = Codec(tok)
    decoded = tok.decode_tensor(codec.unpack(codec.pack(codes)), steps=1)
    assert decoded.shape == image.shape
    assert torch.equal(decoded, tok.decode_tensor(codes, steps=1))
    assert tok.encode_image(image, fit="crop").output_size == (tok.config.data.image_size,) * 2
    with pytest.raises(ValueError, match="Images of 4 channels of 16 bits cannot be PIL images"):
        tok.decode_image(codes, steps=1)
    with pytest.raises(flowmo.ImageError, match="image: has 3 channels, but the model takes 4"):
        tok.encode_image(image[:3])
    with pytest.raises(TypeError, match=r"PIL image or one tensor c × h × w, not a Tensor"):
        tok.encode_image(image[None])


@pytest.mark.parametrize(("bits", "mode"), [(8, "L"), (16, "I;16"), (32, "F")])
def test_grey_images_are_pil_images(bits, mode, picture):
    tok = tokenizer(1, **{"data.bit_depth": bits})
    grey = picture.convert("L").resize((40, 36))
    decoded = tok.decode_image(tok.encode_image(grey), steps=1)
    assert (decoded.mode, decoded.size) == (mode, (40, 36))
    tensor = tok.decode_tensor(tok.encode_image(to_tensor(picture.resize((40, 36)).convert("RGB"))[:1]), steps=1)
    assert tensor.shape == (1, 36, 40)


def test_colour_tokenizers_take_tensors_too(tiny, picture):
    image = picture.resize((40, 36))
    assert tiny.encode_image(to_tensor(image)) == tiny.encode_image(image)
    with pytest.raises(flowmo.ImageError, match="image: has 4 channels, but the model takes 3"):
        tiny.encode_image(torch.zeros(4, 40, 40))


class Noisy:
    """A reconstructor whose error grows with the channel."""

    name, id_count = "noisy", None

    def reconstruct(self, images, indices):
        shift = torch.arange(1, images.shape[1] + 1)[None, :, None, None] * 4 / 127.5
        return Reconstruction(torch.where(images > 0, images - shift, images + shift), torch.full((len(images),), 8.0))


def test_metrics_of_each_channel(tmp_path):
    metrics = pytest.importorskip("skimage.metrics")
    bands = write_bands(tmp_path / "bands", dtype=np.uint8)
    pixels = PixelFormat(4, colours=(3, 2, 1))
    alex = LPIPS("alex", pretrained=False)
    measured = measure(Noisy(), open_source(bands), 32, Evaluators(lpips_alex=alex), pixels=pixels)
    summary = Summary.of("noisy", measured)
    expected = [20 * np.log10(255 / (4 * c)) for c in range(1, 5)]
    assert np.allclose(summary.psnr_of_channels, expected, atol=1e-6)
    assert summary.psnr == pytest.approx(10 * np.log10(255**2 / np.mean([(4 * c) ** 2 for c in range(1, 5)])), abs=1e-6)
    ssims, distances = [], []
    for i in range(3):
        x = to_tensor(torch.from_numpy(np.load(bands / f"{i}.npy")[:, 4:36].transpose(2, 0, 1)) / 127.5 - 1)[
            None
        ].float()
        y = Noisy().reconstruct(x, [0]).images
        a, b = (np.round((z[0].numpy() + 1) * 127.5).clip(0, 255).astype(np.uint8) for z in (x, y))
        ssims.append([metrics.structural_similarity(p, q, data_range=255) for p, q in zip(a, b, strict=True)])
        distances.append(float(alex(x[:, [3, 2, 1]], y[:, [3, 2, 1]])))
    assert np.allclose(summary.ssim_of_channels, np.mean(ssims, axis=0), atol=1e-6)
    assert summary.ssim == pytest.approx(np.mean(ssims), abs=1e-6)
    assert summary.lpips_alex == pytest.approx(np.mean(distances), rel=1e-4)
    assert any(line.startswith("PSNR of channels ↑") and " 36.0" in line for line in summary.lines())


RECIPES = ROOT / "configs"
SHORT = ("trainer.duration=2 steps", "data.global_batch_size=2", "data.num_workers=0", "trainer.tensorboard=false")
SMALL = (
    *("model.hidden_size=64", "model.num_heads=2", "model.dec_depth=2"),
    *("model.enc_hidden_size=64", "model.enc_num_heads=2", "model.enc_depth=1", "opt.lpips_weight=0"),
)


def train(capsys, out, recipe, data, *settings):
    words = ("--config", RECIPES / f"{recipe}.yaml", "--results-dir", out, "--experiment-name", recipe)
    return run_command(capsys, "train", *words, f"data.train={data}", f"data.val={data}", *SHORT, *SMALL, *settings)


def test_the_recipe_for_many_channels_trains_in_all_stages(tmp_path, capsys):
    """Stage 1A samples a grid and measures; 1B goes on from it; ids become tokens."""
    bands = write_bands(tmp_path / "bands", count=2, size=(80, 64))
    settings = ("trainer.sample_every=1 step", "trainer.best_metric=psnr", "data.crop_sizes=32x64 64x32")
    status, out, err = train(capsys, tmp_path, "multispectral", bands, *settings)
    assert status == 0, err
    assert "held_out_psnr" in out
    assert flowmo.read_image(next((tmp_path / "multispectral" / "samples").iterdir())).width > 64
    first = tmp_path / "multispectral" / "checkpoints" / "00000002.pth"
    tok = flowmo.load(first)
    assert (tok.config.model.channels, tok.pixels.bits) == (4, 16)
    posttrain = ("model.posttrain_sample=true", "model.posttrain_sample_k=2", "--resume-from-ckpt", first)
    settings = ("trainer.duration=4 steps", "--experiment-name", "1b")
    status, out, err = train(capsys, tmp_path, "multispectral", bands, *posttrain, *settings)
    assert status == 0, err
    assert "stage 1B" in out
    tokens = tokenize(tok, open_source(bands), tmp_path / "tokens")
    assert tokens.count == 2
    with pytest.raises(flowmo.ImageError, match=r"0\.npy: has 4 channels, but the model takes 1"):
        tokenize(tokenizer(1), open_source(bands), tmp_path / "others")


def test_the_recipe_for_grey_images_trains_and_refuses_colour(tmp_path, capsys, picture):
    for folder, mode in (("grey", "L"), ("colour", "RGB")):
        (tmp_path / folder).mkdir()
        picture.convert(mode).resize((80, 64)).save(tmp_path / folder / "a.png")
    status, _, err = train(capsys, tmp_path, "grey", tmp_path / "grey", "data.crop_sizes=32x64")
    assert status == 0, err
    tok = flowmo.load(tmp_path / "grey")
    assert tok.decode_image(tok.encode_image(Image.open(tmp_path / "grey" / "a.png"))).mode == "L"
    codes = tok.encode(noise_images(1, 64)[:, :, :32])
    assert tok.decode(codes).shape == (2, 1, 32, 64), "images need not be square"
    status, _, err = train(capsys, tmp_path / "2", "grey", tmp_path / "colour")
    assert status != 0
    assert "a.png: has 3 channels, but the model takes 1" in err


def test_fine_tuning_from_other_channels_is_refused(tmp_path, capsys):
    bands = write_bands(tmp_path / "bands", count=1, size=(80, 64))
    config = Config.from_yaml(RECIPES / "multispectral.yaml").override(*SMALL, "model.channels=3")
    save(FlowMo(config), tmp_path / "rgb.safetensors")
    start = ("--resume-from-ckpt", tmp_path / "rgb.safetensors")
    status, _, err = train(capsys, tmp_path, "multispectral", bands, *start)
    assert status != 0
    assert "model.channels 3 -> 4. These tensors do not fit: encoder.picture_in" in err


def test_commands_write_what_the_data_were(tmp_path, capsys, picture):
    save(tokenizer(4, **{"data.bit_depth": 16}), tmp_path / "four.safetensors")
    save(tokenizer(1, **{"data.bit_depth": 16}), tmp_path / "one.safetensors")
    bands = write_bands(tmp_path / "bands", count=1) / "0.npy"
    grey = tmp_path / "grey.png"
    picture.convert("L").resize((40, 32)).save(grey)
    for model, file, suffix in (("four", bands, ".tif"), ("one", grey, ".png")):
        model = ("--model", tmp_path / f"{model}.safetensors", "--force")
        assert run_command(capsys, "encode", file, tmp_path / "a.flowmo", *model)[0] == 0
        status, out, err = run_command(capsys, "decode", tmp_path / "a.flowmo", *model)
        assert status == 0, err
        written = tmp_path / f"a.flowmo{suffix}"
        assert f"{written}: 40×32" in out
        pages = getattr(image := Image.open(written), "n_frames", 1)
        image.close()
        assert (image.mode, pages) == ("I;16", 4 if suffix == ".tif" else 1)
        assert run_command(capsys, "decode", tmp_path / "a.flowmo", tmp_path / "a.npy", *model)[0] == 0
        assert np.load(tmp_path / "a.npy").dtype == np.uint16
        status, out, err = run_command(capsys, "reconstruct", file, "--output", tmp_path / "out", *model)
        assert status == 0, err
    status, _, err = run_command(capsys, "encode", bands, tmp_path / "b.flowmo", "--model", "nano")
    assert status != 0
    assert err == f"flowmo: {bands}: has 4 channels, but the model takes 3.\n"
    model = ("--model", tmp_path / "four.safetensors", "--force")
    assert run_command(capsys, "encode", bands, tmp_path / "a.flowmo", *model)[0] == 0
    status, _, err = run_command(capsys, "decode", tmp_path / "a.flowmo", tmp_path / "a.png", *model)
    assert status != 0
    assert "Write .tif or .npy" in err
