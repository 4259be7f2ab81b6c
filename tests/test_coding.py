"""Context models of ids: what they promise of themselves, and the range coder on top."""

import re
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.numpy import save_file

from flowmo import preset
from flowmo.cli import main
from flowmo.codec import range_coder
from flowmo.codec.context import ONE, ContextError, ContextModel, logistic_table
from flowmo.codec.generator import GeneratorModel
from flowmo.data.bits import token_bits, token_ids
from flowmo.data.tokens import Vocabulary
from flowmo.generate.generator import Generator

sys.path.insert(0, str(ROOT / "runs"))
import context_tokens as fitting
import fit_context
from context_tokens import ideal_code_length

T, B = 12, 8


class Sources:
    """Ids of pictures as ``Tokens`` gives them, with a structure to be found: a token repeats the one above it with
    some noise, its second half is the first reversed, and token 0 is always 0."""

    metadata = Vocabulary(
        tokenizer="0123456789abcdef",
        model="tiny",
        image_size=32,
        tokens=T,
        sub_tokens=2,
        id_bits=4,
    )

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        bits = np.zeros((400, T, B), np.int8)
        for token in range(1, T):
            fresh = rng.integers(0, 2, (400, 4))
            above = bits[:, token - 4, :4] if token >= 4 else fresh
            bits[:, token, :4] = np.where(rng.random((400, 4)) < 0.9, above, fresh)
            bits[:, token, 4:] = bits[:, token, 3::-1]
        self.bits = bits
        self._ids = torch.from_numpy(token_ids(bits, 4))

    def __len__(self):
        return 400

    def ids(self, index):
        return self._ids[index]


@pytest.fixture(scope="module")
def sources():
    return Sources()


@pytest.fixture(scope="module")
def models(sources):
    return {
        "frequencies": fitting.frequencies(sources),
        "context": fitting.fit(sources, "lattice", hidden=16, steps=400),
        "diagonal": fitting.fit(sources, "diagonal", hidden=0, steps=50),
    }


def probabilities(model, bits):
    """That each bit is set given those before it, times ONE, in the order tokens, bits, pictures."""
    asked = []
    model.run(len(bits), lambda token, bit, p: asked.append(p) or bits[:, token, bit])
    return np.stack(asked).reshape(*bits.shape[1:], len(bits))


def test_bits_and_ids():
    ids = torch.randint(0, 512, (3, 5, 4)).numpy()
    bits = token_bits(ids, 9)
    assert bits.shape == (3, 5, 36)
    assert np.array_equal(token_ids(bits, 9), ids)
    assert token_bits(np.array([[[1, 6]]]), 3).tolist() == [[[1, 0, 0, 0, 1, 1]]]


def test_the_logistic_table():
    table, logits = logistic_table(), np.arange(-2560, 2561) / 256
    assert np.abs(table - ONE / (1 + np.exp(-logits))).max() <= 0.5 + 1e-6
    assert (table[::-1] + table == ONE).all()
    assert table.min() > 0
    assert table.max() < ONE


def test_what_is_fitted_finds_the_structure(sources, models):
    """Against entropies: half of the bits repeat the others, nine tenths of the rest repeat those above."""
    other = Sources(seed=1).bits[:100]
    frequencies, context = (ideal_code_length(models[name].run, other).mean() for name in ("frequencies", "context"))

    def entropy(p):
        return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))

    # Below token 0, all zeros, a bit is set with probability 0.05, and below that with 0.095; elsewhere with a half.
    assert frequencies == pytest.approx(9 * B + B * entropy(0.05) + B * entropy(0.095), rel=0.02)
    least = 3 * 4 + 8 * 4 * entropy(0.05)  # tokens 1 to 3 have four fresh bits, those below repeat with 0.95
    assert least - 1 < context < 1.35 * least + 4


def test_the_integers_are_the_network_rounded(sources):
    """The fitted network in floating point and its integers give nearly the same probabilities."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = fitting.Network(T, B, ((0, -1), (-1, 0), (-1, 1)), 16, generator)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        logits = net(torch.from_numpy(sources.bits[:20]).float() * 2 - 1)
    model = ContextModel("0" * 16, ((0, -1), (-1, 0), (-1, 1)), **net.rounded())
    p = probabilities(model, sources.bits[:20]).transpose(2, 0, 1) / ONE
    assert np.abs(p - logits.clamp(-10, 10).sigmoid().numpy()).max() < 0.02


def test_probabilities_heed_only_what_is_coded_before(sources, models):
    """Changing a bit changes no probability before it, nor its own."""
    model = models["context"]
    bits = sources.bits[:1].copy()
    before = probabilities(model, bits)[..., 0].ravel()
    for place in (0, 37, 50, 95):
        changed = bits.copy().reshape(-1)
        changed[place] ^= 1
        after = probabilities(model, changed.reshape(bits.shape))[..., 0].ravel()
        assert np.array_equal(before[: place + 1], after[: place + 1])
        assert place == 95 or not np.array_equal(before, after)


@pytest.mark.parametrize("name", ["frequencies", "context", "diagonal"])
def test_the_coder_gives_back_every_bit(models, sources, name):
    pytest.importorskip("constriction")
    model, rng = models[name], np.random.default_rng(3)
    noise = rng.integers(0, 2, (7, T, B)).astype(np.int8)
    for bits in (sources.bits[:9], sources.bits[:1], noise, np.zeros_like(noise), np.ones_like(noise)):
        string = range_coder.encode(model.run, bits)
        assert np.array_equal(range_coder.decode(model.run, string, len(bits)), bits)
        assert len(string) <= ideal_code_length(model.run, bits).sum() / 8 + 8


def test_a_changed_string_gives_other_bits_or_an_error(models, sources):
    pytest.importorskip("constriction")
    model, bits = models["context"], sources.bits[:3]
    string = range_coder.encode(model.run, bits)
    refused = 0
    for place in range(len(string)):
        for change in (1, 0x55, 0x80):
            damaged = bytearray(string)
            damaged[place] ^= change
            try:
                assert not np.array_equal(range_coder.decode(model.run, bytes(damaged), 3), bits)
            except ContextError:
                refused += 1
    assert refused
    assert np.array_equal(range_coder.decode(model.run, string + bytes(5), 3), bits)


def test_a_model_is_its_file(models, tmp_path):
    for name, model in models.items():
        path = tmp_path / f"{name}.context.safetensors"
        path.write_bytes(model.save())
        again = ContextModel.read(path)
        assert again.identity == model.identity
        assert again.neighbours == model.neighbours
        assert np.array_equal(again.bias, model.bias)
    assert len({model.identity for model in models.values()}) == 3


def test_files_that_are_no_context_model(models, tmp_path):
    content = models["context"].save()
    for name, bad in (("cut", content[:200]), ("empty", b""), ("text", b"hello there")):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(ContextError, match=name):
            ContextModel.read(tmp_path / name)
    with pytest.raises(ContextError, match="none"):
        ContextModel.read(tmp_path / "none")
    arrays = {
        name: getattr(models["context"], name) for name in ("bias", "place", "hidden", "own", "direct", "earlier")
    }
    with pytest.raises(ContextError, match="readout has shape"):
        ContextModel("0" * 16, models["context"].neighbours, readout=np.zeros((B, 3)), **arrays)
    with pytest.raises(ContextError, match="too far away"):
        replace(models["diagonal"], neighbours=((0, -(1 << 40)), (0, -2), (0, -3), (0, -4)))
    for bad in (-(1 << 63), 1 << 15):
        with pytest.raises(ContextError, match="exceed 16 bits"):
            replace(models["context"], bias=np.full_like(models["context"].bias, bad))
    sound = [getattr(models["context"], field.name) for field in fields(models["context"])[2:]]
    for name, dtype, neighbours, sentence in (
        ("float", np.float32, "[]", "not 16-bit integers"),
        ("infinite", np.int16, "[[-Infinity, 0]]", "cannot convert float infinity"),
        ("deep", np.int16, "[" * 100_000, "recursion"),
    ):
        metadata = {"flowmo_context": "1", "tokenizer": "0" * 16, "neighbours": neighbours}
        arrays = dict(zip((field.name for field in fields(ContextModel)[2:]), sound, strict=True))
        save_file({key: array.astype(dtype) for key, array in arrays.items()}, tmp_path / name, metadata)
        with pytest.raises(ContextError, match=f"{name}: .*{sentence}"):
            ContextModel.read(tmp_path / name)
    with pytest.raises(ContextError, match="not all coded before"):
        replace(models["diagonal"], neighbours=((0, 1), (0, -2), (0, -3), (0, -4)))


def test_the_command(tiny_model, class_folder, tmp_path, capsys):
    tokens = str(tmp_path / "tokens")
    assert main(["tokenize", str(class_folder), "--model", str(tiny_model), "--out", tokens, "--flip"]) == 0
    out = tiny_model.with_name("tiny.context.safetensors")
    words = [tokens, "--model", str(tiny_model), "--output", str(out), "--held-out", tokens]
    assert fit_context.main([*words, "--hidden", "8", "--steps", "60"]) == 0
    said = capsys.readouterr().out
    measured = re.search(r"packed ([\d.]+), by frequencies ([\d.]+) .*, by context ([\d.]+)", said)
    packed, frequencies, context = map(float, measured.groups())
    assert packed == 6
    assert frequencies < packed
    assert context < packed
    assert fit_context.main([*words, "--frequencies", "--force"]) == 0
    assert ContextModel.read(out).neighbours == ()


@pytest.fixture
def generator(sources):
    """One of random weights, strong enough to have opinions."""
    torch.manual_seed(0)
    small = ("generator.depth=2", "generator.hidden_size=64", "generator.num_heads=1")
    generator = Generator(preset("maskgit_nano").override(*small), Sources.metadata).eval().requires_grad_(False)
    for parameter in generator.parameters():
        parameter.mul_(4)
    return generator


def test_a_generator_in_the_place_of_a_context_model(generator, sources):
    """Its strings are as long as its likelihood says, and the ids come back."""
    pytest.importorskip("constriction")
    model, bits = GeneratorModel(generator, steps=4), sources.bits[:5]
    likelihood = generator.log_prob(torch.from_numpy(token_ids(bits, 4)), steps=4).numpy()
    assert ideal_code_length(model.run, bits) == pytest.approx(-likelihood / np.log(2), rel=0.04)
    assert likelihood.std() > 1
    string = range_coder.encode(model.run, bits)
    assert len(string) <= ideal_code_length(model.run, bits).sum() / 8 + 8
    assert np.array_equal(range_coder.decode(model.run, string, 5), bits)
    assert GeneratorModel(generator, steps=5).identity != model.identity


def test_a_generators_probabilities_are_the_same_in_any_company(generator, sources):
    """However many pictures and threads there are, the rounded numbers agree."""
    model, seen = GeneratorModel(generator, steps=4), []
    threads = torch.get_num_threads()
    for count in (1, 4):
        torch.set_num_threads(count)
        for pictures in (1, 3):
            numbers = []

            def look_up(token, bit, p, numbers=numbers, pictures=pictures):
                numbers.append(p[0])
                return sources.bits[:pictures, token, bit]

            model.run(pictures, look_up)
            seen.append(numbers)
    torch.set_num_threads(threads)
    assert all(numbers == seen[0] for numbers in seen)
