import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from flowmo import Codes, FlowMo
from flowmo.evaluate.metrics.pairs import psnr
from flowmo.images import ImageError, resize_and_crop, to_pil, to_tensor
from flowmo.model.sampler import seeded_noise
from flowmo.model.tiling import Tiling


def test_ids_decode_to_the_same_bits_as_codes(tiny, images):
    codes = tiny.encode(images)
    assert codes.ids.shape == (5, 6, 2)
    assert codes.ids.dtype == torch.int64
    from_codes, from_ids = tiny.decode(codes, steps=3), tiny.decode(codes.ids, steps=3)
    assert torch.equal(from_codes, from_ids)
    assert from_ids.shape == images.shape
    assert from_ids.abs().max() <= 1


def test_ids_are_what_the_encoder_says(tiny, images):
    expected = tiny.quantizer.quantize(tiny.encoder(images[:1]))[1]
    assert torch.equal(tiny.encode(images[:1]).ids, expected)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_batch_size_changes_neither_ids_nor_samples(tiny, images, chunk_size):
    tiny.chunk_size = chunk_size
    together = tiny.encode(images)
    samples = tiny.decode(together, steps=4, seed=7)
    for i in range(5):
        alone = tiny.encode(images[i : i + 1])
        assert torch.equal(alone.ids, together.ids[i : i + 1])
        assert torch.equal(tiny.decode(alone, steps=4, seed=7), samples[i : i + 1])
    order = [3, 0, 4]
    assert torch.equal(tiny.encode(images[order]).ids, together.ids[order])
    assert torch.equal(tiny.decode(together[order], steps=4, seed=7), samples[order])


@pytest.mark.parametrize(("side", "batch"), [(64, 4), (128, 1)])
def test_a_lone_large_image_is_computed_once(native, monkeypatch, side, batch):
    """A device whose batches have four images of 64 × 64 pixels takes a larger one alone."""
    monkeypatch.setattr(type(native), "default_chunk_sizes", (4, 4))
    sizes = []
    for network in (native.encoder, native.decoder):
        network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    native.decode(native.encode(torch.rand(1, 3, side, side) * 2 - 1), steps=1)
    assert sizes == [batch, batch]


def test_a_picture_is_a_function_of_its_ids_and_seed(tiny, images):
    codes = tiny.encode(images[:2])
    same = codes[[0, 0, 1]]
    samples = tiny.decode(same, steps=3, seed=[1, 2, 1])
    assert not torch.equal(samples[0], samples[1]), "another seed, another sample"
    assert torch.equal(samples[0], tiny.decode(codes[[0]], steps=3, seed=1)[0])
    assert torch.equal(samples[2], tiny.decode(codes[[1]], steps=3, seed=1)[0])


def test_samples_follow_the_settings(tiny, images):
    codes = tiny.encode(images[:1])
    default = tiny.decode(codes)
    assert torch.equal(default, tiny.decode(codes, steps=25, guidance=1.5, rho=4.0))
    for other in ({"steps": 24}, {"guidance": 1.0}, {"rho": 1.0}, {"seed": 1}):
        assert not torch.equal(default, tiny.decode(codes, **other))


def test_rectangular_pictures(tiny):
    images = torch.rand(2, 3, 16, 48) * 2 - 1
    codes = tiny.encode(images)
    assert codes.size == (16, 48)
    out = tiny.decode(codes, steps=2)
    assert out.shape == images.shape
    assert torch.equal(out, tiny.decode(codes.ids, steps=2, size=(16, 48)))


def test_progress_counts_images(tiny, native, images):
    def counted(run):
        seen = []
        run(progress=lambda done, total: seen.append((done, total)))
        return seen

    tiny.chunk_size = 2
    assert counted(partial(tiny.encode, images)) == [(2, 5), (4, 5), (5, 5)]
    assert counted(partial(tiny.decode, tiny.encode(images), steps=1)) == [(2, 5), (4, 5), (5, 5)]
    large = torch.zeros(3, 16 * 70, 32)  # three rows of blocks
    assert counted(partial(native.encode_image, large)) == [(1, 3), (2, 3), (3, 3)]


def test_codes_know_their_rate(tiny, images):
    codes = tiny.encode(images)
    assert codes.bits == 5 * 6 * 8
    assert codes.nbytes == 30
    assert codes.bits_per_pixel == 48 / 1024
    assert len(codes) == 5
    assert len(codes[1:3]) == 2
    assert len(codes[2]) == 1


@pytest.mark.parametrize("kind", ["kl", "layernorm", "noop"])
def test_continuous_bottlenecks(tiny_config, images, kind):
    tokenizer = FlowMo(tiny_config.override(f"model.quantization_type={kind}"))
    codes = tokenizer.encode(images)
    assert codes.ids is None
    assert codes.code.shape == (5, 6, 8)
    assert tokenizer.decode(codes, steps=2).shape == images.shape
    with pytest.raises(TypeError, match="no ids"):
        tokenizer.decode(torch.zeros(5, 6, 2, dtype=torch.long))


BAD_IMAGES = {
    "integers": (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "uint8"),
    "a list": ([1.0], TypeError, "list"),
    "no batch": (torch.zeros(3, 32, 32), ValueError, "shape"),
    "one channel": (torch.zeros(1, 1, 32, 32), ValueError, "shape"),
    "empty": (torch.zeros(0, 3, 32, 32), ValueError, "at least one"),
    "odd size": (torch.zeros(1, 3, 30, 32), ValueError, "patches of 8"),
    "no pixels": (torch.zeros(1, 3, 0, 32), ValueError, "patches of 8"),
    "nan": (torch.full((1, 3, 32, 32), torch.nan), ValueError, "NaN"),
    "infinite": (torch.full((1, 3, 32, 32), torch.inf), ValueError, "infinite"),
    "0 to 255": (torch.full((1, 3, 32, 32), 255.0), ValueError, r"scale them to \[−1, 1\]"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(tiny, name):
    value, error, sentence = BAD_IMAGES[name]
    with pytest.raises(error, match=sentence):
        tiny.encode(value)


def test_one_nan_among_many(tiny, images):
    images[3, 1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        tiny.encode(images)


def test_bad_ids_and_seeds(tiny):
    good = torch.zeros(2, 6, 2, dtype=torch.long)
    for bad, sentence in (
        (good + 16, "from 0 to 15"),
        (good - 1, "from 0 to 15"),
        (good[:, :5], r"needs \(batch, 6, 2\)"),
        (good[0], r"needs \(batch, 6, 2\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tiny.decode(bad, steps=1)
    with pytest.raises(TypeError, match="integer"):
        tiny.decode(good.float(), steps=1)
    with pytest.raises(ValueError, match="3 seeds for 2"):
        tiny.decode(good, steps=1, seed=[1, 2, 3])
    with pytest.raises(ValueError, match="sample_steps=0 must be"):
        tiny.decode(good, steps=0)
    with pytest.raises(ValueError, match="patches"):
        tiny.decode(good, steps=1, size=(30, 32))


# Single pictures


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (5, 90), (33, 32), (100, 70), (31, 200)])
def test_any_size_is_kept_whole(tiny, size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    codes = tiny.encode_image(picture)
    assert tiny.decode_image(codes, steps=1).size == size
    assert codes.bits_per_pixel == pytest.approx(len(codes) * 48 / (size[0] * size[1]))


def test_crop_follows_the_papers_protocol(tiny, picture):
    codes = tiny.encode_image(picture, fit="crop")
    assert len(codes) == 1
    cropped = to_tensor(resize_and_crop(picture, 32))
    assert torch.equal(codes.ids, tiny.encode(cropped[None]).ids)
    assert tiny.decode_image(codes, steps=1).size == (32, 32)


def test_tiles_are_cut_from_one_canvas_of_noise(tiny, monkeypatch):
    """Where tiles overlap they start from the same noise, so a decoder that returns it gives the canvas."""
    codes = tiny.encode_image(Image.new("RGB", (80, 50)))
    monkeypatch.setattr(tiny, "sample", lambda noise, *_, **__: noise)
    torch.testing.assert_close(tiny.decode_tensor(codes, seed=3), seeded_noise([3], 50, 80)[0])


def test_tiles_are_blended_by_linear_ramps():
    """Two tiles of 32 pixels, 0 and 1, that overlap by 16. A ramp has an eighth of a tile."""
    tiling = Tiling(32, 48, 32)
    merged = tiling.merge(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 32, 32))
    left = [min(32 - x, 4) for x in range(16, 32)]
    right = [min(x - 16 + 1, 4) for x in range(16, 32)]
    expected = [0.0] * 16 + [b / (a + b) for a, b in zip(left, right, strict=True)] + [1.0] * 16
    torch.testing.assert_close(merged, torch.tensor(expected).expand(1, 32, 48))


def test_batches_of_the_network_have_one_size(tiny):
    tiny.chunk_size = 4
    assert list(tiny.chunks(6)) == [[0, 1, 2, 3], [4, 5, 5, 5]]


def test_one_tile_equals_decode(tiny, picture):
    codes = tiny.encode_image(picture, fit="crop")
    assert tiny.decode_image(codes, steps=2, seed=3) == to_pil(tiny.decode(codes, steps=2, seed=3)[0])


def test_modes_of_pictures(tiny):
    base = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA", "I;16", "F"):
        source = base.convert("L") if mode in ("I;16", "F", "LA") else base
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(source).astype(np.uint16) * 257)
        else:
            picture = source.convert(mode)
        assert tiny.encode_image(picture).ids.shape == (1, 6, 2), mode


def test_sixteen_bits_scale_to_eight():
    from flowmo.images import to_rgb

    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(to_rgb(deep))[..., 0], grey)


def test_transparency_is_white():
    from flowmo.images import to_rgb

    assert to_rgb(Image.new("RGBA", (2, 2), (10, 20, 30, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_unknown_fit_and_huge_pictures(tiny, picture):
    with pytest.raises(ValueError, match="'whole' or 'crop'"):
        tiny.encode_image(picture, fit="stretch")
    with pytest.raises(ValueError, match="more than"):
        tiny.encode_image(Image.new("1", (20_000, 20_000)))


def test_a_thin_image_needs_no_gigabytes(tiny, native):
    """Its square tiles or cells would cover far more pixels than it has."""
    for tokenizer in (tiny, native):
        for size in ((300_000, 1), (1, 300_000)):
            with pytest.raises(ImageError, match="too thin"):
                tokenizer.encode_image(Image.new("1", size))
    assert tiny.encode_image(Image.new("RGB", (600, 2))).output_size == (2, 600)


def test_codes_of_the_wrong_number_of_tiles(tiny, picture):
    codes = tiny.encode_image(picture.resize((60, 40)))
    with pytest.raises(ValueError, match="1 codes for one image, which has 4"):
        tiny.decode_image(dataclasses.replace(codes, ids=codes.ids[:1]))
    with pytest.raises(ValueError, match="4 codes for one image"):
        tiny.decode_image(Codes(codes.ids, (32, 32), codes.id_count))


@pytest.mark.parametrize("size", [(32, 32), (7, 50), (100, 61), (129, 33)])
def test_tiling_covers_and_merges_back(size):
    tiling = Tiling(*size, tile=32)
    image = torch.randn(3, *size)
    tiles = tiling.split(image)
    assert tiles.shape == (len(tiling.corners), 3, 32, 32)
    torch.testing.assert_close(tiling.merge(tiles), image)
    for starts, length in ((tiling.starts(size[0]), size[0]), (tiling.starts(size[1]), size[1])):
        assert all(b - a <= 28 for a, b in itertools.pairwise(starts)), "neighbours overlap by an eighth"
        assert starts[-1] + 32 == max(length, 32)


def test_seams_are_blended():
    """Tiles of different brightness must join without a step larger than a ramp's."""
    tiling = Tiling(32, 60, tile=32)
    assert len(tiling.corners) == 2
    merged = tiling.merge(torch.stack((torch.zeros(1, 32, 32), torch.ones(1, 32, 32))))
    steps = merged[0].diff(dim=1)
    assert steps.min() >= 0
    assert steps.max() < 0.5


def test_psnr():
    x = torch.zeros(2, 3, 4, 4)
    y = x.clone()
    y[1] += 2 / 255 * 10
    values = psnr(x, y)
    assert values[0] == float("inf")
    assert values[1].item() == pytest.approx(20 * np.log10(255 / 10), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"seed": 1.5}, TypeError, "integer"),
        ({"seed": -1}, ValueError, "seed -1"),
        ({"seed": [0, 2**63]}, ValueError, "seed 9223372036854775808"),
        ({"seed": [1]}, ValueError, "1 seeds for 2"),
        ({"guidance": float("nan")}, ValueError, "guidance=nan"),
        ({"steps": 0}, ValueError, "sample_steps=0 must be"),
        ({"solver": "rk45"}, ValueError, "must be euler or midpoint"),
        ({"steps": 2, "rho": float("inf")}, ValueError, "rho"),
    ],
)
def test_sampling_arguments_that_make_no_sense(tiny, images, arguments, error, sentence):
    ids = tiny.encode(images[:2]).ids
    with pytest.raises(error, match=sentence):
        tiny.decode(ids, **arguments)


def test_what_is_not_a_picture_is_refused(tiny, images):
    with pytest.raises(TypeError, match="PIL image"):
        tiny.encode_image(images)


def test_the_scale_of_the_start_noise(tiny, images):
    codes = tiny.encode(images[:2])
    default = tiny.decode(codes, steps=2, seed=3)
    assert torch.equal(tiny.decode(codes, steps=2, seed=3, noise_scale=1.0), default)
    assert not torch.equal(tiny.decode(codes, steps=2, seed=3, noise_scale=0.8), default)
    still = tiny.decode(codes, steps=2, seed=3, noise_scale=0.0)
    assert torch.equal(tiny.decode(codes, steps=2, seed=4, noise_scale=0.0), still), "without noise no seed matters"
    for scale in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="finite and at least 0"):
            tiny.decode(codes, noise_scale=scale)


def test_one_image_of_another_size_decodes_as_in_a_batch(tiny):
    """Codes of ``encode`` are no tiles, whatever their size."""
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tiny.encode(x)
    assert torch.equal(tiny.decode_tensor(codes, seed=3), tiny.decode(codes, seed=[3])[0])
