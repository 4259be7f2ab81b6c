import itertools
import math

import pytest
import torch
from conftest import bottleneck, bsq, fsq, lfq, vq

from flowmo import load, save
from flowmo.config import Config, ConfigError
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.stages import pretrain_loss
from flowmo.model.quantizers import QUANTIZERS, build_quantizer
from flowmo.model.quantizers.infill import HUB_NAMES
from flowmo.tokenizer import FlowMo
from flowmo.train.cost import training_flops


def reference_entropies(code, group, temperature=0.1, eps=1e-5):
    """The authors' way: a softmax over the whole codebook for every sub-token."""
    sub_tokens = code.shape[-1] // group
    codebook = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=group)), dtype=code.dtype)
    x = code.unflatten(-1, (group, sub_tokens)).movedim(-2, -1)
    probabilities = (2 * x @ codebook.T / temperature).softmax(dim=-1).flatten(0, -2)
    sample = -(probabilities * probabilities.clamp_min(1e-300).log()).sum(dim=-1).mean()
    mean = probabilities.mean(dim=0)
    return sample, -(mean * (mean + eps).log()).sum()


@pytest.mark.parametrize(("channels", "group"), [(18, 9), (8, 4), (6, 1), (56, 14)])
@pytest.mark.parametrize("scale", [0.01, 0.3, 5.0])
def test_factorised_entropies_equal_the_full_softmax(channels, group, scale):
    code = scale * torch.randn(2, 3, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual = lfq(channels, group).entropies(code)
    for a, b in zip(actual, reference_entropies(code, group), strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-9, abs=1e-9)


def test_bit_layout():
    """Sub-token s takes channels s, s + f/G, …, and bit g is set where channel g·(f/G) + s is positive."""
    quantizer = lfq(channels=6, group=3)  # 2 sub-tokens
    code = torch.tensor([[[1.0, -1, -1, -1, 1, 1]]])
    signs, ids = quantizer.quantize(code)
    assert ids.tolist() == [[[0b101, 0b100]]]
    assert torch.equal(quantizer.code_from_ids(ids), signs)


def test_ids_and_codes_are_one_to_one():
    quantizer = lfq(channels=12, group=4)
    ids = torch.randint(0, 16, (3, 7, 3), generator=torch.Generator().manual_seed(0))
    code = quantizer.code_from_ids(ids)
    assert code.abs().eq(1).all()
    assert torch.equal(quantizer.quantize(code)[1], ids)


def test_zero_is_an_unset_bit():
    signs, ids = lfq(4, 4).quantize(torch.zeros(1, 1, 4))
    assert signs.eq(-1).all()
    assert ids.item() == 0


def test_straight_through_gradient():
    code = torch.randn(2, 3, 4, requires_grad=True)
    quantized = lfq(4, 4, entropy_weight=0, commitment_weight=0)(code)
    assert torch.equal(quantized.code.abs(), torch.ones_like(code)), "exactly ±1 in the forward pass"
    quantized.code.sum().backward()
    assert torch.equal(code.grad, torch.ones_like(code))


def test_losses_reach_the_code():
    made = lfq(4, 4, entropy_weight=0.5, commitment_weight=0.25)(torch.randn(2, 3, 4))
    seen = made.statistics
    assert made.losses["entropy"] == 0.5 * (seen["sample_entropy"] - seen["codebook_entropy"])  # sure and spread out
    assert made.losses["commitment"] == 0.25 * seen["commitment"]
    for name in ("entropy", "commitment"):
        code = torch.randn(2, 3, 4, requires_grad=True)
        lfq(4, 4)(code).losses[name].backward()
        assert code.grad.abs().sum() > 0


def test_entropy_statistics_keep_their_precision_under_autocast():
    code = torch.randn(4, 16, 18, generator=torch.Generator().manual_seed(0))
    plain = lfq(18, 9)(code).statistics["codebook_entropy"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lfq(18, 9)(code).statistics["codebook_entropy"], plain)


def test_kl_of_a_standard_normal_is_zero_and_samples_follow_the_moments():
    quantizer = bottleneck("kl", 3)
    assert quantizer(torch.zeros(4, 5, 6)).losses["kl"].item() == 0
    code = torch.cat((torch.full((1, 2000, 3), 2.0), torch.full((1, 2000, 3), -2.0)), dim=-1)
    sample = quantizer(code).code
    assert sample.mean().item() == pytest.approx(2.0, abs=0.05)
    assert sample.std().item() == pytest.approx(torch.tensor(-1.0).exp().item(), rel=0.05)


def test_kl_is_that_of_two_normals():
    quantizer, code = bottleneck("kl", 3), 2 * torch.randn(4, 5, 6)
    mean, log_variance = code.chunk(2, dim=-1)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2)).mean()
    torch.testing.assert_close(quantizer(code).losses["kl"], expected)
    assert torch.equal(quantizer.quantize(code)[0], mean)
    far = quantizer.moments(torch.tensor([[[0.0, 0, 0, -1e4, 0, 1e4]]]))[1]
    assert far.tolist() == [[[-30, 0, 20]]]


def test_identity_passes_on():
    code = torch.randn(1, 2, 3)
    assert torch.equal(bottleneck("noop", 3)(code).code, code)
    assert torch.equal(bottleneck("noop", 3).quantize(code)[0], code)


@pytest.mark.parametrize("kind", ["lfq", "bsq", "fsq", "vq", "kl", "layernorm", "noop"])
def test_registry(kind):
    quantizer = build_quantizer(Config().override(f"model.quantization_type={kind}").model)
    assert quantizer.encoder_channels == (36 if kind == "kl" else 18)
    assert quantizer.channels == 18


@pytest.mark.parametrize("kind", ["lfq", "fsq", "vq"])
def test_a_bottleneck_in_half_precision(kind):
    quantizer = build_quantizer(Config().override(f"model.quantization_type={kind}").model)
    code, ids = quantizer.bfloat16().quantize(torch.randn(2, 3, quantizer.channels).bfloat16())
    assert code.dtype == quantizer.code_from_ids(ids).dtype == torch.float32
    assert torch.equal(code, quantizer.code_from_ids(ids))


@pytest.mark.parametrize(
    ("quantizer", "sub_tokens", "ids"),
    [
        (fsq(6, 8, 9), 2, 512),
        (fsq(6, 5, 7), 2, 125),
        (bsq(18, 9), 2, 512),
        (lfq(18, 9), 2, 512),
        (vq(18, 512, 2), 2, 512),
        (vq(6, 100, 3), 3, 100),
    ],
)
def test_discrete_bottlenecks_keep_their_promises(quantizer, sub_tokens, ids):
    """Codes from ids are those that made the ids, training sees the same, and the encoder gets gradients."""
    assert quantizer.sub_tokens == sub_tokens
    assert quantizer.id_count == ids
    random = torch.Generator().manual_seed(0)
    code = (2 * torch.randn(3, 7, quantizer.encoder_channels, generator=random)).requires_grad_()
    made, found = quantizer.quantize(code)
    assert found.shape == (3, 7, quantizer.sub_tokens)
    assert found.min() >= 0
    assert found.max() < quantizer.id_count
    torch.testing.assert_close(quantizer.code_from_ids(found), made)
    every = torch.arange(quantizer.id_count).view(1, -1, 1).expand(1, -1, quantizer.sub_tokens)
    assert len(quantizer.code_from_ids(every)[0].unique(dim=0)) == quantizer.id_count, "every id has a code of its own"
    trained = quantizer(code)
    torch.testing.assert_close(trained.code, made)
    assert torch.equal(trained.ids, found)
    (trained.code.cumsum(-1).sum() + sum(trained.losses.values(), torch.zeros(()))).backward()
    assert (code.grad != 0).all()


def test_levels_of_fsq():
    quantizer = fsq(1, 5, 3)
    line = torch.linspace(-9, 9, 2001).view(1, -1, 1)
    made, ids = quantizer.quantize(line)
    assert made.unique().tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert (ids.diff(dim=1) >= 0).all()
    assert fsq(9, 2, 9).id_count == 512  # two levels are bits
    for channels, levels in ((9, 2), (4, 4), (3, 5), (3, 8)):
        quantizer = fsq(channels, levels, 9)
        for value, id in ((40.0, levels**channels - 1), (-40.0, 0)):  # a tanh of 1 and of -1
            assert quantizer.quantize(torch.full((1, 1, channels), value))[1].tolist() == [[[id]]]


def test_a_bit_that_all_tokens_set_has_a_finite_gradient():
    code = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], requires_grad=True)
    _, loss = bsq(2, 1, entropy_weight=1.0).entropies(code)
    loss.backward()
    assert torch.isfinite(code.grad).all()


def test_bsq_lies_on_the_sphere_and_its_entropy_is_bounded_by_its_bits():
    quantizer = bsq(18, 9)
    result = quantizer(torch.randn(4, 50, 18))
    torch.testing.assert_close(result.code.norm(dim=-1), torch.ones(4, 50))
    assert 0 <= result.statistics["sample_entropy"] <= result.statistics["codebook_entropy"] <= 18 * math.log(2) + 1e-4
    same = quantizer(torch.randn(1, 1, 18).expand(4, 50, -1))
    torch.testing.assert_close(same.statistics["sample_entropy"], same.statistics["codebook_entropy"])


def test_bsq_entropies_equal_the_full_softmax():
    """A softmax of ⟨x, corner⟩ / 0.01 over all corners."""
    quantizer = bsq(6, 3)
    on_sphere = quantizer.normalize(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 5e-3).double()
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6))).double() / 6**0.5
    p = (100 * on_sphere @ corners.T).softmax(dim=-1)
    set_bits = (p @ (corners > 0).double()).mean(dim=0)
    sample, mean = quantizer.entropies(on_sphere[None])
    assert sample.item() == pytest.approx(torch.special.entr(p).sum(dim=-1).mean().item(), rel=1e-6)
    bits = torch.special.entr(set_bits) + torch.special.entr(1 - set_bits)
    assert mean.item() == pytest.approx(bits.sum().item(), rel=1e-6)


def test_bsq_scales_each_token_and_draws_it_to_its_corner():
    quantizer, code = bsq(2, 1), torch.tensor([[[3.0, 4.0], [2.0, 0.0], [0.0, 5.0]]])
    on_sphere = quantizer.normalize(code)
    torch.testing.assert_close(on_sphere, torch.tensor([[[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]]]))
    half = 2**-0.5
    squared = [(0.6 - half) ** 2 + (0.8 - half) ** 2, (1 - half) ** 2 + half**2, half**2 + (1 - half) ** 2]
    distance = quantizer.commitment(on_sphere, quantizer.nearest_code(on_sphere))
    assert distance.item() == pytest.approx(sum(squared) / 3, rel=1e-5)


def test_parts_of_a_batch_have_its_gradient():
    """The mean over parts of their losses' gradients, given the whole batch's means, is that of the whole (BSQ)."""
    quantizer = bsq(8, 4, entropy_weight=1.0)
    code = torch.randn(6, 5, 8)
    whole = code.clone().requires_grad_()
    sum(quantizer(whole).losses.values()).backward()
    means = quantizer.logits(quantizer.normalize(code)).sigmoid().flatten(0, 1).mean(dim=0)
    parts = code.clone().requires_grad_()
    total = sum(sum(quantizer(part, lambda _: means).losses.values()) for part in parts.chunk(3)) / 3
    total.backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["fsq", "bsq", "vq"])
def test_a_tokenizer_with_another_bottleneck(tiny_config, images, kind):
    tokenizer = FlowMo(
        tiny_config.override(f"model.quantization_type={kind}", "model.fsq_levels=4", "model.vq_entries=16")
    ).eval()
    codes = tokenizer.encode(images)
    assert codes.bits == tokenizer.config.bits_per_image * len(images)
    assert tokenizer.decode(codes, steps=1).shape == images.shape


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZERS if kind not in HUB_NAMES])
def test_settings_know_the_ids_of_every_bottleneck(tiny_config, kind):
    """Rates and nested dropout are computed from the settings, without a network."""
    config = tiny_config.override(f"model.quantization_type={kind}", "model.fsq_levels=4", "model.vq_entries=16")
    torch.manual_seed(0)
    quantizer = build_quantizer(config.model)
    code = torch.randn(64, 128, quantizer.encoder_channels)
    ids = quantizer.quantize(code)[1]
    if ids is None:
        assert config.model.ids_per_token is None
    else:
        assert config.model.ids_per_token == (ids.shape[2], int(ids.max()) + 1)


@pytest.mark.parametrize(
    ("ids", "error", "sentence"),
    [
        (torch.zeros(1, 6, 2), TypeError, "float32"),
        (torch.zeros(1, 6, 2, dtype=torch.bool), TypeError, "bool"),
        ([[0]], TypeError, "list"),
        (torch.zeros(1, 7, 2, dtype=torch.long), ValueError, r"\(batch, 6, 2\)"),
        (torch.zeros(6, 2, dtype=torch.long), ValueError, r"\(batch, 6, 2\)"),
        (torch.full((1, 6, 2), 16), ValueError, "from 0 to 15"),
        (torch.full((1, 6, 2), -1), ValueError, "from 0 to 15"),
    ],
)
def test_bad_ids(tiny, ids, error, sentence):
    with pytest.raises(error, match=sentence):
        tiny.check_ids(ids, tokens=6)


def test_any_integer_type_is_taken(tiny):
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert tiny.check_ids(torch.ones(1, 6, 2, dtype=dtype), 6).dtype == torch.int64


def test_noise_synchronization(tiny_config, images):
    """A tenth of the codes are part noise, up to a level; the decoder's timesteps of those start there."""
    quantizer = bottleneck("layernorm", 16)
    torch.manual_seed(0)
    code = 3 * torch.randn(2000, 4, 16) + 1
    quantized = quantizer(code)
    level, (normed, none) = quantized.noise_level, quantizer.quantize(code)
    assert none is None
    torch.testing.assert_close(normed.mean(dim=-1), torch.zeros(2000, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(dim=-1, correction=0), torch.ones(2000, 4), atol=1e-4, rtol=0)
    noised = level > 0
    assert 0.07 < noised.float().mean() < 0.13
    assert level[noised].mean() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(quantized.code[~noised], normed[~noised])
    noise = (quantized.code - (1 - level)[:, None, None] * normed)[noised] / level[noised, None, None]
    assert noise.std() == pytest.approx(1.0, abs=0.05)
    assert (noise * normed[noised]).mean().abs() < 0.05

    config = tiny_config.override("model.quantization_type=layernorm", "opt.lpips_weight=0")
    tokenizer, seen = FlowMo(config), []
    forward = tokenizer.decoder.forward
    tokenizer.decoder.forward = lambda x, code, t: seen.append(t) or forward(x, code, t)
    draws = TrainingNoise.of(config, images, range(5))
    for seed in range(20):
        torch.manual_seed(seed)
        pretrain_loss(tokenizer, images, draws, tokenizer.config.opt, None)
    moved = torch.stack(seen)
    assert (moved >= draws.t - 1e-6).all()
    assert 0 < (moved > draws.t + 1e-6).sum() < 40


def train_codebook(quantizer, code, steps, whole_batch=None):
    for _ in range(steps):
        if whole_batch is None:
            quantizer(code)
        else:
            for part in code.chunk(len(code)):
                quantizer(part, whole_batch)
        quantizer.learn()


def test_a_codebook_finds_the_places_that_codes_have():
    """Sixteen clusters and as many entries, all of which start far off: each comes to be the mean of a cluster."""
    generator = torch.Generator().manual_seed(0)
    centres = 5 + torch.randn(16, 4, generator=generator)
    code = (centres.repeat(50, 1) + 0.02 * torch.randn(800, 4, generator=generator)).view(1, 800, 4)
    quantizer = vq(4, 16, 1, decay=0.9)
    train_codebook(quantizer, code, 400)
    used = quantizer(code).ids.unique()
    assert len(used) >= 14, "entries out of use restart where there is something to tell apart"
    made = quantizer.quantize(code)[0]
    assert (made - code).square().mean() < 0.1 * code.var()
    nearest = torch.cdist(quantizer.codebook[used], centres).amin(dim=1)
    assert nearest.median() < 0.05


def test_training_alone_moves_a_codebook():
    quantizer = vq(8, 16, 2)
    before = quantizer.codebook.clone()
    quantizer(torch.randn(4, 6, 8))
    quantizer.quantize(torch.randn(4, 6, 8))
    assert torch.equal(quantizer.codebook, before), (
        "a pass changes nothing; a step may be skipped, or be of many passes"
    )
    quantizer.learn()
    assert not torch.equal(quantizer.codebook, before)
    learnt = quantizer.codebook.clone()
    quantizer.learn()
    assert torch.equal(quantizer.codebook, learnt), "nothing was seen since"


def test_a_codebook_learns_the_same_from_a_batch_and_from_its_parts():
    code = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    whole = vq(8, 16, 2)
    parts = vq(8, 16, 2)
    parts.load_state_dict(whole.state_dict())
    for _ in range(5):
        ids = parts.quantize(code)[1]
        mean = parts.statistics(code, ids)  # what every process, and every pass, is given
        train_codebook(parts, code, 1, lambda _, mean=mean: mean)
        train_codebook(whole, code, 1)
    assert whole.steps == 5
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name


def test_commitment_of_parts_has_the_gradient_of_the_whole():
    code = torch.randn(6, 5, 8)
    quantizer = vq(8, 16, 2)
    whole, parts = (code.clone().requires_grad_() for _ in range(2))
    quantizer(whole).losses["commitment"].backward()
    (sum(quantizer(part).losses["commitment"] for part in parts.chunk(3)) / 3).backward()
    torch.testing.assert_close(parts.grad, whole.grad)


def test_the_first_batch_spreads_a_codebook_over_itself():
    generator = torch.Generator().manual_seed(0)
    mean, deviation = torch.tensor([5.0, -3.0]), torch.tensor([0.5, 2.0])
    quantizer = vq(4, 4096, 2)
    quantizer(mean.repeat(2) + deviation.repeat(2) * torch.randn(8, 500, 4, generator=generator))
    quantizer.learn()
    torch.testing.assert_close(quantizer.codebook.mean(dim=0), mean, rtol=0, atol=0.15)
    torch.testing.assert_close(quantizer.codebook.std(dim=0), deviation, rtol=0.05, atol=0)
    torch.testing.assert_close(quantizer.members / quantizer.use[:, None], quantizer.codebook)
    torch.testing.assert_close(quantizer.use.sum(), torch.tensor(1.0))


def test_a_codebook_follows_moving_averages_of_counts_and_sums():
    """As in van den Oord et al., appendix A.1, by a plain loop over sub-tokens."""
    torch.manual_seed(0)
    quantizer = vq(6, 5, 2, decay=0.9)
    code = torch.randn(4, 7, 6)
    train_codebook(quantizer, code, 1)
    use, sums = 0.9 * quantizer.use, 0.9 * quantizer.members
    code = torch.randn(4, 7, 6)
    for sub_token in code.reshape(-1, 3):
        nearest = (quantizer.codebook - sub_token).norm(dim=1).argmin()
        use[nearest] += 0.1 / 56
        sums[nearest] += 0.1 * sub_token / 56
    train_codebook(quantizer, code, 1)
    torch.testing.assert_close(quantizer.use, use)
    torch.testing.assert_close(quantizer.members, sums)
    torch.testing.assert_close(quantizer.codebook, sums / use[:, None])


def test_an_entry_out_of_use_restarts_beside_the_most_used_one():
    """Away from it by as much as sub-tokens are from their entries, and with half of its members."""
    torch.manual_seed(0)
    wide = 512
    quantizer = vq(wide, 3, 1, decay=0.5)
    quantizer.codebook.copy_(torch.stack((torch.zeros(wide), torch.ones(wide), torch.full((wide,), 100.0))))
    quantizer.use.copy_(torch.tensor([0.6, 0.4, 1e-6]))
    quantizer.members.copy_(quantizer.codebook * quantizer.use[:, None])
    quantizer.steps += 1
    code = torch.cat((torch.zeros(60, wide), torch.ones(40, wide))) + 0.1 * torch.randn(100, wide)
    train_codebook(quantizer, code[None], 1)
    torch.testing.assert_close(quantizer.use, torch.tensor([0.3, 0.4, 0.3]))
    torch.testing.assert_close(quantizer.members, quantizer.codebook * quantizer.use[:, None])
    offset = (quantizer.codebook[2] - quantizer.codebook[0]).square().mean().sqrt()
    assert offset == pytest.approx(0.1, rel=0.1)


def test_where_most_entries_are_out_of_use_as_many_restart_as_there_are_others():
    torch.manual_seed(0)
    quantizer = vq(2, 4, 1, decay=0.5)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0], [100, 0], [0, 100], [100, 100]]))
    quantizer.use.copy_(torch.tensor([1.0, 1e-6, 1e-6, 1e-6]))
    quantizer.members.copy_(quantizer.codebook * quantizer.use[:, None])
    quantizer.steps += 1
    code = 0.1 * torch.randn(1, 50, 2)
    train_codebook(quantizer, code, 1)
    torch.testing.assert_close(quantizer.use, torch.tensor([0.5, 0.5, 5e-7, 5e-7]), rtol=1e-5, atol=0)
    train_codebook(quantizer, code, 1)
    assert (quantizer.use > 0.1).all(), "the rest follow in the next step"


def test_an_entry_in_a_little_use_stays():
    """A fiftieth of an even share is out of use, a tenth is not."""
    torch.manual_seed(0)
    quantizer = vq(2, 4, 1, decay=1.0)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0], [100, 0], [0, 100], [100, 100]]))
    quantizer.use.copy_(torch.tensor([0.5, 0.5, 0.1 / 4, 0.02 / 4]))
    quantizer.members.copy_(quantizer.codebook * quantizer.use[:, None])
    quantizer.steps += 1
    train_codebook(quantizer, 0.1 * torch.randn(1, 50, 2), 1)
    assert torch.equal(quantizer.codebook[2], torch.tensor([0.0, 100]))
    assert not torch.equal(quantizer.codebook[3], torch.tensor([100.0, 100]))


def test_a_codebook_passes_gradients_straight_through_and_tells_its_entropy():
    torch.manual_seed(0)
    quantizer, code = vq(8, 16, 2), torch.randn(6, 5, 8, requires_grad=True)
    made = quantizer(code)
    made.code.sum().backward()
    torch.testing.assert_close(code.grad, torch.ones_like(code))
    shares = made.ids.flatten().bincount(minlength=16) / made.ids.numel()
    torch.testing.assert_close(made.statistics["codebook_entropy"], torch.special.entr(shares).sum())


def test_nearest_entries_are_found_in_float32_under_autocast():
    """In bfloat16 1000 and 1001 are the same number."""
    quantizer = vq(1, 2, 1)
    quantizer.codebook.copy_(torch.tensor([[1000.0], [1001.0]]))
    code = torch.tensor([[[1000.0], [1001.0], [1000.4], [1000.6]]])
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer.quantize(code)[1].flatten().tolist() == [0, 1, 0, 1]


def test_codebooks_that_do_not_fit(tiny_config):
    vq = tiny_config.override("model.quantization_type=vq")
    for setting, sentence in (
        ("model.vq_sub_tokens=3", r"Write model\.context_dim=6"),
        ("model.vq_entries=1", "between 2 and 65536"),
        ("model.entropy_statistics=process", "Write model.entropy_statistics=batch"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            vq.override(setting)


def test_an_unknown_bottleneck_is_told_the_known_ones():
    with pytest.raises(ConfigError, match="'lqf' must be lfq or fsq or bsq or vq or kl or layernorm or noop"):
        Config().override("model.quantization_type=lqf")


def test_a_codebook_is_in_files(tiny_config, images, tmp_path):
    tokenizer = FlowMo(tiny_config.override("model.quantization_type=vq", "model.vq_entries=16")).eval()
    tokenizer.quantizer(tokenizer.encoder(images))
    tokenizer.quantizer.learn()
    save(tokenizer, tmp_path / "vq.safetensors")
    again = load(tmp_path / "vq.safetensors")
    assert torch.equal(again.quantizer.codebook, tokenizer.quantizer.codebook)
    assert torch.equal(again.encode(images).ids, tokenizer.encode(images).ids)


def test_what_training_with_a_codebook_costs(tiny_config):
    """Counted on tensors without contents, which nothing that a pass does may depend on."""
    without = tiny_config.override("model.quantization_type=noop", "opt.lpips_weight=0")
    vq = without.override("model.quantization_type=vq", "model.vq_entries=16")
    search = 2 * 16 * 4 * 6 * vq.model.vq_sub_tokens  # every entry with every sub-token
    assert training_flops(vq) == training_flops(without) + search
