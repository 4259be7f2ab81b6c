"""The paper's generator: TiTok's UViTBert, its sampling, its loss and its learning rate, against plain numpy."""

import math

import numpy as np
import pytest
import torch
from conftest import CLASSES, run_command
from scipy.special import erf

from flowmo import Config, ConfigError, preset
from flowmo.data.tokens import Vocabulary
from flowmo.generate.generator import Generator, save_generator
from flowmo.streams import Stream, stream
from flowmo.train.cost import training_memory
from flowmo.train.generator import GeneratorStage
from flowmo.train.optimizer import build_optimizers
from flowmo.train.schedule import Schedule

VOCABULARY = Vocabulary(
    tokenizer="00" * 8, model="tiny", image_size=32, tokens=6, sub_tokens=2, id_bits=4, classes=CLASSES
)
PAPERS = Vocabulary(tokenizer="", model="", image_size=256, tokens=256, sub_tokens=2, id_bits=9, classes=("",) * 1000)
HEADS, DEPTH, WIDTH = 2, 4, 24
SMALL = (f"generator.hidden_size={WIDTH}", f"generator.depth={DEPTH}", f"generator.num_heads={HEADS}")


@pytest.fixture
def generator():
    """Random weights large enough that logits, guidance and classes matter."""
    torch.manual_seed(0)
    fresh = Generator(preset("uvit").override(*SMALL, "generator.sample_steps=5"), VOCABULARY)
    for parameter in fresh.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return fresh.eval()


# The network


def test_parameters_are_the_papers():
    """397 178 368, which the paper rounds to 397 M, as 29 blocks, 14 of them with a skip, add up to by hand."""
    with torch.device("meta"):
        network = Generator(preset("uvit"), PAPERS).network
    d = 1024
    block = 2 * 2 * d + 3 * d * d + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)
    total = (512 + 1000 + 2) * d + 513 * d + 29 * block + 14 * (2 * d * d + d) + 2 * d + (512 * d + 512)
    assert sum(p.numel() for p in network.parameters()) == total == 397_178_368
    assert training_memory(preset("uvit"), vocabulary=PAPERS).state_bytes == 20 * total


def test_names_and_shapes_are_titoks():
    """The keys that ``UViTBert.state_dict()`` has, written out from its modules' names."""
    with torch.device("meta"):
        network = Generator(preset("uvit").override(*SMALL), VOCABULARY).network
    d = WIDTH
    block = {
        **{f"norm{i}.{kind}": (d,) for i in (1, 2) for kind in ("weight", "bias")},
        **{"attn.qkv.weight": (3 * d, d), "attn.proj.weight": (d, d), "attn.proj.bias": (d,)},
        **{"mlp.fc1.weight": (4 * d, d), "mlp.fc1.bias": (4 * d,), "mlp.fc2.weight": (d, 4 * d), "mlp.fc2.bias": (d,)},
    }
    skip = {"skip_linear.weight": (d, 2 * d), "skip_linear.bias": (d,)}
    expected = {
        **{"embeddings.weight": (16 + 3 + 2, d), "pos_embed": (1, 13, d)},
        **{f"in_blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()},
        **{f"mid_block.{name}": shape for name, shape in block.items()},
        **{f"out_blocks.{i}.{name}": shape for i in range(2) for name, shape in {**block, **skip}.items()},
        **{"norm.weight": (d,), "norm.bias": (d,), "lm_head.weight": (16, d), "lm_head.bias": (16,)},
    }
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == expected


def plain_logits(weights, ids, mask, labels):
    """UViTBert in float64: b × 12 ids to logits b × 12 × 16. Class c is row 16 + 1 + c, a masked id row 16."""
    w = {name: value.double().numpy() for name, value in weights.items()}

    def linear(x, name):
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(x, name):
        out = np.zeros_like(x)
        q, k, v = np.split(linear(x, f"{name}.qkv"), 3, axis=-1)
        size = WIDTH // HEADS
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            for i in range(len(x)):
                scores = q[i][:, part] @ k[i][:, part].T / math.sqrt(size)
                scores = np.exp(scores - scores.max(-1, keepdims=True))
                out[i][:, part] = scores / scores.sum(-1, keepdims=True) @ v[i][:, part]
        return linear(out, f"{name}.proj")

    def block(x, name):
        x = x + attention(norm(x, f"{name}.norm1"), f"{name}.attn")
        h = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        return x + linear(h * 0.5 * (1 + erf(h / math.sqrt(2))), f"{name}.mlp.fc2")

    rows = np.concatenate([17 + labels[:, None], np.where(mask, 16, ids)], axis=1)
    x = w["embeddings.weight"][rows] + w["pos_embed"]
    outputs = []
    for i in range(DEPTH // 2):
        x = block(x, f"in_blocks.{i}")
        outputs.append(x)
    x = block(x, "mid_block")
    for i in range(DEPTH // 2):
        x = block(linear(np.concatenate([x, outputs.pop()], axis=-1), f"out_blocks.{i}.skip_linear"), f"out_blocks.{i}")
    return linear(norm(x, "norm"), "lm_head")[:, 1:]


def test_forward_is_that_of_a_plain_implementation(generator):
    random = torch.Generator().manual_seed(3)
    ids, mask = torch.randint(16, (4, 12), generator=random), torch.rand(4, 12, generator=random) < 0.5
    labels = torch.tensor([0, 1, 2, 3])  # 3 is no class
    expected = plain_logits(generator.network.state_dict(), ids.numpy(), mask.numpy(), labels.numpy())
    with torch.no_grad():
        found = generator.network(ids, mask, labels)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    assert np.ptp(expected) > 1


# Sampling


def plain_sample(weights, label, seed, steps, guidance, noise):
    """TiTok's rule for one image, in float64, with the uniform numbers that ours draws of a seed."""
    random = stream(seed, Stream.IDS)
    ids, mask = np.zeros((1, 12), dtype=int), np.ones((1, 12), dtype=bool)

    def gumbel(uniform):
        return -np.log(-np.log(np.clip(uniform.double().numpy(), 1e-9, 1 - 1e-7)))

    for step in range(steps):
        progress = (step + 1) / steps
        given, free = (plain_logits(weights, ids, mask, np.array([c])) for c in (label, 3))
        logits = (given + guidance * (given - free))[0] / (0.5 + 0.8 * (1 - progress))
        of_order, of_ids = gumbel(torch.rand(2, 12, generator=random)[1]), gumbel(torch.rand(12, 16, generator=random))
        temperature = noise * (1 - progress)
        drawn = np.where(mask[0], (logits + temperature * of_ids).argmax(-1), ids[0])
        confidence = np.where(mask[0], logits[np.arange(12), drawn], np.inf) + temperature * of_order
        left = math.floor(12 * math.acos(progress) / (math.pi / 2))
        left = max(1, min(int(mask.sum()) - 1, left)) if step < steps - 1 else 0
        again = np.zeros(12, dtype=bool)
        again[np.argsort(confidence)[:left]] = True
        ids, mask = drawn[None] * ~again, again[None]
    return ids[0]


@pytest.mark.parametrize("noise", [0.0, 2.8])
def test_sampling_is_titoks(generator, noise):
    drawn = generator.sample([0, 1, 2], [7, 8, 9], guidance=1.5, choice_temperature=noise).flatten(1)
    for i, label in enumerate((0, 1, 2)):
        expected = plain_sample(generator.network.state_dict(), label, 7 + i, 5, 1.5, noise)
        assert drawn[i].tolist() == expected.tolist()


def plain_maskgit(weights, label, seed, steps, guidance, noise):
    """MaskGIT's rule for one image, in float64: draw from the softmax, keep the likeliest, with noise that ends."""
    random = stream(seed, Stream.IDS)
    ids, mask = np.zeros((1, 12), dtype=int), np.ones((1, 12), dtype=bool)
    for step in range(steps):
        share = step / (steps - 1)
        given, free = (plain_logits(weights, ids, mask, np.array([c])) for c in (label, 3))
        logits = (given + guidance * (given - free))[0] / (1.3 - 0.8 * share)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        of_ids, of_order = torch.rand(2, 12, generator=random).double().numpy()
        drawn = np.where(mask[0], (p.cumsum(-1) <= of_ids[:, None]).sum(-1), ids[0])
        score = np.log(p[np.arange(12), drawn]) - noise * (1 - share) * np.log(-np.log(of_order))
        left = math.floor(12 * math.acos((step + 1) / steps) / (math.pi / 2))
        left = max(1, min(int(mask.sum()) - 1, left)) if step < steps - 1 else 0
        again = np.zeros(12, dtype=bool)
        again[np.argsort(np.where(mask[0], score, np.inf))[:left]] = True
        ids, mask = np.where(again, 0, drawn)[None], again[None]
    return ids[0]


@pytest.mark.parametrize("noise", [0.0, 2.8])
def test_sampling_is_maskgits(generator, noise):
    other = Generator(generator.config.override("generator.drawing=categorical"), VOCABULARY).eval()
    other.load_state_dict(generator.state_dict())
    drawn = other.sample([0, 1, 2], [7, 8, 9], guidance=1.5, choice_temperature=noise).flatten(1)
    for i, label in enumerate((0, 1, 2)):
        expected = plain_maskgit(other.network.state_dict(), label, 7 + i, 5, 1.5, noise)
        assert drawn[i].tolist() == expected.tolist()


def test_gumbel_noise_draws_from_a_softmax(generator):
    """argmax of logits + τ · Gumbel noise has the probabilities softmax(logits / τ)."""
    from flowmo.generate.generator import gumbel

    logits, tau = torch.tensor([0.0, 1.0, 2.0, -1.0]), 1.7
    uniform = torch.rand(200_000, 4, generator=torch.Generator().manual_seed(0))
    share = (logits + tau * gumbel(uniform)).argmax(-1).bincount(minlength=4) / len(uniform)
    expected = np.exp(logits.numpy() / tau) / np.exp(logits.numpy() / tau).sum()
    np.testing.assert_allclose(share.numpy(), expected, atol=0.005)


def test_guidance_conventions(generator):
    """class + g (class − null) equals null + (g + 1) (class − null): the paper's 1.5 is 2.5 of the other form."""
    other = Generator(generator.config.override("generator.guided_from=null"), VOCABULARY).eval()
    other.load_state_dict(generator.state_dict())
    for ours, theirs in ((1.5, 2.5), (0, 1), (-1, 0)):
        drawn = (
            g.sample([0, 1], guidance=value, choice_temperature=0.0)
            for g, value in ((generator, ours), (other, theirs))
        )
        assert torch.equal(*drawn)
    assert not torch.equal(*(generator.sample([0, 1], guidance=g, choice_temperature=0.0) for g in (-1, 1.5)))
    assert generator.guidance_in_words() == "guidance 1.5: class + g · (class − null), none at 0"
    assert other.guidance_in_words(3) == "guidance 3: null + g · (class − null), none at 1"
    calls = []
    handle = generator.network.register_forward_hook(lambda *_: calls.append(1))
    generator.sample([0], guidance=0)
    handle.remove()
    assert len(calls) == 5


def test_generate_says_the_convention(tmp_path, capsys, tiny_model):
    import flowmo

    identity = flowmo.load(tiny_model).identity()
    vocabulary = Vocabulary(**{**vars(VOCABULARY), "tokenizer": identity})
    save_generator(Generator(preset("uvit").override(*SMALL), vocabulary), tmp_path / "g.safetensors")
    words = ("generate", tmp_path / "g.safetensors", "--model", tiny_model, "--count", "1", "--steps", "2")
    code, out, _ = run_command(capsys, *words, "--out", tmp_path / "a.png")
    assert (code, "guidance 1.5: class + g · (class − null)" in out) == (0, True)
    code, out, _ = run_command(capsys, *words, "--out", tmp_path / "many", "--guidance", "2", "--json")
    assert (code, '"guidance": "guidance 2: class + g' in out) == (0, True)
    with pytest.raises(SystemExit):
        run_command(capsys, "generate", "--help")
    assert "1.5 is 2.5 of the first form" in " ".join(capsys.readouterr().out.split())


# Training


def test_loss_weighs_visible_ids_by_a_tenth(generator):
    random = torch.Generator().manual_seed(4)
    ids, mask = torch.randint(16, (3, 12), generator=random), torch.rand(3, 12, generator=random) < 0.6
    labels = torch.tensor([0, 1, 3])
    logits = plain_logits(generator.network.state_dict(), ids.numpy(), mask.numpy(), labels.numpy())
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.full((3, 12, 16), 0.1 / 16)
    np.put_along_axis(target, ids.numpy()[..., None], 0.9 + 0.1 / 16, axis=-1)
    each = -(target * logs).sum(-1)
    weight = np.where(mask.numpy(), 1, 0.1)
    ratios = 2 / math.pi * np.arccos((np.arange(100_000) + 0.5) / 100_000)
    masked = np.ceil(12 * ratios).mean() / 12  # somewhat more than arccos' mean, 2 / π: half an id is rounded up
    mean_weight = masked + 0.1 * (1 - masked)
    with torch.no_grad():
        loss = float(GeneratorStage(generator)(ids, labels, mask).loss)
    assert loss == pytest.approx(float((weight * each).sum()) / (36 * mean_weight), rel=1e-4)


def test_learning_rate_is_a_cosine_after_the_warm_up():
    """TiTok's schedule with the paper's rate: 10 000 steps up to 1e-4, then half a cosine to 1e-5."""
    config = preset("uvit")
    times = Schedule.of(config, 128, 1_281_167)
    total, warm = 384_000_000, 1_280_000  # 300 epochs of ImageNet, of tokens with mirrored images 150

    def expected(images):
        if images < warm:
            return 1e-4 * (images + 128) / warm
        return 1e-5 + 9e-5 * 0.5 * (1 + math.cos(math.pi * (images - warm) / (total - warm)))

    for images in (0, 640_000, warm, 2 * warm, total // 2, total - 128):
        assert times.learning_rate(config.opt, images) == pytest.approx(expected(images), rel=1e-9)
    assert times.learning_rate(config.opt, total) == pytest.approx(1e-5)


def test_weight_decay_is_for_linear_maps_alone(generator):
    decay = {id(p): g["weight_decay"] for g in build_optimizers(generator)[0].param_groups for p in g["params"]}
    for name, parameter in generator.network.named_parameters():
        plain = parameter.ndim < 2 or "norm" in name or "embed" in name  # what TiTok's training leaves out
        assert decay[id(parameter)] == (0 if plain else 0.03), name
    assert build_optimizers(generator)[0].param_groups[0]["betas"] == (0.9, 0.96)


def test_settings_that_uvit_has_not_are_refused():
    for settings in ("generator.depth=27", "generator.bit_tokens=true"):
        with pytest.raises(ConfigError, match="uvit"):
            preset("uvit").override(settings)


def test_a_maskgit_is_called_as_before():
    """Its identity names files and lets them be read; a setting that it does not need must not change it."""
    torch.manual_seed(0)
    small = ("generator.hidden_size=32", "generator.depth=2", "generator.num_heads=2", "generator.sample_steps=4")
    fresh = Generator(Config().override("generator.train=true", *small), VOCABULARY)
    for name, parameter in sorted(fresh.named_parameters()):
        torch.nn.init.constant_(parameter, len(name) / 64)
    assert fresh.identity() == "1f814398f22ab932"
