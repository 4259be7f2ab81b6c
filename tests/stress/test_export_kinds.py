"""Exports that ``tests/test_export.py`` leaves out to save a minute: fixed size, ``.pt2``, smaller weights."""

import pytest
import torch
from conftest import open_gates
from test_export import same

from flowmo import FlowMo, save
from flowmo.web.export import export, shrink


def test_onnx_of_a_distilled_tokenizer(tiny_config, tmp_path, images):
    """Batches of 5 and 1; each pass knows the end of its step."""
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    settings = ("model.mean_velocity=true", "eval.sampling.guidance=1", "eval.sampling.sample_steps=2")
    tokenizer = open_gates(FlowMo(tiny_config.override(*settings))).eval()
    torch.nn.init.normal_(tokenizer.decoder.span_out.weight)
    export(tokenizer, tmp_path, dtype="float32")
    same(tokenizer, tmp_path, images)
    same(tokenizer, tmp_path, images[:1])


def test_torch_export(native, tmp_path):
    files = export(native, tmp_path, "torch")
    assert [file.name for file in files] == ["decoder.pt2", "encoder.pt2", "model.json"]
    encoder, decoder = (
        torch.export.load(tmp_path / f"{name}.pt2").module(check_guards=False) for name in ("encoder", "decoder")
    )
    for rows, columns, batch in ((1, 1, 1), (4, 8, 2), (9, 6, 1)):
        images = torch.rand(batch, 3, 16 * rows, 16 * columns) * 2 - 1
        ids = encoder(images)
        assert torch.equal(ids, native.encode(images).ids)
        one = torch.ones(1)
        noise = torch.stack([torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0))] * batch)
        decoded = (noise - decoder(noise, ids, one, one)).clamp(-1, 1)
        assert torch.allclose(decoded, native.decode(native.encode(images)), atol=1e-3)


def test_weights_of_16_and_8_bits(tiny, tmp_path, images):
    """A guided tokenizer that was saved as int8 loses nothing more, in about a quarter of the bytes."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    save(tiny, tmp_path / "tiny.safetensors", torch.int8)
    tokenizer = FlowMo.from_pretrained(tmp_path / "tiny.safetensors", "eval.sampling.sample_steps=3")
    export(tokenizer, tmp_path, dtype="float32")
    matrices = sum(p.numel() for p in tokenizer.decoder.parameters() if p.ndim == 2 and p.numel() >= 4096)
    assert matrices > 50_000
    full = (tmp_path / "decoder.onnx").stat().st_size
    for dtype, saved in ((torch.float16, 2), (torch.int8, 3)):
        model = onnx.load(tmp_path / "decoder.onnx")
        shrink(model, dtype)
        assert full - len(model.SerializeToString()) == pytest.approx(saved * matrices, rel=0.05)
    (tmp_path / "decoder.onnx").write_bytes(model.SerializeToString())
    same(tokenizer, tmp_path, images)
