"""Packed and compiled tokenizers: the same mathematics, refused where they would be wrong."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import run_command as run
from PIL import Image
from torch import nn

import flowmo
from flowmo import Config, FlowMo
from flowmo.checkpoint.hub import card
from flowmo.data.tokens import Vocabulary
from flowmo.generate.generator import Generator
from flowmo.model.cpu_prepack import PackedError, PackedLinear, available

pytestmark = pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN")
TOLERANCE = 2e-5


@pytest.fixture
def tokenizer(tiny_config):
    torch.manual_seed(0)
    tokenizer = FlowMo(tiny_config).eval()
    with torch.no_grad():
        for parameter in tokenizer.decoder.parameters():  # open the gates, or the blocks would not show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tokenizer


def results(tokenizer, images, guidance=2.0):
    """The code before quantization and samples of fixed ids."""
    with torch.no_grad():
        code = tokenizer.encoder(images[:1])
    ids = torch.randint(tokenizer.quantizer.id_count, (2, tokenizer.code_length, tokenizer.quantizer.sub_tokens))
    return code, tokenizer.decode(ids, steps=3, guidance=guidance, rho=1.0)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_packed_layer(gelu, bias):
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(2, 7, 24)
    expected = F.gelu(layer(x), approximate="tanh") if gelu else layer(x)
    packed = PackedLinear(layer, gelu)
    torch.testing.assert_close(packed(x), expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(packed(x[:, ::2]), expected[:, ::2], rtol=0, atol=TOLERANCE)
    assert packed(x[:, :0]).shape == (2, 0, 40)
    assert packed(x.bfloat16()).dtype == torch.float32


def test_packing_changes_rounding_alone(tokenizer, images):
    torch.manual_seed(1)
    code, pictures = results(tokenizer, images)
    torch.manual_seed(1)
    packed_code, packed_pictures = results(tokenizer.pack(), images)
    assert not any(isinstance(module, nn.Linear) for module in tokenizer.modules())
    torch.testing.assert_close(packed_code, code, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(packed_pictures, pictures, rtol=0, atol=TOLERANCE)
    assert pictures.std() > 0.1


def test_packed_commands(capsys, tiny_model, photo, tmp_path):
    """One picture through every command that has a tokenizer of its own."""
    file, out = tmp_path / "photo.flowmo", tmp_path / "out.png"
    assert run(capsys, "encode", photo, file, "--model", tiny_model, "--pack")[0] == 0
    assert run(capsys, "decode", file, out, "--model", tiny_model, "--pack")[0] == 0
    with Image.open(out) as picture:
        assert picture.size == (70, 50)
    assert run(capsys, "reconstruct", photo, "--out", tmp_path / "out", "--model", tiny_model, "--pack")[0] == 0
    quick = ("--no-lpips", "--features", "none", "--enlarge")
    assert run(capsys, "evaluate", photo.parent, *quick, "--model", tiny_model, "--pack")[0] == 0
    assert (
        run(
            capsys, "tokenize", photo.parent, "--out", tmp_path / "ids", "--model", tiny_model, "--pack", "--no-labels"
        )[0]
        == 0
    )
    assert run(capsys, "bench", "--model", tiny_model, "--repeats", 1, "--pack")[0] == 0
    code, _, error = run(capsys, "bench", "--model", tiny_model, "--pack", "--bfloat16")
    assert code == 2
    assert error == "flowmo: Packed weights are float32. Leave out --pack or --precision bfloat16.\n"


def test_compiling_needs_a_compiler(tokenizer, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PackedError, match=r"takes a C\+\+ compiler"):
        tokenizer.compile()


def test_kept_conditioning_is_of_the_times_asked_for(tokenizer):
    ids = torch.zeros(1, tokenizer.code_length, tokenizer.quantizer.sub_tokens, dtype=torch.int64)
    expected = [tokenizer.decode(ids, steps=steps) for steps in (1, 3)]
    tokenizer.pack()
    for steps, pictures in zip((1, 3, 1, 3), expected * 2, strict=True):
        torch.testing.assert_close(tokenizer.decode(ids, steps=steps), pictures, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("bit_tokens", ["true", "false"])
@torch.no_grad()
def test_packed_generator(bit_tokens):
    torch.manual_seed(0)
    small = ("hidden_size=32", "depth=2", "num_heads=2", f"bit_tokens={bit_tokens}")
    config = Config().override(*(f"generator.{setting}" for setting in small))
    vocabulary = Vocabulary(
        tokenizer="", model="", image_size=32, tokens=4, sub_tokens=2, id_bits=3, classes=("a", "b")
    )
    generator = Generator(config, vocabulary).eval()
    ids, mask = torch.randint(8, (2, 8)), torch.rand(2, 8) < 0.5
    expected = generator.guided_logits(ids, mask, torch.tensor([0, 1]), 2.0)
    found = generator.pack().guided_logits(ids, mask, torch.tensor([0, 1]), 2.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0


def test_weights_stay_the_same(tokenizer, tmp_path):
    identity = tokenizer.identity()
    state = copy.deepcopy(tokenizer.state_dict())
    packed = copy.deepcopy(tokenizer).pack()
    assert packed.identity() == identity
    assert card(packed, "a/b") == card(tokenizer, "a/b")
    assert packed.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in packed.state_dict().items())
    flowmo.save(packed, tmp_path / "packed.safetensors")
    assert flowmo.load(tmp_path / "packed.safetensors").identity() == identity


@torch.no_grad()
def test_packed_networks_can_be_copied(tokenizer, images):
    packed = tokenizer.pack().encoder
    code = packed(images[:1])
    assert torch.equal(copy.deepcopy(packed)(images[:1]), code)
    assert torch.equal(pickle.load(io.BytesIO(pickle.dumps(packed)))(images[:1]), code)


def test_what_would_go_wrong_is_refused(tokenizer, images):
    state, identity = tokenizer.state_dict(), tokenizer.identity()
    half = FlowMo(tokenizer.config)
    half.decoder.bfloat16()
    with pytest.raises(RuntimeError, match="Packing is for float32 on a CPU"):
        half.pack()
    assert any(isinstance(module, nn.Linear) for module in half.encoder.modules())
    tokenizer.pack()
    with pytest.raises(RuntimeError, match="for inference"):
        tokenizer.encoder(images[:1])
    with pytest.raises(RuntimeError, match="load others before packing"):
        tokenizer.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
    with pytest.raises(RuntimeError, match="stays on the CPU in float32"):
        tokenizer.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="stays on the CPU in float32"):
        tokenizer.to("meta")
    assert tokenizer.to("cpu").float() is tokenizer
    with pytest.raises(RuntimeError, match="Packing is for float32 on a CPU"):
        FlowMo(tokenizer.config).double().pack()
    assert tokenizer.pack() is tokenizer  # twice is once
    assert tokenizer.identity() == identity
    with pytest.raises(RuntimeError, match="pack before compiling"):
        FlowMo(tokenizer.config).compile(backend="eager").pack()
