"""Exported graphs against the tokenizer, run by ONNX Runtime and ``torch.export`` without this package's networks."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from conftest import run_command

from flowmo import FlowMo, preset
from flowmo.web import export as export_module
from flowmo.web.export import NOT_SENT, ExportError, check_size, graphs, shrink


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


def test_a_matrix_whose_scales_are_a_matrix():
    """More than 4096 scales are not shrunk themselves."""
    onnx = pytest.importorskip("onnx")
    weight = onnx.numpy_helper.from_array(np.random.default_rng(0).normal(size=(4, 5000)).astype("f4"), "weight")
    rows, columns = (onnx.helper.make_tensor_value_info(n, 1, [1, size]) for n, size in (("x", 4), ("y", 5000)))
    node = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [rows], [columns], [weight]))
    shrink(model, torch.int8)
    assert sorted(tensor.data_type for tensor in model.graph.initializer) == [1, 3], "scales in float32, int8 weights"
    assert [node.op_type for node in model.graph.node] == ["Cast", "Mul", "MatMul"]


def test_networks_that_are_too_large():
    with torch.device("meta"):
        lo = FlowMo(preset("lo"))
    with pytest.raises(ExportError, match=r"The decoder takes 3\.0 GB in float32, and an ONNX file at most 2\.1\."):
        check_size(lo, "onnx", "float32")
    with pytest.raises(ExportError, match=r"float32, in which browsers compute"):
        check_size(lo, "page", "float16")
    check_size(lo, "onnx", "float16")
    check_size(lo, "torch", "float32")


def test_a_failed_export_leaves_the_old_one(tiny, tmp_path, monkeypatch):
    (tmp_path / "encoder.onnx").write_text("old")
    (tmp_path / "model.json").write_text("old")
    (tmp_path / "mine.txt").write_text("mine")

    def write(graph, path, dtype):
        path.write_text(f"{type(graph).__name__} in {dtype}")  # other tests convert the graphs

    def fail(graph, path, dtype):
        if path.name == "decoder.onnx":
            raise OSError("No space left on device")
        write(graph, path, dtype)

    monkeypatch.setattr(export_module, "write_graph", fail)
    with pytest.raises(OSError, match="No space"):
        export_module.export(tiny, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.onnx", "model.json", "mine.txt"}
    assert (tmp_path / "encoder.onnx").read_text() == (tmp_path / "model.json").read_text() == "old"
    monkeypatch.setattr(export_module, "write_graph", write)
    files = export_module.export(tiny, tmp_path)
    assert {path.name for path in files} == {"encoder.onnx", "decoder.onnx", "model.json"}, "not what was there before"
    assert (tmp_path / "encoder.onnx").read_text() == "Graph in float16"


def test_what_cannot_be_exported(tiny_config, tiny, tmp_path, capsys, monkeypatch):
    continuous = FlowMo(tiny_config.override("model.quantization_type=kl"))
    with pytest.raises(ExportError, match="continuous"):
        graphs(continuous)
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(ExportError, match="not compiled"):
        graphs(tiny.compile(backend="eager"))
    status, _, error = run_command(capsys, "export", "nano", tmp_path / "out", "--page", "eval.sampling.solver=heun")
    assert status == 2
    assert "not heun's. Add eval.sampling.solver=euler" in error
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
