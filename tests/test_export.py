"""Exported graphs against the tokenizer, run by ONNX Runtime and ``torch.export`` without this package's networks."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from conftest import run_command

from flowmo import FlowMo
from flowmo.web.export import NOT_SENT, ExportError, graphs


def session(path):
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(path, options)


def sample(decoder, about, noise, ids):
    """The sampler as a program without this package writes it: Euler steps along equation 14, with guidance."""
    velocity = session(decoder)
    name = velocity.get_inputs()[3].name
    n, x = about["steps"], noise
    for t, end in itertools.pairwise([(i / n) ** about["rho"] for i in range(n, -1, -1)]):

        def run(condition, x=x, t=t):
            feed = {"images": x, "ids": ids, "t": np.float32([t]), name: np.float32([condition])}
            return velocity.run(None, feed)[0]

        v = run(end if about["meanVelocity"] else 1)
        if about["guidance"] != 1 and about["guidanceLow"] <= t <= about["guidanceHigh"]:
            null = run(0)
            v = null + about["guidance"] * (v - null)
        x = x - np.float32(t - end) * v
    return x.clip(-1, 1)


def same(tokenizer, folder, images, ids_sent=None):
    about = json.loads((folder / "model.json").read_text())
    codes = tokenizer.encode(images)
    ids = session(folder / "encoder.onnx").run(None, {"images": images.numpy()})[0]
    assert np.array_equal(ids, codes.ids)
    if ids_sent is not None:
        ids[..., ids_sent:] = NOT_SENT
        codes = codes.coarser(ids_sent)
    noise = torch.stack(
        [torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(s)) for s in range(len(ids))]
    )
    decoded = sample(folder / "decoder.onnx", about, noise.numpy(), ids)
    expected = tokenizer.decode(codes, seed=range(len(ids)))
    assert expected.std() > 0.05
    assert np.abs(decoded - expected.numpy()).max() < 1e-3


def test_what_cannot_be_exported(tiny_config, tiny, tmp_path, capsys, monkeypatch):
    continuous = FlowMo(tiny_config.override("model.quantization_type=kl"))
    with pytest.raises(ExportError, match="continuous"):
        graphs(continuous)
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(ExportError, match="not compiled"):
        graphs(tiny.compile(backend="eager"))
    status, _, error = run_command(capsys, "export", "nano", tmp_path / "out", "--page", "--runtime", tmp_path)
    assert status == 2
    assert "is not onnxruntime-web" in error
    page = ("export", "nano", tmp_path / "own", "--page")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "index.html").write_text("mine")
    status, _, error = run_command(capsys, *page)
    assert status == 2
    assert "index.html exists already. Add --force" in error
    status, _, error = run_command(capsys, *page, "--force", "--examples", "a/x.png", "b/x.png")
    assert status == 2
    assert "Two examples have the same name" in error
    assert (tmp_path / "own" / "index.html").read_text() == "mine"
