"""Numbers at their ends: precisions, NaN, black and white, guidance, steps and batches; and what is bit-exact."""

import hashlib

import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import run_program

import flowmo
from flowmo import CheckpointError
from flowmo.evaluate.metrics.pairs import psnr
from flowmo.images import to_bytes
from flowmo.model.sampler import SOLVERS, NotFiniteError, seeded_noise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_of_any_precision_are_read_as_float32(tiny, images, dtype):
    given = images.to(dtype)
    assert torch.equal(tiny.encode(given).ids, tiny.encode(given.float()).ids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_little(tiny, images, dtype):
    """Ids may change where a channel is near zero; the picture of the same ids hardly does."""
    exact = tiny.encode(images).ids
    expected = tiny.decode(exact, steps=8)
    with torch.autocast("cpu", dtype):
        ids, decoded = tiny.encode(images).ids, tiny.decode(exact, steps=8)
    bits = (ids[..., None] >> torch.arange(4)) ^ (exact[..., None] >> torch.arange(4))
    assert (bits & 1).float().mean() < 0.05
    assert decoded.dtype == torch.float32
    assert psnr(expected, decoded).min() > 35


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_number_that_is_none_in_pictures_or_weights(tiny, images, tmp_path, dtype, value):
    images[2, 1, 5, 7] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        tiny.encode(images.to(dtype))
    tiny.decoder.picture_out.bias[3] = value
    flowmo.save(tiny, tmp_path / "a.safetensors", dtype)
    with pytest.raises(CheckpointError, match=r"decoder.picture_out.bias holds NaN or infinite values \(1 such\)"):
        flowmo.load(tmp_path / "a.safetensors")


def test_weights_that_float16_cannot_hold_are_refused(tiny, tmp_path):
    tiny.decoder.picture_out.bias[3] = 1e6
    with pytest.raises(CheckpointError, match="Save the weights as float32"):
        flowmo.save(tiny, tmp_path / "a.safetensors", torch.float16)
    tiny.decoder.picture_out.bias[3] = torch.inf
    flowmo.save(tiny, tmp_path / "a.safetensors", torch.float16)
    with pytest.raises(CheckpointError, match="infinite"):
        flowmo.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("colour", ["black", "white", (0, 255, 0)])
@pytest.mark.parametrize("size", [(32, 32), (1, 1), (200, 3)])
def test_pictures_of_one_colour(tiny, colour, size):
    codes = tiny.encode_image(Image.new("RGB", size, colour))
    decoded = tiny.decode_image(codes, steps=3)
    assert decoded.size == size
    assert torch.equal(tiny.encode_image(Image.new("RGB", size, colour)).ids, codes.ids)


@pytest.mark.parametrize("guidance", [-100.0, -1.0, 0.0, 1.0, 10.0, 1e4])
def test_guidance_far_from_one_gives_pictures(tiny, images, guidance):
    decoded = tiny.decode(tiny.encode(images[:1]), steps=4, guidance=guidance)
    assert torch.isfinite(decoded).all()
    assert decoded.abs().max() <= 1


def test_guidance_beyond_all_numbers_is_told(tiny, images):
    codes = tiny.encode(images[:1])
    with pytest.raises(NotFiniteError, match="not finite with guidance 1e"):
        tiny.decode(codes, steps=4, guidance=1e38)
    with pytest.raises(NotFiniteError, match="not finite with this noise"):
        tiny.decode(codes, steps=1, guidance=1.0, noise_scale=1e38)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Write a finite number"):
            tiny.decode(codes, steps=4, guidance=bad)


@pytest.mark.parametrize("damage", [float("inf"), float("nan")])
def test_a_sample_of_damaged_weights_is_told(tiny_config, images, damage):
    damaged = flowmo.FlowMo(tiny_config)
    with torch.no_grad():
        damaged.decoder.picture_out.bias[0] = damage
    with pytest.raises(NotFiniteError, match="weights may be damaged"):
        damaged.decode(damaged.encode(images[:1]).ids, steps=1, guidance=1.0)


def test_other_defaults_of_pytorch_change_no_noise():
    expected = seeded_noise([3], 8, 8)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(seeded_noise([3], 8, 8), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_to_a_thousand_steps(tiny, images):
    """More steps come nearer to the flow's end: the distance to that of 1000 falls."""
    ids = tiny.encode(images[:1]).ids
    drawn = {steps: tiny.decode(ids, steps=steps, guidance=1.0, rho=1.0) for steps in (1, 10, 100, 1000)}
    far = [(drawn[steps] - drawn[1000]).square().mean() for steps in (1, 10, 100)]
    assert all(torch.isfinite(picture).all() for picture in drawn.values())
    assert far[0] > far[1] > far[2] > 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_many_steps_of_every_solver(tiny, images, solver):
    decoded = tiny.decode(tiny.encode(images[:1]), steps=40, solver=solver)
    assert torch.isfinite(decoded).all()


@pytest.mark.parametrize("count", [1, 100])
def test_batches_of_one_and_of_hundreds(tiny, count):
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = tiny.encode(images).ids
    drawn = tiny.decode(ids, steps=1, seed=range(count))
    for i in {0, count // 2, count - 1}:
        assert torch.equal(tiny.encode(images[i : i + 1]).ids[0], ids[i])
        assert torch.equal(tiny.decode(ids[i : i + 1], steps=1, seed=i)[0], drawn[i])


def test_no_pictures_at_all(tiny, images):
    with pytest.raises(ValueError, match="give at least one"):
        tiny.encode(images[:0])


# What is bit-exact: the table of docs/reliability.md

DIGEST = """
import hashlib, torch, flowmo
from PIL import Image
torch.set_num_threads({threads})
tok = flowmo.load({model!r})
codes = tok.encode_image(Image.open({picture!r}))
picture = tok.decode_image(codes, steps=2, seed=3)
print(hashlib.sha256(codes.ids.numpy().tobytes() + picture.tobytes()).hexdigest())
"""


def test_another_process_gives_the_same_bits(tiny_model, tmp_path):
    """Of ids and of samples, from a file of weights."""
    photo = ROOT / "examples" / "pictures" / "cat.jpg"
    small = tmp_path / "small.png"
    Image.open(photo).resize((60, 40)).save(small)
    tokenizer, threads = flowmo.load(tiny_model), torch.get_num_threads()
    codes = tokenizer.encode_image(Image.open(small))
    content = codes.ids.numpy().tobytes() + tokenizer.decode_image(codes, steps=2, seed=3).tobytes()
    done = run_program(DIGEST.format(model=str(tiny_model), picture=str(small), threads=threads))
    assert done.stdout.decode().strip() == hashlib.sha256(content).hexdigest(), done.stderr


def test_the_number_of_threads_changes_rounding_at_most(tiny, images):
    threads, found = torch.get_num_threads(), {}
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            ids = tiny.encode(images).ids
            found[count] = (ids, tiny.decode(found[1][0] if found else ids, steps=4))
    finally:
        torch.set_num_threads(threads)
    for ids, pictures in found.values():
        assert (ids != found[1][0]).float().mean() < 0.02
        torch.testing.assert_close(pictures, found[1][1], rtol=0, atol=1e-4)
        assert (to_bytes(pictures).int() - to_bytes(found[1][1]).int()).abs().max() <= 1
