"""The infill bottleneck with a small Qwen2 of random weights, saved to disk as any other causal language model."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import bottleneck, write_language_model

from flowmo import FlowMo, load, save
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.stages import pretrain_loss
from flowmo.model.quantizers.infill import LanguageModelError, load_language_model

CHANNELS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen2")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    write_language_model(path, hidden_size=CHANNELS, intermediate_size=32, num_hidden_layers=2, **heads)
    return path


def infill(model, channels):
    return bottleneck("qwen2.5-coder-0.5b", channels, language_model=str(model))


@pytest.fixture
def code():
    return torch.randn(2, 10, CHANNELS, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_a_span_is_replaced_and_the_rest_kept(folder, code):
    filled = infill(folder, CHANNELS).fill_in(code, 4, 7)
    assert filled.shape == code.shape
    assert torch.equal(filled[:, :4], code[:, :4])
    assert torch.equal(filled[:, 7:], code[:, 7:])
    assert not torch.allclose(filled[:, 4:7], code[:, 4:7], atol=0.1)


def test_three_tenths_of_the_tokens_are_replaced(folder, code):
    torch.manual_seed(3)
    quantizer = infill(folder, CHANNELS).train()
    spans = set()
    for _ in range(60):
        changed = (quantizer(code).code - code).abs().amax(dim=(0, 2)) > 0.01
        span = changed.nonzero()[:, 0].tolist()
        assert span == list(range(span[0], span[0] + 3))
        spans.add(span[0])
    assert spans == set(range(8)), "a span begins anywhere"


def test_the_span_sees_both_sides_and_gradients_flow(folder, code):
    quantizer = infill(folder, CHANNELS)
    filled = quantizer.fill_in(code, 4, 7)
    gradient = torch.autograd.grad(filled[0, 4].sum(), code)[0]
    reached = gradient[0].abs().sum(dim=1) > 0
    assert reached.tolist() == [True] * 5 + [False] * 2 + [True] * 3  # causal: not the span's later tokens
    assert not gradient[1].any(), "pictures must not mix"
    assert all(not p.requires_grad for p in load_language_model(str(folder), CHANNELS)[0].parameters())


def test_the_order_is_fill_in_the_middle(folder, code):
    """Against the language model read by hand."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder)
    prefix, suffix, middle = model.get_input_embeddings()(torch.tensor([37, 38, 39]))[:, None].expand(-1, 2, -1)
    marks = [mark[:, None] for mark in (prefix, suffix, middle)]
    read = torch.cat((marks[0], code[:, :4], marks[1], code[:, 7:], marks[2], code[:, 4:7]), dim=1)
    expected = model(inputs_embeds=read).last_hidden_state[:, -3:]
    torch.testing.assert_close(infill(folder, CHANNELS).fill_in(code, 4, 7)[:, 4:7], expected)


def test_training_and_loading(folder, tiny_config, images, tmp_path):
    config = tiny_config.override(
        "model.quantization_type=qwen2.5-coder-0.5b", f"model.context_dim={CHANNELS}", f"model.language_model={folder}"
    )
    tokenizer = FlowMo(config)
    loss = pretrain_loss(tokenizer, images, TrainingNoise.of(config, images, range(5)), tokenizer.config.opt, None)
    loss.loss.backward()
    assert not [name for name in tokenizer.state_dict() if "embed_tokens" in name]
    save(tokenizer, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.config.model.language_model == ""
    decoded = again.decode(again.encode(images), steps=2)  # without a language model
    assert decoded.shape == images.shape
    with pytest.raises(TypeError, match="no ids"):
        again.quantizer.code_from_ids(torch.zeros(1, 6, 1, dtype=torch.long))


def test_a_fresh_process_loads_it(folder):
    """transformers imports torchvision where there is one, which may need a hand; here the tests have given it."""
    program = (
        f"from flowmo.model.quantizers.infill import load_language_model as load; load({str(folder)!r}, {CHANNELS})"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_language_models_that_do_not_fit(folder, code, tmp_path):
    with pytest.raises(LanguageModelError, match=r"hidden size 16. Write model\.context_dim=16, not 8"):
        infill(folder, 8)(code[..., :8])
    with pytest.raises(LanguageModelError, match="cannot load a language model"):
        infill(tmp_path, CHANNELS)(code)
    shutil.copy(folder / "config.json", tmp_path)  # without the weights
    with pytest.raises(LanguageModelError, match="cannot load a language model"):
        infill(tmp_path, CHANNELS)(code)
