"""The command line as a person uses it: real processes' exit codes, real files, and every kind of bad input."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib

import pytest
import torch
from conftest import run_command as run
from PIL import Image
from processes import run_program

import flowmo
from flowmo.checkpoint.files import BUNDLED
from flowmo.cli import main
from flowmo.cli.output import UsageError, write
from flowmo.codec.planes import PlaneModel
from flowmo.config import preset


@pytest.fixture
def weights(tiny, tmp_path):
    path = tmp_path / "weights" / "model.safetensors"
    flowmo.save(tiny, path)
    return path


def test_reconstruct(capsys, tmp_path, weights, photo):
    status, out, err = run(capsys, "reconstruct", photo, "--model", weights, "--out", tmp_path / "out", "--steps", 2)
    assert (status, err) == (0, "")
    with Image.open(tmp_path / "out" / "photo.png") as pair:
        assert pair.size == (70 + 2 + 70, 50)
    row = out.splitlines()[1].split()
    assert row[:3] == ["photo.jpg", "70×50", str(3 * 2 * 6)], "3 × 2 tiles of 6 bytes"
    assert float(row[3]) == pytest.approx(36 * 8 / 3500, abs=1e-4)
    assert 3 < float(row[4]) < 50


def test_reconstruct_as_json(capsys, tmp_path, weights, photo):
    words = ("reconstruct", photo, "--model", weights, "--out", tmp_path / "out", "--steps", 1, "--json")
    row = json.loads(run(capsys, *words)[1])[0]
    assert (row["height"], row["width"], row["bytes_of_ids"]) == (50, 70, 36)
    assert 3 < row["psnr"] < 50


def test_reconstruct_crop(capsys, tmp_path, weights, photo):
    words = ("reconstruct", photo, "--model", weights, "--out", tmp_path / "out", "--steps", 1, "--fit", "crop")
    assert run(capsys, *words)[0] == 0
    with Image.open(tmp_path / "out" / "photo.png") as pair:
        assert pair.size == (32 + 2 + 32, 32)


def test_reconstruct_in_a_grid(capsys, tmp_path, weights, photo):
    """Two squares: originals above, and the same as in the pictures of their own."""
    other, file = tmp_path / "other.png", tmp_path / "grid.png"
    Image.open(photo).rotate(90).save(other)
    out = tmp_path / "out"
    words = ("reconstruct", photo, other, "--model", weights, "--out", out, "--steps", 1, "--grid", file)
    assert run(capsys, *words)[0] == 2, "pictures of any size make no grid"
    assert run(capsys, *words[:-1], tmp_path / "grid.txt", "--fit", "crop")[0] == 2
    status, printed, _ = run(capsys, *words, "--fit", "crop")
    assert status == 0
    assert str(file) in printed
    with Image.open(file) as whole, Image.open(out / "other.png") as pair:
        assert whole.size == (32 + 2 + 32, 32 + 2 + 32)
        assert whole.crop((34, 0, 66, 32)).tobytes() == pair.crop((0, 0, 32, 32)).tobytes()
        assert whole.crop((34, 34, 66, 66)).tobytes() == pair.crop((34, 0, 66, 32)).tobytes()


def test_encode_then_decode(capsys, tmp_path, weights, photo):
    file = tmp_path / "photo.flowmo"
    assert run(capsys, "encode", photo, "-o", file, "--model", weights)[0] == 0
    status, out, _ = run(capsys, "decode", file, "--model", weights, "--steps", 2)
    assert status == 0
    assert "70×50 from 36 bytes" in out
    tokenizer = flowmo.load(weights)
    codes = tokenizer.encode_image(Image.open(photo))
    with Image.open(tmp_path / "photo.flowmo.png") as decoded:
        assert decoded.tobytes() == tokenizer.decode_image(codes, steps=2).tobytes()
    status, out, _ = run(capsys, "decode", file, "--model", weights, "--ids")
    assert json.loads(out) == codes.ids.tolist()


def test_encode_many(capsys, tmp_path, weights, picture_files):
    out = tmp_path / "codes"
    assert run(capsys, "encode", *picture_files[:2], "--out-dir", out, "--fit", "crop", "--model", weights)[0] == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(f"{p.stem}.flowmo" for p in picture_files[:2])


def test_info(capsys, weights):
    status, out, _ = run(capsys, "info", "lo")
    assert status == 0
    assert "858301858" in out
    assert "0.0703" in out
    assert "31" in out
    summary = json.loads(run(capsys, "info", weights, "--json", "eval.sampling.sample_steps=4")[1])
    assert summary["bytes_per_image"] == 6
    assert summary["sampling_steps"] == 4
    assert "opt.lr=" in run(capsys, "info", "nano", "--settings")[1]


def test_info_allocates_nothing():
    """Lo's weights take 3.4 GB; describing them must not."""
    code = (
        "import resource\n"
        "from flowmo.cli import main\n"
        "main(['info', 'small'])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "main(['info', 'lo'])\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "assert grown < 100_000, grown\n"
    )
    done = run_program(code)
    assert done.returncode == 0, done.stderr


def test_info_of_training(capsys):
    """What a run costs, by arithmetic: the paper's batch and length, and what checkpointing saves."""
    shallow = "opt.lpips_weight=0", "model.enc_depth=2", "model.dec_depth=2"  # each block takes its time
    status, out, _ = run(capsys, "info", "nano", "--training", "--json", *shallow)
    assert status == 0
    found = json.loads(out)
    whole, frozen = (
        found["training_images"] * found[f"tflop_per_image{part}"] / 1e6 for part in ("", "_encoder_frozen")
    )
    assert 0.95 * frozen < found["exaflop_of_the_run"] < whole
    assert found["gib_with_activation_checkpointing"] < found["gib_of_activations_per_image"] / 2
    parameters = sum(p.numel() for p in flowmo.FlowMo(preset("nano").override(*shallow)).parameters())
    assert found["gib_of_state"] == round(5 * 4 * parameters / 2**30, 2)
    status, out, _ = run(capsys, "info", "nano", "--training", "--json", *shallow, "model.posttrain_sample=true")
    found = json.loads(out)
    assert found["gib_of_state"] < round(5 * 4 * parameters / 2**30, 2), "the encoder is frozen"
    assert "training_images" not in found, "the settings do not tell how long the stage is"


def test_training_is_forecast_for_tokenizers_only(capsys):
    status, _, error = run(capsys, "info", "maskgit", "--training")
    assert status == 2
    assert "not of generators" in error


def test_convert(capsys, tmp_path, weights, tiny):
    target = tmp_path / "half.safetensors"
    assert run(capsys, "convert", weights, target, "--dtype", "float16")[0] == 0
    assert flowmo.load(target).config == tiny.config


def test_a_copy_keeps_the_context_model(capsys, tmp_path):
    """Unless its weights are rounded, which makes it another tokenizer."""
    assert run(capsys, "convert", "native", tmp_path / "a.safetensors")[0] == 0
    assert run(capsys, "convert", "native", tmp_path / "b.safetensors", "--dtype", "int8")[0] == 0
    bundled = BUNDLED / "native.context.safetensors"
    assert flowmo.load(tmp_path / "a.safetensors").identity() == flowmo.load("native").identity()
    assert PlaneModel.read(tmp_path / "a.context.safetensors").identity == PlaneModel.read(bundled).identity
    rounded = flowmo.load(tmp_path / "b.safetensors").identity() != flowmo.load("native").identity()
    assert (tmp_path / "b.context.safetensors").exists() != rounded


def test_guidance_that_changes_nothing_is_said(capsys, tmp_path, picture_files):
    words = ("reconstruct", picture_files[0], "--fit", "crop", "--guidance", "2")
    status, _, err = run(capsys, *words, "--output", tmp_path / "a")
    assert status == 0
    assert "--guidance changes nothing: the only step, at t = 1, does not lie in its interval" in err
    status, _, err = run(capsys, *words, "--output", tmp_path / "b", "--steps", "8")
    assert (status, err) == (0, "")


def test_an_image_too_wide_for_its_format(tmp_path):
    with pytest.raises(UsageError, match=r"a\.webp: 17000×1 pixels cannot be written"):
        write(tmp_path / "a.webp", Image.new("RGB", (17000, 1)))
    write(tmp_path / "a.png", Image.new("RGB", (17000, 1)))


def test_train_then_evaluate(capsys, tmp_path, picture_files, tiny_config, forecasts):
    settings = tmp_path / "tiny.yaml"
    settings.write_text(tiny_config.to_json())  # JSON is YAML
    folder = picture_files[0].parent
    words = [
        *("train", "--config", settings, "--experiment-name", "t", "--results-dir", tmp_path / "results"),
        *(f"data.train={folder}", "data.num_workers=0", "opt.lpips_weight=0", "trainer.max_steps=2"),
        *("trainer.log_every=1", "data.batch_size=2", "--device", "cpu"),
    ]
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "")
    assert "step 2  4 images (100.0%)" in out
    assert "images/s" in out
    lines = (tmp_path / "results" / "t" / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(lines[0])["flop_utilisation"] < 1
    trained = tmp_path / "results" / "t" / "checkpoints" / "00000002.pth"
    assert f"Model:       {trained}\nSee it:      flowmo reconstruct PICTURE --model {trained}\n" in out
    status, out, _ = run(
        capsys,
        "evaluate",
        folder,
        "--model",
        trained,
        "--limit",
        3,
        "--steps",
        1,
        "--no-lpips",
        *("--features", "none", "--json"),
    )
    assert status == 0
    report = json.loads(out)
    assert report["images"] == 3
    assert report["bits_per_pixel"] == pytest.approx(48 / 1024)
    assert 0 < report["psnr"] < 40


def test_evaluate_with_lpips(capsys, weights, trained_weights, picture_files, monkeypatch):
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(trained_weights))
    words = ("evaluate", picture_files[0].parent, "--model", weights, "--features", "none")
    status, out, _ = run(capsys, *words, "--limit", 2, "--steps", 1)
    assert status == 0
    assert "LPIPS" in out


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.fixture
def bad_pictures(tmp_path, photo):
    whole = photo.read_bytes()
    folder = tmp_path / "bad"
    folder.mkdir()
    contents = {
        "text.jpg": b"this is no picture",
        "empty.png": b"",
        "cut.jpg": whole[: len(whole) // 2],
        "header.jpg": whole[:100],
        "bomb.png": png_header(50_000, 50_000),
        "zero.png": png_header(0, 10),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    return [folder / name for name in (*contents, "folder.png", "missing.jpg")]


@pytest.mark.parametrize("command", ["reconstruct", "encode"])
def test_bad_pictures(capsys, tmp_path, weights, photo, bad_pictures, command):
    out = tmp_path / "out"
    where = ("--out", out) if command == "reconstruct" else ("--out-dir", out)
    for bad in bad_pictures:
        status, _, err = run(capsys, command, bad, "--model", weights, *where)
        assert status == 2, bad.name
        assert err.count("\n") == 1, err
        assert err.startswith("flowmo: "), err
        assert bad.name in err
        assert not out.exists(), "nothing half-written"


def test_one_bad_picture_among_good_ones_is_named_and_the_others_are_done(
    capsys, tmp_path, weights, photo, bad_pictures
):
    out = tmp_path / "out"
    for words in (("reconstruct", "--out"), ("encode", "--out-dir")):
        command, option = words
        status, _, err = run(capsys, command, bad_pictures[0], photo, "--model", weights, option, out)
        assert status == 2
        assert bad_pictures[0].name in err
        assert "1 of 2 failed" in err.splitlines()[-1]
    assert sorted(path.name for path in out.iterdir()) == ["photo.flowmo", "photo.png"]


def test_bad_codes(capsys, tmp_path, weights, photo):
    file = tmp_path / "photo.flowmo"
    run(capsys, "encode", photo, "-o", file, "--model", weights)
    content = file.read_bytes()
    for name, damaged in (("cut", content[:-3]), ("noise", b"FLMO" + bytes(90)), ("text", b"hello"), ("empty", b"")):
        bad = tmp_path / f"{name}.flowmo"
        bad.write_bytes(damaged)
        status, _, err = run(capsys, "decode", bad, "--model", weights)
        assert status == 2
        assert err.count("\n") == 1
        assert not list(tmp_path.glob("*.png"))
    assert run(capsys, "decode", tmp_path / "none.flowmo", "--model", weights)[0] == 2


def test_bad_weights(capsys, tmp_path, photo):
    torch.save({"a": 1}, tmp_path / "other.pth")
    (tmp_path / "text.safetensors").write_text("no")
    for source in (tmp_path / "other.pth", tmp_path / "text.safetensors", tmp_path / "none.pth", "lo", "nanno"):
        status, _, err = run(capsys, "encode", photo, "--model", source)
        assert status == 2
        assert err.count("\n") == 1
        assert not photo.with_suffix(".flowmo").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("info", "nano", "model.patch_size=7"), "data.image_size=126"),
        (("info", "huge"), "huge: No weights found under this name"),
        (("train", "--preset", "nano"), "data.train=PATH"),
        (("train", "data.train=/nowhere"), "Name the model to train"),
        (("train", "--preset", "nano", "data.train=/nowhere"), "no such folder"),
        (("train", "--config", "/nowhere.yaml"), "Cannot read settings"),
        (("convert", "nano", "out.bin"), ".safetensors"),
    ],
)
def test_bad_settings(capsys, words, sentence):
    status, _, err = run(capsys, *words)
    assert status == 2
    assert sentence in err
    assert err.count("\n") == 1


def test_two_pictures_of_one_name(capsys, tmp_path, weights, photo):
    other = tmp_path / "photo.png"
    Image.open(photo).save(other)
    for command in ("reconstruct", "encode"):
        status, _, err = run(capsys, command, photo, other, "--model", weights)
        assert status == 2
        assert "both be written" in err


@pytest.mark.parametrize("command", ["reconstruct", "encode", "decode", "info", "convert", "train", "evaluate"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as status:
        main([command, "--help"])
    assert status.value.code == 0
    assert len(capsys.readouterr().out) > 300


def test_as_a_program(tmp_path):
    """The installed command, its module and ``python -m flowmo.train``, as processes."""
    good = subprocess.run([sys.executable, "-m", "flowmo", "--version"], capture_output=True, text=True, check=True)
    assert good.stdout == f"flowmo {flowmo.__version__}\n"
    words = [sys.executable, "-m", "flowmo.train", "model.nothing=1"]
    chosen = {**os.environ, "OMP_NUM_THREADS": "1"}  # or it may also say that the cores are busy
    bad = subprocess.run(words, capture_output=True, text=True, env=chosen)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1


def test_base_install_needs_no_torchvision():
    code = (
        "import sys\n"
        "sys.modules['torchvision'] = None\n"
        "import flowmo, flowmo.cli, flowmo.losses.perceptual, flowmo.train.trainer, flowmo.evaluate.reconstruction\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bench(capsys, weights):
    code, out, _ = run(capsys, "bench", "--model", weights, "--repeats", 1, "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["part"] for row in rows] == ["encode", "decoder pass", "decode"]
    assert all(row["seconds"] > 0 and row["flops"] > 0 for row in rows)
    assert rows[2]["flops"] == pytest.approx(rows[2]["passes"] * rows[1]["flops"], rel=0.05)
    assert "of the matrix rate" in run(capsys, "bench", "--model", weights, "--repeats", 1)[1]
