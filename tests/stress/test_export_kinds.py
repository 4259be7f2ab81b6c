"""Exports that ``tests/test_export.py`` leaves out because they take half a minute: distilled tokenizers, ``.pt2``."""

import pytest
import torch
from conftest import open_gates
from test_export import same

from flowmo import FlowMo
from flowmo.web.export import export


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
