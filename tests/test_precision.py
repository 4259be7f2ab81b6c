"""Inference in bfloat16: chosen by the device, near float32, told with the results, and gone after the call."""

from __future__ import annotations

import json
import platform
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import run_command

from flowmo import load, precision
from flowmo.cli import build_parser
from flowmo.cli.options import choose_device
from flowmo.errors import FlowMoError
from flowmo.evaluate import speed
from flowmo.train.task import in_bfloat16


@pytest.mark.parametrize(
    ("asked", "device", "capability", "resolved"),
    [
        ("auto", "cpu", None, "float32"),
        ("auto", "cuda", (9, 0), "bfloat16"),
        ("auto", "cuda", (8, 0), "bfloat16"),
        ("auto", "cuda", (7, 5), "float32"),
        ("auto", "mps", None, "float32"),
        ("float32", "cuda", (9, 0), "float32"),
        ("bfloat16", "cpu", None, "bfloat16"),
    ],
)
def test_auto_follows_the_device(asked, device, capability, resolved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert precision.resolve(asked, torch.device(device)) == resolved


@pytest.mark.parametrize(("capability", "bfloat16"), [((7, 5), False), ((8, 0), True)])
def test_training_and_inference_agree_on_a_gpu(tiny_config, capability, bfloat16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device = torch.device("cuda")
    assert in_bfloat16(tiny_config, device) is bfloat16
    assert (precision.resolve("auto", device) == "bfloat16") is bfloat16


@pytest.mark.parametrize(
    ("machine", "onednn", "avx512", "amx", "bfloat16"),
    [
        ("x86_64", True, False, False, False),  # AVX-512 without bfloat16: oneDNN emulates it, at a quarter of float32
        ("AMD64", True, False, False, False),
        ("x86_64", True, True, False, True),
        ("x86_64", True, False, True, True),
        ("x86_64", False, False, False, False),
        ("aarch64", True, False, False, True),
        ("aarch64", False, False, False, False),
    ],
)
def test_a_cpu_needs_units_for_bfloat16(machine, onednn, avx512, amx, bfloat16, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    assert precision.multiplies_bfloat16(torch.device("cpu")) is bfloat16


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file() or platform.machine() != "x86_64", reason="not x86 Linux")
def test_units_for_bfloat16_are_the_kernels():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = bool(flags & {"avx512_bf16", "amx_tile"}) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert precision.multiplies_bfloat16(torch.device("cpu")) is expected


def test_unknown_precision():
    with pytest.raises(ValueError, match="Write auto, float32, bfloat16"):
        precision.resolve("half", torch.device("cpu"))


def test_load_stays_in_float32_on_the_cpu(tiny_model):
    model = load(tiny_model)
    assert (model.device.type, model.precision) == ("cpu", "float32")


def test_bfloat16_is_near_and_leaves_no_trace(tiny, images):
    ids, decoded = tiny.encode(images).ids, tiny.decode(tiny.encode(images))
    tiny.set_precision("bfloat16")
    theirs = tiny.decode(ids, size=(32, 32))
    assert theirs.dtype == torch.float32
    assert not torch.equal(theirs, decoded)
    assert (theirs - decoded).abs().mean() < 0.05
    assert (tiny.encode(images).ids == ids).float().mean() > 0.8
    assert not torch.is_autocast_enabled("cpu")
    tiny.set_precision("float32")
    assert torch.equal(tiny.decode(ids, size=(32, 32)), decoded)


@pytest.mark.parametrize(
    ("name", "products", "convolutions"), [("bfloat16", "high", True), ("float32", "highest", False)]
)
def test_tf32_lasts_as_long_as_the_call(monkeypatch, name, products, convolutions):
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def state():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = state()
    with precision.computing(name, torch.device("cuda")):
        assert state() == (products, convolutions)
    assert state() == before
    with pytest.raises(KeyError), precision.computing(name, torch.device("cuda")):
        raise KeyError
    assert state() == before


def test_compiling_needs_a_compiler(tiny, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FlowMoError, match=r"takes a C\+\+ compiler"):
        tiny.compile()


@pytest.mark.parametrize("asked", ["auto", "bfloat16"])
def test_evaluate_tells_the_precision(tiny_model, class_folder, tmp_path, capsys, asked):
    options = ["--no-lpips", "--features", "none", "--limit", 2, "--enlarge", "--device", "cpu", "--precision", asked]
    status, out, _ = run_command(capsys, "evaluate", class_folder, "--model", tiny_model, *options, "--json")
    assert status == 0
    told = "float32 (cpu)" if asked == "auto" else "bfloat16 autocast (cpu)"
    assert json.loads(out)["precision"] == told
    _, out, _ = run_command(capsys, "evaluate", class_folder, "--model", tiny_model, *options)
    assert told in out


def test_every_command_with_a_model_takes_both(tiny_model, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "matrix_rate", lambda *_: 1e9)  # takes a minute where bfloat16 is emulated
    both = ["--device", "cpu", "--precision", "bfloat16"]
    file, drawn = tmp_path / "x.flowmo", tmp_path / "x.png"
    for command in (
        ["encode", photo, file, "--model", tiny_model],
        ["decode", file, drawn, "--model", tiny_model],
        ["reconstruct", photo, "--out", tmp_path / "out", "--model", tiny_model],
        ["tokenize", photo.parent, "--out", tmp_path / "tokens", "--model", tiny_model],
        ["bench", "--repeats", 1, "--model", tiny_model],
    ):
        if command[0] == "tokenize":
            (tmp_path / "images").mkdir()
            photo.rename(tmp_path / "images" / "photo.jpg")
            command[1] = tmp_path / "images"
        assert run_command(capsys, *command, *both)[0] == 0, command


@pytest.mark.parametrize(
    ("words", "gpu", "device"),
    [
        (["decode", "a.flowmo"], True, "cuda"),
        (["decode", "a.flowmo"], False, "cpu"),
        (["decode", "a.flowmo", "--device", "cpu"], True, "cpu"),
        (["bench"], True, "cuda"),
        (["train"], True, "cuda"),
    ],
)
def test_the_default_device_is_a_gpu_if_there_is_one(monkeypatch, words, gpu, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    arguments = build_parser().parse_args(words)
    choose_device(arguments)
    assert arguments.device == device
