"""The benchmarks of whole images: seams, screens, legibility and the table of rates, on images with a known answer."""

import copy
import gzip
import json
import sys

import numpy as np
import pytest
import torch
from conftest import PICTURES, ROOT
from PIL import Image, ImageOps

from flowmo import save
from flowmo.codec.file import Codec
from flowmo.evaluate.speed import parts

sys.path.insert(0, str(ROOT / "benchmarks"))
import artefacts
import kinds
import legibility
import plain
import rates
import seams
import sizes


def test_a_seam_is_found_at_its_period_alone():
    """Steps every 8 pixels on noise: the lines there carry more energy, those of other periods do not."""
    noise = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) * 4
    steps = torch.arange(96).div(8, rounding_mode="floor") % 2 * 20.0
    assert seams.seam_energy([noise], 8) == pytest.approx(1, abs=0.15)
    assert seams.seam_energy([noise + steps], 8) > 3
    assert seams.seam_energy([noise + steps], 5) == pytest.approx(1, abs=0.3)


def test_a_screen_is_a_peak_in_the_spectrum():
    """Dots every 4 pixels are one; noise and a smooth gradient are none."""
    noise = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradient = torch.linspace(0, 10, 32).expand(40, 3, 32, 32)
    dots = torch.zeros(32, 32)
    dots[::4, ::4] = 16.0
    assert seams.screen(noise + gradient) == pytest.approx(0, abs=1)
    assert 18 < seams.screen(noise + dots) < 22, "a quarter of the harmonics has 456 times the power of the noise"


def test_flat_regions():
    image = torch.full((3, 64, 64), 100.0)
    image[:, 32:, 32:] += torch.arange(32.0) * 4
    assert seams.flat_regions(image) == [(0, 0), (0, 32), (32, 0)]


def test_artefacts_of_images_with_a_known_answer():
    noise = torch.rand(2, 3, 128, 96, generator=torch.Generator().manual_seed(0)) * 255
    same, other = artefacts.compare(noise[0], noise[0]), artefacts.compare(noise[0], noise[1])
    for band in ("8_16", "4_8", "2_4"):
        assert same[f"correlation_{band}"] == pytest.approx(1, abs=1e-5)
        assert other[f"correlation_{band}"] == pytest.approx(0, abs=0.2)
        assert same[f"axis_share_difference_{band}"] == 0
    assert other["axis_share_original_2_4"] == pytest.approx(20 / 90, abs=0.03), "noise has no direction"
    assert other["outer"] == pytest.approx(1, abs=0.1)
    stripes = (torch.arange(128.0) * 2 * torch.pi / 3).cos()[:, None].expand(3, 128, 96) * 50 + 128
    striped = artefacts.compare(noise[0], stripes)
    share = striped["axis_share_original_2_4"] + striped["axis_share_difference_2_4"]
    assert share == pytest.approx(1, abs=1e-3), "horizontal stripes lie on an axis"
    tint = torch.tensor([10.0, 10.0, 10.0])[:, None, None]
    assert artefacts.compare(stripes, stripes + tint)["colour_error"] == pytest.approx(0, abs=1e-3)
    tint[0] = 20.0
    red = ((0.701 * 10) ** 2 + 2 * (0.299 * 10) ** 2) ** 0.5
    assert artefacts.compare(stripes, stripes + tint)["colour_error"] == pytest.approx(red, rel=1e-3)


def test_the_border_filter_moves_the_pixels_at_borders_alone():
    ramp = torch.arange(12.0).div(4, rounding_mode="floor").expand(3, 12, 12) * 8
    filtered = artefacts.move_together(ramp, 0.25, 4, 4)[0, 0]
    assert filtered.tolist() == [0, 0, 0, 2, 6, 8, 8, 10, 14, 16, 16, 16]
    assert torch.equal(artefacts.move_together(ramp, 0.25, 4, 2), ramp), "no difference inside the patches"


def test_edit_distance():
    assert legibility.edit_distance("kitten", "sitting") == 3
    assert legibility.edit_distance("", "abc") == 3
    assert legibility.edit_distance("same", "same") == 0


def test_sizes_of_a_codec_and_a_tokenizer(native, tmp_path):
    save(native, tmp_path / "native.safetensors")
    photograph = next(iter(sorted(PICTURES.glob("*.jpg"))))
    rows = [sizes.measure(photograph, method, 64) for method in ("jpeg", str(tmp_path / "native.safetensors"))]
    image = ImageOps.fit(Image.open(photograph).convert("RGB"), (64, 64), Image.Resampling.LANCZOS)
    image.save(tmp_path / "20.jpg", quality=20, optimize=True)
    assert rows[0]["bytes"] == (tmp_path / "20.jpg").stat().st_size
    assert rows[1]["bytes"] == len(Codec(native).pack(native.encode_image(image)))
    assert all(0 < row["decode"] < 60 and row["peak"] > 2**26 for row in rows)
    assert sizes.table({"rows": rows}).splitlines()[2].startswith("| JPEG | ")


def test_rates_of_a_variable_model(native, tmp_path, monkeypatch, trained_weights):
    """The model's own files, codecs with no fewer bytes, and the same table from the JSON alone."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(trained_weights))
    monkeypatch.setattr(rates, "FORMATS", ("jpeg",))
    save(native, tmp_path / "native.safetensors")
    for i, path in enumerate(sorted(PICTURES.glob("*.jpg"))[:2]):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.open(path).convert("RGB").resize((64, 80)).save(tmp_path / "images" / f"{i}.png")
    words = ["rates.py", tmp_path / "images", "--models", tmp_path / "native.safetensors", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    rates.main()
    content = json.loads((tmp_path / "out" / "rates.json").read_text())
    ours = [row for row in content["rows"] if row["name"] == "native"]
    assert [row["rate"] for row in ours] == sorted(row["rate"] for row in ours)
    assert len(ours) > 2
    for row in content["rows"]:
        own = next(r for r in ours if r["rate"] == row["rate"])
        assert all(size >= own["sizes"][index] for index, size in row["sizes"].items())
    first = (tmp_path / "out" / "rates.md").read_text()
    own, jpeg = content["rows"][:2]
    difference = np.subtract(jpeg["values"]["lpips_vgg"], own["values"]["lpips_vgg"])
    assert f"{difference.mean():+.3f} ± {difference.std(ddof=1) / 2**0.5:.3f}" in first
    assert difference.mean() == pytest.approx(jpeg["lpips_vgg"] - own["lpips_vgg"], abs=1e-5)
    monkeypatch.setattr(sys, "argv", ["rates.py", "--redraw", "--out", str(tmp_path / "out")])
    rates.main()
    assert (tmp_path / "out" / "rates.md").read_text() == first
    assert (tmp_path / "out" / "images.jpg").is_file()
    (tmp_path / "images" / "1.png").unlink()
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit, match="measured on other images"):
        rates.main()


def test_the_plain_network_is_ours(tiny):
    """What the benchmark of inference times as the plain way has the same results, from the same inputs."""
    tokenizer = copy.deepcopy(tiny)
    with torch.no_grad():
        for parameter in tokenizer.decoder.parameters():  # open the gates, or the blocks would not show
            parameter.add_(0.02 * torch.randn_like(parameter))
        ours = parts(tokenizer)
        images, noise, code = plain.inputs(tokenizer)
        torch.testing.assert_close(plain.encode(tokenizer, images), ours["encode"](), rtol=0, atol=1e-4)
        velocity = plain.velocity(tokenizer, noise, plain.marked(code), 1.0)
        torch.testing.assert_close(velocity, ours["decoder pass"](), rtol=0, atol=1e-4)


def test_kinds_of_images_from_packages(tmp_path, monkeypatch, capsys):
    """Crops are inside the image and not enlarged, volumes are read, and missing packages are named."""
    volume = np.arange(20 * 300 * 40, dtype=np.uint8).reshape((20, 300, 40), order="F")
    header = bytearray(352)
    header[40:48] = np.array([3, 20, 300, 40], "<i2").tobytes()
    header[70:72], header[108:112] = np.array([2], "<i2").tobytes(), np.array([352], "<f4").tobytes()
    (tmp_path / kinds.TEMPLATES).mkdir(parents=True)
    path = tmp_path / kinds.TEMPLATES / "ch2better.nii.gz"
    path.write_bytes(gzip.compress(bytes(header) + volume.tobytes(order="F")))
    assert np.array_equal(np.asarray(kinds.read_volume(path, 0, 50)), volume[10].T[::-1])
    pixels = np.random.default_rng(0).integers(0, 256, (300, 520, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(kinds.crop(image, 0, 1)), pixels[44:, :256])
    assert np.array_equal(np.asarray(kinds.crop(image, 1, 0)), pixels[:256, 264:])
    assert kinds.crop(image.crop((0, 0, 131, 90)), 0.5, 0.5).size == (128, 80)
    monkeypatch.setattr(kinds, "ROOT", tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["kinds.py", str(tmp_path / "out"), "--debian", str(tmp_path), "--python", str(tmp_path)]
    )
    kinds.main()
    assert "wesnoth-1.16-httt" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 4
    lines = (tmp_path / "out" / "LICENCES.csv").read_text().splitlines()
    assert lines[1] == "medical,brain-0-50,mricron-data,BSD-3-Clause"


def test_the_best_codec_of_a_kind():
    rows = [
        {"name": "native", "rate": 0.1, "lpips_vgg": 0.1, "psnr": 50},
        {"name": "WebP", "rate": 0.1, "lpips_vgg": 0.2, "psnr": 20},
        {"name": "AVIF", "rate": 0.1, "lpips_vgg": 0.3, "psnr": 30},
        {"name": "JPEG", "rate": 0.2, "lpips_vgg": 0.0, "psnr": 40},
    ]
    assert kinds.best_codec(rows, 0.1, "lpips_vgg")["name"] == "WebP"
    assert kinds.best_codec(rows, 0.1, "psnr")["name"] == "AVIF"
