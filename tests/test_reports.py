"""Reports of wrong results in other projects, each tried here against an independent computation."""

import io
import itertools
import struct
from contextlib import suppress

import numpy as np
import pytest
import torch
from conftest import PICTURES, TINY, fsq, lfq, vq
from PIL import Image, ImageCms, ImageFile
from scipy import stats
from scipy.spatial.distance import cdist
from torch import nn

from flowmo import Config, FlowMo
from flowmo.checkpoint import CheckpointError
from flowmo.data import Source
from flowmo.data.loader import ResumableSampler
from flowmo.data.token_files import Vocabulary, read_token_metadata
from flowmo.evaluate.codecs import QUALITIES, CodecReconstructor
from flowmo.evaluate.generation import extract_features
from flowmo.evaluate.measurement import EvaluationError
from flowmo.evaluate.metrics.features import Features, in_fixed_batches
from flowmo.evaluate.metrics.fid import Gaussian, frechet_distance
from flowmo.evaluate.metrics.pairs import psnr
from flowmo.evaluate.metrics.sets import kernel_distance, precision_and_recall
from flowmo.evaluate.reconstruction import Evaluators, Reconstruction, measure
from flowmo.evaluate.speed import sheet_tflops
from flowmo.evaluate.summary import Summary
from flowmo.generate.generator import GenerationError, Generator, build_generator
from flowmo.generate.samples import image_seeds
from flowmo.generate.tokenize import tokenize
from flowmo.images import ImageError, read_image, resize_and_crop, to_bytes, to_pil, to_tensor
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.perceptual import LPIPS
from flowmo.losses.stages import Stage
from flowmo.train.ema import EMA
from flowmo.train.generator import GeneratorNoise, GeneratorStage
from flowmo.train.schedule import BatchPlan, Position, Schedule


def photograph(size=(96, 64)):
    return Image.open(PICTURES / "cat.jpg").convert("RGB").resize(size)


def saved(image, format, **settings):
    stream = io.BytesIO()
    image.save(stream, format, **settings)
    return stream.getvalue()


def read(data):
    return np.asarray(read_image(io.BytesIO(data), "image"))


# Image files


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_files_are_refused_whatever_other_code_asks_of_pillow(progressive, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = saved(photograph(), "JPEG", quality=90, progressive=progressive)
    whole = read(data)
    half = data[: len(data) // 2]
    assert np.abs(np.asarray(Image.open(io.BytesIO(half)).convert("RGB")).astype(int) - whole).mean() > 10  # Pillow
    with pytest.raises(ImageError, match="truncated"):
        read(half)
    assert ImageFile.LOAD_TRUNCATED_IMAGES  # the other code's setting stays


def test_reads_at_the_same_time_restore_pillows_setting(monkeypatch):
    """The second read begins within the first and ends after it."""
    from flowmo.images import _whole_files_only

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    first, second = _whole_files_only(), _whole_files_only()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    second.__exit__(None, None, None)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(("alpha", "expected"), [((0, 0), (240, 120, 10)), ((0, 255), (255, 255, 255))])
def test_a_bmp_whose_alpha_is_zero_throughout_is_opaque(alpha, expected):
    """Two pixels of one colour; the first is transparent only where the second is not."""
    pixels = b"".join(bytes((10, 120, 240, a)) for a in alpha)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 2, 1, 1, 32, 3, len(pixels), 2835, 2835, 0, 0) + masks
    header = header.ljust(108, b"\0")
    offset = 14 + len(header)
    data = b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + header + pixels
    assert Image.open(io.BytesIO(data)).mode == "RGBA"
    assert read(data)[0].tolist() == [list(expected), [240, 120, 10]]


def test_a_tiff_palette_of_8_bit_values():
    colours = {0: (200, 50, 30), 1: (7, 180, 90)}
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([value for colour in colours.values() for value in colour])
    data = bytearray(saved(image, "TIFF"))
    table = Image.open(io.BytesIO(bytes(data))).tag_v2[320]
    assert max(table) > 255
    packed = struct.pack(f"<{len(table)}H", *table)
    assert bytes(data).count(packed) == 1
    eight_bit = bytes(data).replace(packed, struct.pack(f"<{len(table)}H", *(value >> 8 for value in table)))
    for content in (bytes(data), eight_bit):
        assert read(content)[0].tolist() == [list(colour) for colour in colours.values()]


def test_cmyk_is_not_inverted():
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:8], ink[8:] = (0, 200, 220, 10), (180, 20, 0, 90)
    expected = 255.0 * (1 - ink[..., :3] / 255) * (1 - ink[..., 3:] / 255)
    for format in ("JPEG", "TIFF"):
        found = read(saved(Image.fromarray(ink, "CMYK"), format, **({"quality": 100} if format == "JPEG" else {})))
        assert np.abs(found - expected).max() < 3


def test_lab_has_signed_colours():
    profiles = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
    to_lab = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.new("RGB", (4, 4), (200, 50, 30)), to_lab)
    assert np.abs(read(saved(lab, "TIFF"))[0, 0] - np.array((200, 50, 30))).max() <= 3


def test_colour_profiles_are_left_out():
    """As in all training pipelines that call Pillow's ``convert``: the stored numbers count, whatever the profile."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = photograph()
    assert np.array_equal(read(saved(image, "PNG", icc_profile=profile)), np.asarray(image))


def test_bytes_come_back():
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(np.asarray(to_pil(to_tensor(Image.fromarray(values)))), values)
    almost = torch.tensor([-1.2, -0.9999, 0.9999, 1.2])[None, :, None, None]
    assert to_bytes(almost).flatten().tolist() == [0, 0, 255, 255]


def test_the_lowest_quality_of_jpeg_is_zero():
    data = CodecReconstructor("jpeg", 0).encode(photograph(), 1)
    assert set(Image.open(io.BytesIO(data)).quantization[0]) == {255}


def test_bisection_is_next_to_the_highest_quality_that_fits():
    image = photograph()
    sizes = {q: len(saved(image, "WEBP", quality=q, method=6)) for q in QUALITIES}
    for budget in range(min(sizes.values()), sizes[80], 307):
        best = max(size for size in sizes.values() if size <= budget)
        assert best * 0.95 <= len(CodecReconstructor("webp", budget).encode(image, budget)) <= best


# Metrics


def exact_precision_and_recall(reference, generated, k=3):
    def covered(points, manifold):
        radii = np.sort(cdist(manifold, manifold), axis=1)[:, k]
        return (cdist(points, manifold) <= radii).any(axis=1).mean()

    return covered(generated, reference), covered(reference, generated)


@pytest.mark.parametrize(("codec", "name", "width"), [("webp", "WebP", 16400), ("avif", "AVIF", 70000)])
def test_an_image_that_a_codec_cannot_hold_is_an_error_that_names_it(codec, name, width):
    with pytest.raises(EvaluationError, match=rf"{name} cannot write {width}×8 pixels"):
        CodecReconstructor(codec, 100).encode(Image.new("RGB", (width, 8)), 100)


def test_a_gpu_of_a_similar_name_has_no_peak():
    names = {"NVIDIA H100 PCIe": 756, "NVIDIA H100 80GB HBM3": 989, "NVIDIA A100-SXM4-40GB": 312}
    names |= {"NVIDIA GH200 480GB": 989, "NVIDIA H100 NVL": 835}
    names |= {"NVIDIA RTX A1000 Laptop GPU": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA L40S": 362}
    assert {name: sheet_tflops(name) for name in names} == names


@pytest.mark.parametrize("kind", ["copies", "collapsed", "far from zero", "random"])
def test_precision_and_recall_equal_distances_without_matrix_products(kind):
    rng = np.random.default_rng(0)
    reference = rng.random((60, 512)).astype(np.float32)
    generated = rng.random((50, 512)).astype(np.float32)
    if kind == "copies":
        reference = reference[:12].repeat(5, axis=0)
        generated = reference[:40]
    if kind == "collapsed":
        generated = reference[:1].repeat(50, axis=0)
    if kind == "far from zero":
        reference, generated = reference * 1e-2 + 100, generated * 1e-2 + 100
    found = precision_and_recall(torch.from_numpy(reference), torch.from_numpy(generated))
    assert found == pytest.approx(exact_precision_and_recall(reference, generated))
    if kind == "collapsed":
        assert found[0] == 1
        assert found[1] < 0.1


@pytest.mark.parametrize("count", [5, 40])
def test_frechet_distance_of_few_images_has_no_imaginary_part(count):
    """The trace of (C₁C₂)^½ is the sum of the singular values of the product of both centred data matrices."""
    rng = np.random.default_rng(count)
    x, y = rng.random((count, 64)), rng.random((count + 3, 64)) * 1.1
    gaussians = [Gaussian.of(torch.from_numpy(rows)) for rows in (x, y)]
    cx, cy = ((rows - rows.mean(0)) / np.sqrt(len(rows) - 1) for rows in (x, y))
    root = np.linalg.svd(cx @ cy.T, compute_uv=False).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (cx**2).sum() + (cy**2).sum() - 2 * root
    assert frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-3)
    assert frechet_distance(gaussians[0], gaussians[0]) == pytest.approx(0, abs=1e-4)


def test_kernel_distance_is_the_unbiased_one_and_may_be_negative():
    rng = np.random.default_rng(3)
    values = []
    for _ in range(20):
        x, y = rng.standard_normal((2, 6, 16))

        def kernel(a, b):
            return (a @ b / 16 + 1) ** 3

        within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(6) for j in range(6) if i != j) / 30
        between = sum(kernel(a, b) for a in x for b in y) / 36
        values.append(kernel_distance(torch.from_numpy(x), torch.from_numpy(y)))
        assert values[-1] == pytest.approx(within - 2 * between)
    assert min(values) < 0 < max(values)


class Means(nn.Module):
    """A feature network: mean colours."""

    name, is_fid = "means", False

    def forward(self, images):
        return Features(images.mean((2, 3)))


class Pictures(list):
    name = "set"

    def batches(self, size, rank=0, ranks=1):
        for start in range(0, len(self), size):
            yield start // size, torch.stack(self[start : start + size])


def test_the_last_partial_batch_counts():
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, 8, 8), generator=generator, dtype=torch.uint8) for _ in range(7)]
    seen = extract_features(Pictures(images), Means(), batch_size=3)
    rows = np.stack([image.numpy().astype(float).mean((1, 2)) / 127.5 - 1 for image in images])
    assert seen.count == 7
    mean, covariance, _ = Gaussian.of(seen.features.pooled)
    np.testing.assert_allclose(mean, rows.mean(0), atol=1e-5)
    np.testing.assert_allclose(covariance, np.cov(rows.T), atol=1e-5)


class Same:
    """A candidate that gives images back as they are."""

    name, id_count = "same", None

    def reconstruct(self, images, indices):
        return Reconstruction(images, torch.full((len(images),), 8.0))


class Files(Source):
    """A source of files that are not square."""

    classes = ()

    def __len__(self):
        return 5

    def name(self, index):
        return f"image {index}"

    def read(self, index, side=None, pixels=None):
        return photograph((60 + 9 * index, 40))


def test_reconstructions_are_compared_with_the_same_crop():
    measured = measure(Same(), Files(), 32, Evaluators(features=Means()), batch_size=2)
    summary = Summary.of("same", measured, Means())
    assert summary.images == summary.equal_images == 5
    assert summary.frechet_distance == pytest.approx(0, abs=1e-6)
    assert resize_and_crop(Files().read(4), 32).size == (32, 32)


def test_psnr_is_of_each_image():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1
    y = (x + torch.tensor([0.01, 0.1, 0.5, 1.0])[:, None, None, None]).clamp(-1, 1)
    a, b = (np.round((z.numpy() + 1) * 127.5).clip(0, 255) for z in (x, y))
    expected = 10 * np.log10(255**2 / ((a - b) ** 2).mean((1, 2, 3)))
    np.testing.assert_allclose(psnr(x, y), expected, rtol=1e-5)
    np.testing.assert_allclose(
        torch.cat([psnr(p, q) for p, q in zip(x.split(1), y.split(1), strict=True)]), expected, 1e-5
    )


class Precision(nn.Module):
    """A feature network that notes how a GPU would compute its convolutions and products."""

    def forward(self, images):
        self.tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        return Features(images.mean((1, 2, 3))[:, None])


def test_networks_that_measure_do_not_compute_in_tf32(monkeypatch):
    images, network = torch.zeros(2, 3, 8, 8), Precision()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.set_float32_matmul_precision("high")
    try:
        network(images)
        assert network.tf32 == (True, True)  # PyTorch's default, and what a caller may set
        in_fixed_batches(network, images)
        assert network.tf32 == (False, False)
        network(images)
        assert network.tf32 == (True, True)
        in_fixed_batches(lambda x, y: network(x).pooled, images, images)
        assert network.tf32 == (False, False)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_lpips_takes_images_from_minus_one_to_one():
    """Its normalisation of these is ImageNet's of images from 0 to 1."""
    network = LPIPS("alex", pretrained=False)
    for value in (-1.0, 0.3, 1.0):
        ours = (torch.full((3, 1, 1), value) - network.mean) / network.std
        theirs = ((value + 1) / 2 - torch.tensor((0.485, 0.456, 0.406))) / torch.tensor((0.229, 0.224, 0.225))
        torch.testing.assert_close(ours.flatten(), theirs, atol=1e-3, rtol=1e-3)


def test_lpips_refuses_heads_of_other_names(tmp_path):
    network = LPIPS("alex", pretrained=False)
    rows = {f"features.{name}": value for name, value in network.network.state_dict().items()}
    heads = {f"lin{i}.model.1.weight": head.weight for i, head in enumerate(network.heads)}
    torch.save(rows, tmp_path / "alexnet-owt-7be5be79.pth")
    torch.save(heads, tmp_path / "lpips_alex_heads.pth")
    LPIPS("alex", tmp_path, download=False)
    torch.save({name.replace("model.1", "0"): head for name, head in heads.items()}, tmp_path / "lpips_alex_heads.pth")
    with pytest.raises(CheckpointError, match="not the weights"):
        LPIPS("alex", tmp_path, download=False)


@pytest.mark.parametrize(
    ("settings", "id_count"),
    [
        (
            (
                "model.quantization_type=fsq",
                "model.fsq_levels=5",
                "model.context_dim=6",
                "model.codebook_size_for_entropy=7",
            ),
            125,
        ),
        (("model.quantization_type=vq", "model.vq_entries=100"), 100),
        ((), 16),
    ],
)
def test_bits_per_pixel_are_those_of_the_stored_ids(settings, id_count):
    """An id of 125 takes 7 bits in a file, not log2(125)."""
    config = Config.from_dict(TINY).override(*settings)
    tokenizer = FlowMo(config).eval()
    codes = tokenizer.encode(torch.zeros(1, 3, 32, 32))
    whole = int(np.ceil(np.log2(id_count))) * codes.ids.numel()
    assert codes.bits == config.bits_per_image == whole
    assert tokenizer.rates(32, 32) == (whole / 32**2,) == (codes.bits_per_pixel,) == (config.bits_per_pixel,)


def test_a_rate_that_is_asked_for_is_kept():
    windowed = {
        **{
            "network": "windowed",
            "patch_size": 16,
            "code_length": 4,
            "conv_depth": 1,
            "window": 4,
            "enable_cfg": False,
        },
        **{"quantization_type": "fsq", "fsq_levels": 6, "context_dim": 6, "codebook_size_for_entropy": 8},
        "nested_dropout": 0.5,
    }
    tree = {**TINY, "model": {**TINY["model"], **windowed}, "eval": {"sampling": {"guidance": 1.0}}}
    tokenizer = FlowMo(Config.from_dict(tree)).eval()
    image = torch.zeros(1, 3, 32, 32)
    for rate in tokenizer.rates(32, 32):
        assert tokenizer.encode(image, bits_per_pixel=rate).bits_per_pixel == rate
        below = rate * (1 - 1e-3)
        with suppress(ValueError):
            assert tokenizer.encode(image, bits_per_pixel=below).bits_per_pixel <= below


# Bottlenecks


def test_lfq_follows_the_formulas():
    """Entropies by enumeration of all codes, ids bit by bit, for sub-tokens whose group index is the outer one."""
    f, g, w = 6, 3, 0.25
    s = f // g
    code = torch.randn(2, 5, f, generator=torch.Generator().manual_seed(0)) * 0.1
    made = lfq(f, g, entropy_weight=w, commitment_weight=0.5)(code)
    x = code.double().numpy().reshape(-1, f)
    codes = np.array(list(itertools.product((-1, 1), repeat=g)))
    probabilities = []
    for token in x:
        for sub in range(s):
            logits = 2 * codes @ token[sub::s] / 0.1
            p = np.exp(logits - logits.max())
            probabilities.append(p / p.sum())
    p = np.array(probabilities)
    sample = stats.entropy(p.T).mean()
    mean = stats.entropy(p.mean(0))
    assert 0 < sample < mean
    assert float(made.losses["entropy"]) == pytest.approx(w * (sample - mean), abs=2e-3 * w)
    assert float(made.losses["commitment"]) == pytest.approx(0.5 * ((x - np.sign(x)) ** 2).mean(), rel=1e-5)
    ids = [[sum(int(token[k * s + sub] > 0) << k for k in range(g)) for sub in range(s)] for token in x]
    assert made.ids.reshape(-1, s).tolist() == ids
    assert torch.equal(lfq(f, g).code_from_ids(made.ids), torch.sign(code))


@pytest.mark.parametrize("levels", [2, 3, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_level_of_fsq_is_reached_and_they_are_symmetric(levels, dtype):
    quantizer = fsq(3, levels, int(np.ceil(3 * np.log2(levels))))
    ramp = torch.linspace(-6, 6, 2001, dtype=dtype)[None, :, None].expand(1, -1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        code, ids = quantizer.quantize(ramp)
        trained = quantizer(ramp.clone().requires_grad_())
    reached = np.unique(code[0, :, 0].numpy())
    np.testing.assert_allclose(reached, np.linspace(-1, 1, levels), atol=1e-6)
    assert 0 <= ids.min() <= ids.max() < quantizer.id_count
    assert torch.equal(quantizer.code_from_ids(ids), code)
    torch.testing.assert_close(trained.code, code)
    away = torch.tensor((0.37, 0.9, 2.1, 5.0))[None, :, None].expand(1, -1, 3)
    torch.testing.assert_close(quantizer.quantize(-away)[0], -quantizer.quantize(away)[0])


def test_all_ids_of_fsq_come_from_half_precision():
    generator = torch.Generator().manual_seed(0)
    code = (torch.randn(1, 60_000, 3, generator=generator) * 1.2).bfloat16()
    assert len(fsq(3, 8, 9).quantize(code)[1].unique()) == 512


def test_commitment_pulls_the_encoder_alone():
    torch.manual_seed(0)
    quantizer = vq(4, 8, 1, commitment_weight=0.25)
    code = torch.randn(2, 3, 4, requires_grad=True)
    made = quantizer(code)
    entry = quantizer.codebook.numpy()[
        cdist(code.detach().numpy().reshape(-1, 4), quantizer.codebook.numpy()).argmin(1)
    ]
    difference = code.detach().numpy().reshape(-1, 4) - entry
    assert float(made.losses["commitment"].detach()) == pytest.approx(0.25 * (difference**2).mean(), rel=1e-5)
    made.losses["commitment"].backward()
    np.testing.assert_allclose(code.grad.reshape(-1, 4), 0.25 * 2 * difference / difference.size, rtol=1e-4)
    assert not any(True for _ in quantizer.parameters())


def test_a_revived_entry_stays_where_it_was_put():
    """Its moving averages move with it, or the next step would bring the dead entry back."""
    torch.manual_seed(0)
    quantizer = vq(2, 4, 1, decay=0.9)
    codes = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])[None].repeat(1, 20, 1)
    for _ in range(80):
        before = quantizer.codebook.clone()
        quantizer(codes + 0.01 * torch.randn(1, 60, 2))
        quantizer.learn()
        ratio = quantizer.members / quantizer.use[:, None]
        torch.testing.assert_close(ratio, quantizer.codebook, atol=1e-4, rtol=1e-4)
    assert (quantizer.codebook - before).abs().max() < 0.1
    assert float(cdist(codes[0, :3], quantizer.codebook).min(axis=1).max()) < 0.1


def test_encoding_does_not_move_a_codebook():
    tokenizer = FlowMo(Config.from_dict(TINY).override("model.quantization_type=vq", "model.vq_entries=16"))
    before = {name: value.clone() for name, value in tokenizer.quantizer.state_dict().items()}
    tokenizer.train().encode(torch.zeros(2, 3, 32, 32))
    tokenizer.quantizer.learn()
    for name, value in tokenizer.quantizer.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_average_follows_buffers_too():
    tokenizer = FlowMo(Config.from_dict(TINY).override("model.quantization_type=vq", "model.vq_entries=16"))
    average = EMA(tokenizer, 128)
    start = average.state["quantizer.codebook"].clone()
    tokenizer.quantizer.codebook += 1
    average.update(5)
    decay = (1 + 5) / (10 + 5)
    torch.testing.assert_close(average.state["quantizer.codebook"], start + 1 - decay)


# The generator


def vocabulary(id_bits=7, id_count=None, classes=("a", "b")):
    shape = {"image_size": 32, "tokens": 6, "sub_tokens": 2, "id_bits": id_bits, "id_count": id_count}
    return Vocabulary(tokenizer="00" * 8, model="m", classes=classes, **shape)


SMALL = ("generator.hidden_size=32", "generator.depth=1", "generator.num_heads=2")


def generator(seed=0, **shape):
    torch.manual_seed(seed)
    made = Generator(Config().override(*SMALL), vocabulary(**shape))
    with torch.no_grad():
        made.network.logits_out.weight.mul_(20)
    return made.eval()


def test_ids_that_the_tokenizer_has_not_are_never_drawn():
    some = generator(id_count=100)
    every = generator()
    labels = [0, 1] * 20
    assert every.sample(labels, steps=2).max() >= 100
    assert some.sample(labels, steps=2, guidance=1.7).max() < 100
    mask, ids = torch.ones(1, 12, dtype=torch.bool), torch.zeros(1, 12, dtype=torch.int64)
    p = some.guided_logits(ids, mask, torch.tensor([0])).softmax(-1).detach()
    whole = every.guided_logits(ids, mask, torch.tensor([0])).double().softmax(-1).detach()
    assert p[..., 100:].sum() == 0
    np.testing.assert_allclose(p[..., :100], whole[..., :100] / whole[..., :100].sum(-1, keepdim=True), rtol=1e-4)
    with pytest.raises(GenerationError, match="0 to 99"):
        some.log_prob(torch.full((1, 6, 2), 100))


def test_a_vocabulary_knows_its_ids(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    photograph((32, 32)).save(folder / "a.png")
    from flowmo.data import open_source

    for kind, count in (("vq", 100), ("lfq", None)):
        config = Config.from_dict(TINY).override(f"model.quantization_type={kind}", "model.vq_entries=100")
        made = tokenize(FlowMo(config).eval(), open_source(folder), tmp_path / kind)
        facts = read_token_metadata(tmp_path / kind)
        assert facts == made
        assert facts.vocabulary.id_count == count
        assert facts.vocabulary.vocab_size == (count or 16)
    old = Generator(Config().override(*SMALL), vocabulary())
    config, state = old.config, old.state_dict()
    assert build_generator(config, vocabulary(), state).identity() == old.identity()
    assert build_generator(config, vocabulary(id_count=100), state).identity() != old.identity()
    for wrong in (0, 64, 129, True, "100"):
        with pytest.raises(ValueError, match="bits"):
            vocabulary(id_count=wrong)


def test_the_mask_id_is_no_id():
    made = generator()
    ids = torch.arange(12)[None]
    nothing, all_ = torch.zeros(1, 12, dtype=torch.bool), torch.ones(1, 12, dtype=torch.bool)
    blind = made.network(ids, all_, torch.tensor([0]))
    assert torch.equal(blind, made.network(ids + 7, all_, torch.tensor([0])))
    for value in range(128):
        same = torch.full((1, 12), value)
        assert not torch.allclose(made.network(same, nothing, torch.tensor([0])), blind)


def test_no_two_images_of_a_set_have_one_seed():
    seeds = image_seeds(0, range(5000))
    assert len(set(seeds)) == 5000
    ids = generator().sample([0] * 8, image_seeds(0, range(8)), steps=3).flatten(1)
    assert len(ids.unique(dim=0)) == 8


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_micro_batches_log_and_learn_what_the_batch_does(smoothing):
    config = Config().override(*SMALL, "generator.dropout=0", f"generator.label_smoothing={smoothing}")
    torch.manual_seed(0)
    stage = GeneratorStage(Generator(config, vocabulary()))
    ids = torch.randint(128, (8, 12))
    labels = torch.tensor([0, 1] * 4)
    draws = GeneratorNoise.of(config, 12, range(8), torch.device("cpu"))
    assert len(draws.mask.sum(dim=1).unique()) > 2
    results = []
    for passes in (1, 2, 8):
        stage.zero_grad()
        parts = dict.fromkeys(("loss", "cross_entropy", "accuracy"), 0.0)
        for rows in torch.arange(8).split(8 // passes):
            loss = stage(ids[rows], labels[rows], draws.mask[rows])
            (loss.loss / passes).backward()
            parts = {name: parts[name] + float(value) / passes for name, value in loss.parts.items()}
        results.append((parts, [p.grad.clone() for p in stage.parameters() if p.grad is not None]))
    ratios = np.arccos((np.arange(100_000) + 0.5) / 100_000) * 2 / np.pi
    expected = 8 * np.ceil(12 * ratios).mean()
    logits = stage.generator.network(ids, draws.mask, labels).detach()
    by_hand = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0][draws.mask].sum() / expected
    assert results[0][0]["cross_entropy"] == pytest.approx(float(by_hand), rel=1e-4)
    for parts, gradients in results[1:]:
        assert parts == pytest.approx(results[0][0], rel=1e-5)
        torch.testing.assert_close(gradients, results[0][1], atol=1e-6, rtol=1e-4)


# Training


@pytest.mark.parametrize("frozen", [False, True])
def test_a_pass_without_gradients_costs_none_under_autocast(frozen):
    """Weights that autocast has cast without gradient must not serve the pass that learns."""
    config = Config.from_dict(TINY)
    tokenizer = FlowMo(config)
    with torch.no_grad():  # closed gates would stop most gradients
        for name, parameter in tokenizer.named_parameters():
            if "modulation" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    stage, images = Stage(tokenizer, config.opt), torch.rand(2, 3, 32, 32) * 2 - 1
    learning = tokenizer.decoder if frozen else tokenizer
    if frozen:
        tokenizer.encoder.requires_grad_(False)
    gradients = []
    for enabled in (True, False):
        tokenizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            with torch.no_grad():
                stage(images, None, lambda statistic: statistic)
            loss = stage(images, TrainingNoise.of(config, images, range(2)), freeze_encoder=frozen).loss
        loss.float().backward()
        gradients.append({name for name, p in learning.named_parameters() if p.grad is not None and p.grad.any()})
    assert gradients[0] == gradients[1]
    assert len(gradients[0]) == sum(1 for _ in learning.parameters())


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_learning_rate_depends_neither_on_ranks_nor_on_where_a_run_resumes(ranks):
    """A warm-up of 100 steps and a fall over the last half, by hand."""
    config = Config().override(
        *("data.global_batch_size=8", "trainer.duration=1000 steps", "opt.warmup=100 steps", "opt.cooldown=0.5"),
        "opt.lr=1e-3",
    )
    batch = BatchPlan.of(config, ranks).total
    assert batch == 8
    for resumed in (0, 317, 800):
        times = Schedule.of(config, batch, 100, Position(resumed, resumed * batch))
        for step in (0, 49, 99, 300, 500, 750, 999):
            expected = 1e-3 * min(1, (step + 1) / 100) * min(1, (1000 - step) / 500)
            assert times.learning_rate(config.opt, step * batch) == pytest.approx(expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_see_every_image_once_an_epoch_with_seeds_of_its_own(ranks):
    per_rank, count = 2, ranks * 2 * 5
    streams = [ResumableSampler(count, 0, rank * per_rank, per_rank, ranks * per_rank) for rank in range(ranks)]
    drawn = [list(itertools.islice(stream, 2 * count // ranks)) for stream in streams]
    first = [item for rank in drawn for item in rank[: count // ranks]]
    second = [item for rank in drawn for item in rank[count // ranks :]]
    for epoch in (first, second):
        assert sorted(index for index, _ in epoch) == list(range(count))
    assert len({seed for _, seed in first + second}) == 2 * count


def test_clipping_is_by_the_norm_of_all_gradients():
    from flowmo.train.optimizer import clip_gradients

    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), ())]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    theirs = [nn.Parameter(p.detach().clone()) for p in parameters]
    for p, q in zip(parameters, theirs, strict=True):
        q.grad = p.grad.clone()
    norm = clip_gradients(parameters, 0.5)
    expected = nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.testing.assert_close(norm, expected)
    for p, q in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)
