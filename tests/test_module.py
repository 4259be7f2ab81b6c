"""The tokenizer as any PyTorch module: trained by a plain loop, copied, pickled, converted, compiled; and its ids."""

import copy
import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch
from conftest import TINY
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import flowmo
from flowmo import Codes, Config, FlowMo
from flowmo.losses.noise import TrainingNoise


@pytest.fixture
def pictures(tiny, native, request):
    """A tokenizer and two noise images of its size."""
    tokenizer = {"tiny": tiny, "native": native}[request.param]
    side = tokenizer.config.data.image_size
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return tokenizer.requires_grad_(True), images


both = pytest.mark.parametrize("pictures", ["tiny", "native"], indirect=True)


@both
def test_the_training_pass_is_stage_1a(pictures):
    tokenizer, x = pictures
    out = tokenizer(x, seed=5)
    noise = TrainingNoise.of(tokenizer.config, x, range(2), 5)
    t = noise.t[:, None, None, None]
    x_t = (1 - t) * x + t * noise.noise
    quantized = tokenizer.quantizer(tokenizer.encoder(x))
    code = (
        quantized.code
        if noise.num_sub_tokens is None
        else tokenizer.quantizer.keep_prefix(quantized.code, noise.num_sub_tokens[:, None, None])
    )
    decoder = tokenizer.decoder
    velocity = decoder(x_t, decoder.embed_code(code, noise.cfg_keep), noise.t)
    expected = (velocity - (noise.noise - x)).square().mean() + sum(quantized.losses.values())
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.images, x_t - t * velocity)
    assert torch.equal(out.ids, tokenizer.encode(x).ids)
    assert float(out.parts["loss"]) == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(tokenizer(x, seed=5).loss, out.loss)
    torch.manual_seed(0)
    drawn = [float(tokenizer(x).parts["loss"]) for _ in range(2)]
    assert drawn[0] != drawn[1], "each call draws its own noise"
    torch.manual_seed(0)
    assert float(tokenizer(x).parts["loss"]) == drawn[0]


def test_a_perceptual_distance_has_the_settings_weight(tiny, images):
    def distance(x, y):
        return (x - y).abs().mean(dim=(1, 2, 3))

    plain, out = tiny(images, seed=1), tiny(images, distance, seed=1)
    expected = plain.loss + tiny.config.opt.lpips_weight * distance(images, plain.images).mean()
    torch.testing.assert_close(out.loss, expected)


@both
def test_a_plain_loop_trains_what_load_returns(pictures, tmp_path):
    fresh, x = pictures
    flowmo.save(fresh, tmp_path / "model.safetensors")
    tokenizer = flowmo.load(tmp_path / "model.safetensors")
    assert not tokenizer.training
    tokenizer.train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        out = tokenizer(x, seed=0)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.parts["flow"]))
    reached = {name.split(".")[0] for name, p in tokenizer.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"encoder", "decoder"}
    assert losses[-1] < 0.9 * losses[0]


def test_gradients_reach_images_only_when_asked(tiny, images):
    x = images[:2].clone().requires_grad_()
    tiny.requires_grad_(True)
    assert tiny.encode(x).code is None
    codes = tiny.encode(x, differentiable=True)
    assert torch.equal(codes.ids, tiny.encode(x).ids)
    decoded = tiny.decode(codes, steps=2, differentiable=True)
    assert torch.equal(decoded.detach(), tiny.decode(codes.ids, steps=2))
    decoded.square().mean().backward()
    assert x.grad.any()
    assert all(p.grad is not None for p in tiny.encoder.parameters())
    assert not tiny.decode(codes, steps=2).requires_grad
    with torch.no_grad():
        assert not tiny.encode(x, differentiable=True).code.requires_grad


def test_the_gradient_of_a_sample_is_its_slope(tiny, images):
    codes = tiny.encode(images[:1], differentiable=True)
    code = codes.code.detach().requires_grad_()
    direction = torch.randn(code.shape, generator=torch.Generator().manual_seed(4))

    def mean(code):
        moved = Codes(codes.ids, codes.size, codes.id_count, code=code)
        return tiny.decode(moved, steps=2, guidance=1.0, noise_scale=0.1, differentiable=True).double().mean()

    (slope,) = torch.autograd.grad(mean(code), code)
    step = 1e-2
    measured = (mean(code + step * direction) - mean(code - step * direction)) / (2 * step)
    assert float((slope * direction).sum()) == pytest.approx(float(measured.detach()), rel=2e-2)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pictures, dtype):
    tokenizer, x = pictures
    ids, decoded = tokenizer.encode(x).ids, tokenizer.decode(tokenizer.encode(x), steps=2)
    half = copy.deepcopy(tokenizer).to(dtype)
    assert half.precision == str(dtype).removeprefix("torch.")
    assert (half.encode(x).ids == ids).float().mean() > 0.5
    assert (half.decode(ids, steps=2) - decoded).abs().mean() < 0.02
    half(x.to(dtype), seed=0).loss.backward()
    assert all(p.grad.dtype == dtype for p in half.decoder.parameters() if p.grad is not None)


def test_double_precision_is_refused(tiny, images):
    tiny.double()
    for call in (lambda: tiny.encode(images), lambda: tiny(images), lambda: tiny.decode(torch.zeros(1, 6, 2).long())):
        with pytest.raises(TypeError, match=r"weights are float64\. Call \.float"):
            call()


def test_a_decoder_trained_in_python_keeps_the_identity(tiny, images, tmp_path):
    """As the guide says."""
    with torch.no_grad():
        tiny.encoder.code_embedding[0] = -0.0  # an EMA makes it 0.0
    first = tiny.identity()
    tiny.config = tiny.config.override(f"model.base={tiny.as_base()}")
    tiny.decoder.requires_grad_(True)
    average = AveragedModel(tiny, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(tiny)  # copies
    tiny(images).loss.backward()
    torch.optim.SGD(tiny.decoder.parameters(), 0.1).step()
    average.update_parameters(tiny)
    for i, trained in enumerate((tiny, average.module)):
        flowmo.save(trained, tmp_path / f"{i}.safetensors")
        mine = flowmo.load(tmp_path / f"{i}.safetensors")
        assert mine.identity() == first != mine.weights_identity()


@both
def test_copies_decode_alike(pictures):
    tokenizer, x = pictures
    expected = tokenizer.decode(tokenizer.encode(x), steps=1)
    content = io.BytesIO()
    torch.save(tokenizer.state_dict(), content)
    content.seek(0)
    fresh = FlowMo(tokenizer.config).eval()
    fresh.load_state_dict(torch.load(content, weights_only=True))
    for other in (fresh, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert torch.equal(other.decode(other.encode(x), steps=1), expected)
        assert other.identity() == tokenizer.identity()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_torch_compile_takes_the_training_pass(tiny, images):
    compiled = torch.compile(tiny.requires_grad_(True), backend="eager")
    out = compiled(images, seed=2)
    torch.testing.assert_close(out.loss, tiny(images, seed=2).loss)
    out.loss.backward()
    assert torch.equal(compiled.encode(images).ids, tiny.encode(images).ids)


# Codes


def test_codes_are_values(tiny, images):
    codes = tiny.encode(images)
    rows = list(codes)
    assert [len(row) for row in rows] == [1] * 5
    assert Codes.cat(rows) == codes
    assert codes.to("cpu") == codes
    assert codes != Codes.cat(rows[::-1])
    assert codes != codes[:4]
    assert codes != tiny.encode(images, differentiable=True)
    assert codes != "codes"
    assert codes.to("meta").ids.device.type == "meta"
    assert repr(codes) == "Codes(5 images of 32 × 32 pixels, 6 tokens × 2 ids below 16 each, cpu)"
    whole = tiny.encode_image(flowmo.images.to_pil(torch.zeros(3, 40, 50)))
    assert repr(whole).startswith("Codes(1 image of 40 × 50 pixels in 4 tiles, 6 tokens")
    with pytest.raises(ValueError, match="not tiles of an image"):
        Codes.cat([whole, whole])
    with pytest.raises(ValueError, match="one size"):
        Codes.cat([codes, tiny.encode(images[:, :, :16])])
    with pytest.raises(ValueError, match="one or more"):
        Codes.cat([])


def test_continuous_codes(images):
    kl = FlowMo(Config.from_dict({**TINY, "model": {**TINY["model"], "quantization_type": "kl"}})).eval()
    codes = kl.encode(images)
    assert Codes.cat(list(codes)) == codes
    assert repr(codes) == "Codes(5 images of 32 × 32 pixels, 6 tokens × 8 channels each, cpu)"
    assert kl.vocab_size is None
    for call in (lambda: kl.embed(torch.zeros(1, 6, 2, dtype=torch.int64)), codes.to_sequence):
        with pytest.raises(TypeError, match="ontinuous"):
            call()


@pytest.mark.parametrize("kind", ["lfq", "fsq", "bsq", "vq"])
def test_embedded_ids_are_the_encoders_code(kind, images):
    """``embed`` returns the code that the bottleneck made of the encoder's output."""
    settings = {**TINY["model"], "quantization_type": kind, "vq_entries": 16}
    tokenizer = FlowMo(Config.from_dict({**TINY, "model": settings})).eval()
    code, ids = tokenizer.quantizer.quantize(tokenizer.encoder(images))
    assert ids.max() < tokenizer.vocab_size
    torch.testing.assert_close(tokenizer.embed(ids), code)
    assert tokenizer.embed(ids).shape == (5, 6, 8)
    torch.testing.assert_close(tokenizer.embed(ids[:, 2:3]), code[:, 2:3])


def test_an_embedded_prefix_has_zeros_for_what_was_not_sent(native):
    ids = torch.randint(native.vocab_size, (2, 16, 4), generator=torch.Generator().manual_seed(0))
    whole, prefix = native.embed(ids), native.embed(ids[:, :, :3])
    assert torch.equal(prefix[..., :9], whole[..., :9])
    assert not prefix[..., 9:].any()


def test_sequences_for_language_models(tiny, native, images):
    codes = tiny.encode(images)
    flat = codes.to_sequence()
    assert flat.shape == (5, 12)
    assert flat[0, :4].tolist() == codes.ids[0, :2].flatten().tolist(), "token after token"
    distinct = codes.to_sequence(offset=100, distinct=True)
    assert distinct[:, 0::2].max() < 116 <= distinct[:, 1::2].min()
    assert tiny.from_sequence(flat) == codes
    assert tiny.from_sequence(distinct, offset=100, distinct=True) == codes
    coarse = native.encode(torch.zeros(1, 3, 32, 48), bits_per_pixel=0.08)
    assert native.from_sequence(coarse.to_sequence(), size=(32, 48)) == coarse
    odd = native.encode_image(flowmo.images.to_pil(torch.zeros(3, 30, 40)))
    restored = native.from_sequence(odd.to_sequence(), size=(30, 40))
    assert restored == odd
    assert native.decode_image(restored).size == (40, 30)
    assert Codes.cat([coarse, native.from_sequence(coarse.to_sequence(), size=(32, 48))]).output_size == (32, 48)
    for wrong, message in ((flat[0], "shape"), (flat[:, :-1], "shape"), (flat + 16, "run from")):
        with pytest.raises(ValueError, match=message):
            tiny.from_sequence(wrong)
    with pytest.raises(TypeError, match="integer"):
        tiny.from_sequence(flat.float())
    assert tiny.from_sequence(flat.tolist()) == codes
    small = (flat + 200).to(torch.uint8)
    assert tiny.from_sequence(small, offset=200) == codes, "a small type does not wrap around"
    assert torch.equal(tiny.embed(codes.ids.to(torch.uint16)), tiny.embed(codes.ids)), "as NumPy saves them"
    with pytest.raises(ValueError, match="run from -1"):
        tiny.embed(torch.full((1, 6, 2), 2**64 - 1, dtype=torch.uint64))
    with pytest.raises(ValueError, match=r"shape \(5, 0\)"):
        tiny.from_sequence(flat[:, :0])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda t: t(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)), TypeError),
        (lambda t: t(torch.full((2, 3, 32, 32), 2.0)), ValueError),
        (lambda t: t(torch.zeros(3, 32, 32)), ValueError),
        (lambda t: t.embed(torch.zeros(2, 6, 2)), TypeError),
        (lambda t: t.embed(torch.zeros(6, 2, dtype=torch.int64)), ValueError),
        (lambda t: t.embed(torch.zeros(1, 6, 3, dtype=torch.int64)), ValueError),
        (lambda t: t.embed(torch.full((1, 6, 2), 16)), ValueError),
        (lambda t: t.embed(None), TypeError),
    ],
)
def test_bad_input(tiny, call, error):
    with pytest.raises(error):
        call(tiny)


def test_rows_and_joins_of_codes(tiny, images):
    codes = tiny.encode(images)
    for row in (2, np.int64(2), torch.tensor(2)):
        assert codes[row] == codes[[2]]
    for wrong in ((slice(None), 3), 1.5):
        with pytest.raises(TypeError, match="integer"):
            codes[wrong]
    assert Codes.cat(iter(codes)) == codes
    with pytest.raises(ValueError, match="one size"):
        Codes.cat([codes, codes.coarser(1)])
    with pytest.raises(ValueError, match="at least 0"):
        codes.to_sequence(offset=-1)
    with pytest.raises(TypeError):
        codes.to_sequence(offset=0.5)
    own = tiny.encode(images, differentiable=True)
    with pytest.raises(ValueError, match="encoder of its own"):
        tiny.decode(dataclasses.replace(own, code=own.code[..., :-1]))


def test_seeds_of_every_kind_and_codes_that_decode_refuses(tiny, native, images):
    codes = tiny.encode(images[:2])
    expected = tiny.decode(codes, steps=2, seed=[3, 4])
    for seeds in ((3, 4), np.array([3, 4]), torch.tensor([3, 4])):
        assert torch.equal(tiny.decode(codes, steps=2, seed=seeds), expected)
    for seed in (3, np.int64(3), torch.tensor(3)):
        assert torch.equal(tiny.decode(codes, steps=2, seed=seed)[0], expected[0])
    with pytest.raises(TypeError):
        tiny.decode(codes, steps=2, seed="34")
    with pytest.raises(TypeError, match="differentiable"):
        native.encode(torch.zeros(1, 3, 64, 64), differentiable=True).coarser(1)
    for tokenizer in (tiny, native):
        with pytest.raises(TypeError, match="Use decode for ids"):
            tokenizer.decode_image(codes.ids)
    with pytest.raises(ValueError, match=r"2 codes for one image, which has 1; decode takes batches\."):
        tiny.decode_image(codes)
    with pytest.raises(ValueError, match=r"33×48 pixels do not divide into patches of 8×8\."):
        tiny.decode(codes.ids, size=(33, 48))
    with pytest.raises(ValueError, match=r"encode_image takes any size\."):
        tiny.encode(images[:, :, :31])
