"""Reconstruction figures: against published implementations, and the same however the work is cut."""

import io
import json
import math
import os
import shutil
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import PICTURES, run_command
from PIL import Image
from processes import run_ranks

from flowmo import save
from flowmo.codec.file import Codec
from flowmo.data import open_source
from flowmo.distributed import join
from flowmo.errors import SmallImageError
from flowmo.evaluate import measurement, reconstruction
from flowmo.evaluate.codecs import CodecReconstructor
from flowmo.evaluate.comparison import Comparison
from flowmo.evaluate.measurement import Measurement
from flowmo.evaluate.metrics.features import Features, ResNetFeatures
from flowmo.evaluate.metrics.fid import StatisticsError
from flowmo.evaluate.metrics.pairs import decibels, psnr, squared_error, ssim
from flowmo.evaluate.metrics.sets import kernel_distance
from flowmo.evaluate.reconstruction import (
    EvaluationError,
    Evaluators,
    FlowMoReconstructor,
    Reconstruction,
    measure,
    truncated,
)
from flowmo.evaluate.summary import Summary, notes
from flowmo.images import resize_and_crop, to_bytes, to_pil, to_tensor
from flowmo.model.sampler import image_seed
from flowmo.model.torchvision_import import TorchvisionError, import_torchvision


class Colours(torch.nn.Module):
    """A feature network that needs no weights: mean and spread of each colour."""

    name, is_fid = "colours", False

    def forward(self, images):
        return Features(torch.cat((images.mean((2, 3)), images.std((2, 3))), dim=1))


class Blur:
    """A candidate whose picture, bits and ids are plain to see."""

    name, id_count = "blur", 4

    def reconstruct(self, images, indices):
        blurred = torch.nn.functional.avg_pool2d(images, 5, 1, 2)
        ids = torch.tensor(indices)[:, None, None] % self.id_count
        return Reconstruction(blurred, torch.full((len(images),), 16.0), ids)


@pytest.fixture
def source():
    return open_source(PICTURES)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 40, 33, generator=generator) * 2 - 1
    return x, (x + 0.2 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def test_ssim_and_psnr_equal_scikit_image(pair):
    metrics = pytest.importorskip("skimage.metrics")
    x, y = (to_bytes(z) for z in pair)
    for i in range(len(x)):
        a, b = (z[i].permute(1, 2, 0).numpy() for z in (x, y))
        expected = metrics.structural_similarity(a, b, channel_axis=-1, data_range=255)
        assert float(ssim(x, y)[i]) == pytest.approx(expected, abs=1e-9)
        assert float(psnr(*pair)[i]) == pytest.approx(metrics.peak_signal_noise_ratio(a, b), abs=1e-4)


def test_ssim_of_equals_and_of_too_small_pictures(pair):
    x = to_bytes(pair[0])
    assert torch.allclose(ssim(x, x), torch.ones(4, dtype=torch.float64))
    with pytest.raises(SmallImageError, match=r"SSIM needs at least 7 pixels a side\. These images are 6×"):
        ssim(x[..., :6], x[..., :6])


def test_legacy_psnr_is_the_releases(source):
    """Of five pictures at once, truncated to 8 bits, written as the release writes it, with NumPy."""
    metrics = pytest.importorskip("skimage.metrics")
    measured = measure(Blur(), source, 64, Evaluators(), limit=5)
    x = reconstruction.read_crops(source, range(len(source)), 64)[: len(source)]
    chosen = x if len(x) == 5 else x[[i * len(x) // 5 for i in range(5)]]
    y = Blur().reconstruct(chosen, range(5)).images.clamp(-1, 1)
    a, b = (((z + 1) / 2 * 255.0).permute(0, 2, 3, 1).to(torch.uint8).numpy() / np.float32(255) for z in (chosen, y))
    expected = metrics.peak_signal_noise_ratio(a.astype(np.float32), b.astype(np.float32), data_range=1)
    assert Summary.of("blur", measured).psnr_legacy == pytest.approx(expected, abs=1e-4)
    assert decibels(squared_error(truncated(chosen), truncated(y))).shape == (5,)


def test_legacy_ssim_is_the_releases(source):
    """Of 8 bits without their fraction, as float32 in [0, 1], written as the release writes it."""
    metrics = pytest.importorskip("skimage.metrics")
    summary = Summary.of("blur", measure(Blur(), source, 64, Evaluators()))
    x = reconstruction.read_crops(source, range(len(source)), 64)
    y = Blur().reconstruct(x, range(len(x))).images.clamp(-1, 1)
    a, b = (((z + 1) / 2 * 255.0).permute(0, 2, 3, 1).to(torch.uint8).numpy() for z in (x, y))
    scores = [
        metrics.structural_similarity(
            p.astype(np.float32) / 255.0, q.astype(np.float32) / 255.0, data_range=1.0, channel_axis=-1
        )
        for p, q in zip(a, b, strict=True)
    ]
    assert summary.ssim_legacy == pytest.approx(np.mean(scores), abs=1e-5)
    assert abs(summary.ssim_legacy - summary.ssim) > 1e-4, "the two protocols differ"
    assert f"SSIM of truncated images: blur {summary.ssim_legacy:.4f}." in notes([summary])[1]


@pytest.mark.parametrize("size", [(206, 309), (309, 206), (214, 321), (500, 375), (255, 511), (256, 256), (300, 257)])
def test_resize_and_crop_equal_torchvision(size):
    """Sizes whose long side a product of floating-point numbers makes a pixel short are among them."""
    try:
        import_torchvision()
    except TorchvisionError as error:
        pytest.skip(str(error))
    from torchvision import transforms

    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(256)])(Image.fromarray(noise))
    assert (np.asarray(resize_and_crop(Image.fromarray(noise), 256)) == np.asarray(theirs)).all()


def test_the_long_side_of_every_size_is_the_exact_quotient(monkeypatch):
    sizes = []
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, method: sizes.append(size) or self)
    for short in range(101, 400, 7):
        for length in range(short, 900, 13):
            resize_and_crop(Image.new("RGB", (length, short)), 64)
            assert sizes.pop() == (int(Fraction(64 * length, short)), 64)


def test_kernel_distance():
    """Against the double sum that the paper of KID writes; near zero for sets of one distribution."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=generator), torch.randn(20, 5, generator=generator) + 0.5

    def kernel(a, b):
        return float((a @ b / 5 + 1) ** 3)

    expected = sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (30 * 29)
    expected += sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (20 * 19)
    expected -= 2 * sum(kernel(a, b) for a in x for b in y) / 600
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-4)
    draws = [torch.randn(2, 400, 8, generator=generator) for _ in range(20)]
    values = torch.tensor([kernel_distance(a, b) for a, b in draws])
    assert abs(values.mean()) < 3 * values.std() / 20**0.5, "unbiased"
    paired = torch.tensor([kernel_distance(a, a + 1e-3 * b, paired=True) for a, b in draws])
    assert abs(paired.mean()) < 3 * paired.std() / 20**0.5, "also of pairs"
    with pytest.raises(StatisticsError, match="at least 2"):
        kernel_distance(x[:1], y)
    with pytest.raises(StatisticsError, match="equal counts"):
        kernel_distance(x, y, paired=True)


def same(a, b):
    assert a.rows.keys() == b.rows.keys()
    assert all(torch.equal(a.rows[name], b.rows[name]) for name in a.rows)
    assert torch.equal(a.usage, b.usage)


@pytest.fixture
def evaluators(trained_weights):
    from flowmo.losses.perceptual import LPIPS

    return Evaluators(LPIPS("alex", trained_weights, download=False), features=Colours())


def test_the_stand_in_network(trained_weights, pair):
    network = ResNetFeatures(trained_weights, download=False)
    seen = network(pair[0])
    assert seen.pooled.shape == (4, 2048)
    assert seen.logits.shape == (4, 1000)
    assert not network.is_fid
    assert "resnet50" in network.name


def test_batches_and_order_change_nothing(source, evaluators):
    whole = measure(Blur(), source, 64, evaluators, batch_size=100, limit=6)
    for batch_size in (2, 5):
        same(whole, measure(Blur(), source, 64, evaluators, batch_size=batch_size, limit=6))
    first = Summary.of("blur", whole, evaluators.features)
    assert first.images == 6
    assert first.bits_per_pixel == 16 / 64**2
    assert first.lpips_vgg is None
    assert first.frechet_distance > 0
    assert not first.is_fid
    assert whole.usage.sum() == 6
    assert json.loads(json.dumps(first.as_dict()))["name"] == "blur"


def test_an_interrupted_evaluation_goes_on(source, tmp_path, monkeypatch):
    evaluators = Evaluators(features=Colours())
    monkeypatch.setattr(measurement, "SAVE_SECONDS", 0)
    whole = measure(Blur(), source, 64, evaluators)

    class Dies(Blur):
        def reconstruct(self, images, indices):
            if 2 in indices:
                raise KeyboardInterrupt
            return super().reconstruct(images, indices)

    with pytest.raises(KeyboardInterrupt):
        measure(Dies(), source, 64, evaluators, batch_size=1, folder=tmp_path)
    files = list(tmp_path.glob("*.pt"))
    assert len(files) == 2, "a file for each of two images"
    shutil.copy(files[0], tmp_path / "again.pt")  # as if two processes had overlapped
    seen = []

    class Counts(Blur):
        def reconstruct(self, images, indices):
            seen.extend(indices)
            return super().reconstruct(images, indices)

    same(whole, measure(Counts(), source, 64, evaluators, batch_size=1, folder=tmp_path))
    assert seen == list(range(2, len(source)))
    same(whole, measure(Dies(), source, 64, evaluators, folder=tmp_path))
    others = [shutil.copy(path, tmp_path) for path in sorted(PICTURES.glob("*.jpg"))[: len(source)]]
    assert len(open_source(tmp_path)) == len(others) == len(source)
    for images, side in ((source, 32), (open_source(tmp_path), 64)):
        with pytest.raises(EvaluationError, match="holds another evaluation"):
            measure(Blur(), images, side, evaluators, folder=tmp_path)
    (tmp_path / "more.pt").write_bytes(b"no")
    with pytest.raises(EvaluationError, match="is not part of an evaluation"):
        measure(Blur(), source, 64, evaluators, folder=tmp_path)


def measure_as_rank(folder):
    with join() as world:
        evaluators = Evaluators(features=Colours())
        measured = measure(Blur(), open_source(PICTURES), 64, evaluators, batch_size=2, world=world)
        torch.save((measured.rows, measured.usage), folder / str(world.rank))


def test_two_processes_give_what_one_gives(source, tmp_path):
    run_ranks(measure_as_rank, tmp_path)
    whole = measure(Blur(), source, 64, Evaluators(features=Colours()))
    for rank, expected in (("0", whole), ("1", whole.without_features())):
        same(expected, Measurement(*torch.load(tmp_path / rank, weights_only=True)))


def test_one_histogram_of_ids_is_kept_and_not_one_per_batch():
    expected, kept = torch.zeros(1 << 16, dtype=torch.int64), []

    def batches():
        for batch in range(3):
            usage = torch.bincount(torch.arange(5) * batch, minlength=1 << 16)
            expected.add_(usage)
            kept.append(weakref.ref(usage))
            assert not any(earlier() is not None for earlier in kept[:-2])
            yield Measurement({"index": torch.tensor([2 - batch])}, usage)

    (part,) = measurement.in_parts(batches())
    assert torch.equal(part.usage, expected)
    assert part.rows["index"].tolist() == [0, 1, 2]


def test_remembered_features_are_the_same(source):
    class Counts(Colours):
        seen = 0

        def forward(self, images):
            self.seen += 1
            return super().forward(images)

    network = Counts()
    evaluators = Evaluators(features=network)
    evaluators.cache_originals = True
    whole = measure(Blur(), source, 64, Evaluators(features=Colours()))
    same(whole, measure(Blur(), source, 64, evaluators))
    before = network.seen
    same(whole, measure(Blur(), source, 64, evaluators))
    assert network.seen == 1.5 * before


def test_one_picture_has_no_distance_of_features(source):
    evaluators = Evaluators(features=Colours())
    one, two = (
        Summary.of("blur", measure(Blur(), source, 64, evaluators, limit=limit), evaluators.features)
        for limit in (1, 2)
    )
    assert one.frechet_distance is None
    assert "at least 2" in one.missing
    assert any("at least 2" in line for line in notes([one]))
    assert two.frechet_distance > 0
    assert two.frechet_bias is None, "its halves have no covariance"


def test_equal_pictures_have_no_psnr(source):
    class Lossless(Blur):
        def reconstruct(self, images, indices):
            return Reconstruction(images, torch.full((len(images),), 24.0))

    summary = Summary.of("lossless", measure(Lossless(), source, 64, Evaluators()))
    assert summary.psnr is None
    assert not any(line.startswith("PSNR") for line in summary.lines())
    assert summary.equal_images == len(source)
    assert summary.ssim == pytest.approx(1)


def test_pictures_smaller_than_the_crop(source, capsys):
    with pytest.raises(EvaluationError, match=r"None of the 1 images can be used"):
        measure(Blur(), source, 5000, Evaluators(), limit=1)
    assert "smaller than the crop of 5000×5000" in capsys.readouterr().err


def test_a_candidate_whose_pictures_are_not_finite(source):
    class Broken(Blur):
        def reconstruct(self, images, indices):
            result = super().reconstruct(images, indices)
            result.images[-1, 0, 0, 0] = torch.nan
            return result

    with pytest.raises(EvaluationError, match=f"blur reconstructs {source.name(2)} with values that are not finite"):
        measure(Broken(), source, 32, Evaluators(), limit=None, batch_size=3)


def test_flowmo_as_a_candidate(tiny, source):
    measured = measure(FlowMoReconstructor(tiny, steps=2), source, 32, Evaluators(features=Colours()), batch_size=3)
    summary = Summary.of("tiny", measured)
    assert summary.bits_per_pixel == pytest.approx(48 / 1024)
    assert summary.id_count == 16
    assert measured.usage.sum() == len(source) * 12
    same(
        measured, measure(FlowMoReconstructor(tiny, steps=2), source, 32, Evaluators(features=Colours()), batch_size=2)
    )
    other = measure(FlowMoReconstructor(tiny, steps=2, seed=1), source, 32, Evaluators())
    assert not torch.equal(other.rows["squared_error"], measured.rows["squared_error"])


def test_a_picture_larger_than_the_model_goes_through_tiles(tiny, source):
    """48 pixels of a model of 32: 2 × 2 tiles, and what the candidate makes is what the tokenizer alone makes."""
    candidate = FlowMoReconstructor(tiny, steps=2)
    x = reconstruction.read_crops(source, [3], 48)
    result = candidate.reconstruct(x, [3])
    assert result.bits.tolist() == [4 * 48.0]
    assert result.ids.shape == (4, 6, 2)
    codes = tiny.encode_image(to_pil(x[0]))
    expected = tiny.decode_image(codes, 2, image_seed(0, 3))
    assert torch.equal(to_bytes(result.images)[0], to_bytes(to_tensor(expected)))
    summary = Summary.of("tiny", measure(candidate, source, 48, Evaluators(), limit=2))
    assert summary.bits_per_pixel == pytest.approx(4 * 48 / 48**2)


def test_the_command(tiny, tmp_path):
    save(tiny, tmp_path / "tiny.safetensors")
    words = ["evaluate", PICTURES, "--model", tmp_path / "tiny.safetensors", "--no-lpips", "--features", "none"]
    from flowmo.cli import main

    assert main([str(word) for word in words]) == 0
    assert main([str(word) for word in [words[0], tmp_path / "nothing", *words[2:]]]) == 2


def test_codecs_keep_to_the_budget(source):
    """Of bytes where they can, with and without headers; and files that Pillow reads."""
    from flowmo.evaluate.codecs import FORMATS, CodecMissingError, CodecReconstructor

    x = reconstruction.read_crops(source, [0, 1], 128)
    for name in FORMATS:
        try:
            whole, bare = (CodecReconstructor(name, 2000, headers) for headers in (True, False))
        except CodecMissingError:
            continue
        one, other = (candidate.reconstruct(x, [0, 1]) for candidate in (whole, bare))
        for result in (one, other):
            assert result.images.shape == x.shape
            assert (result.bits <= 8 * 2000).all()
            assert (result.bits > 8 * 1000).all(), "the highest quality that fits comes close"
            assert (psnr(x, result.images) > 18).all()
        assert (psnr(x, other.images) >= psnr(x, one.images)).all(), "headers leave fewer bytes for the picture"
        floor = CodecReconstructor(name, 10).reconstruct(x, [0, 1])
        assert (floor.bits > 80).all(), "what does not fit says what it takes"


@pytest.fixture
def rectangles(tmp_path):
    """Three images of different sizes and shapes, as lossless files."""
    folder = tmp_path / "rectangles"
    folder.mkdir()
    for i, (width, height) in enumerate(((50, 37), (64, 33), (32, 70))):
        picture = Image.open(sorted(PICTURES.glob("*.jpg"))[i]).convert("RGB").resize((width, height))
        picture.save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("kind", ["native", "tiny"])
def test_whole_images_are_measured_one_by_one(kind, rectangles, request):
    """Each at its own size: what a person gets who encodes and decodes the file, compared by scikit-image."""
    metrics = pytest.importorskip("skimage.metrics")
    tokenizer = request.getfixturevalue(kind)
    rate = 0.15 if kind == "native" else None
    candidate = FlowMoReconstructor(tokenizer, bits_per_pixel=rate)
    measured = measure(candidate, open_source(rectangles), None, Evaluators(features=Colours()), batch_size=2)
    rates, psnrs, ssims = [], [], []
    for i, path in enumerate(sorted(rectangles.glob("*.png"))):
        picture = Image.open(path)
        codes = tokenizer.encode_image(picture, bits_per_pixel=rate)
        decoded = tokenizer.decode_image(codes, seed=image_seed(0, i))
        pair = np.asarray(picture), np.asarray(decoded)
        rates.append(codes.bits / (picture.width * picture.height))
        psnrs.append(metrics.peak_signal_noise_ratio(*pair))
        ssims.append(metrics.structural_similarity(*pair, channel_axis=-1))
    summary = Summary.of("whole", measured, Colours())
    assert summary.bits_per_pixel == pytest.approx(np.mean(rates), rel=1e-6)
    assert summary.psnr == pytest.approx(np.mean(psnrs), abs=1e-3)
    assert summary.ssim == pytest.approx(np.mean(ssims), abs=1e-4)
    assert summary.psnr_legacy is None, "five images of different sizes have no common error"


def test_codecs_have_no_fewer_bytes(rectangles):
    """At least the budget of each image, and by the lowest quality that reaches it."""
    source = open_source(rectangles)
    budgets = {0: 900, 1: 1100, 2: 700}
    for index, budget in budgets.items():
        x = reconstruction.read_crops(source, [index], None)
        codec = CodecReconstructor("jpeg", budgets, at_least=True)
        result = codec.reconstruct(x, [index])
        sizes = []
        for quality in range(101):
            stream = io.BytesIO()
            to_pil(x[0]).save(stream, "JPEG", quality=quality, optimize=True)
            sizes.append(len(stream.getvalue()))
        assert result.bits.item() / 8 == next(size for size in sizes if size >= budget)


@pytest.mark.parametrize("noise_scale", [1.0, 0.5])
@pytest.mark.parametrize("size", [(48, 64), (40, 56)])
def test_a_batch_of_native_size_is_its_images_one_by_one(native, size, noise_scale):
    """Whole cells go through the network together, others one by one; each at the rate and noise that is asked for."""
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = FlowMoReconstructor(native, seed=3, bits_per_pixel=0.15, noise_scale=noise_scale).reconstruct(x, [5, 9])
    for image, result, index, bits in zip(x, made.images, (5, 9), made.bits, strict=True):
        codes = native.encode_image(image, 0.15)
        shape = (3, *native.padded_size(*size))
        noise = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(image_seed(3, index)))
        single = native.sample(noise_scale * noise[None], native.embed(codes.ids))[0, :, : size[0], : size[1]]
        assert torch.equal(result, single)
        assert bits == codes.bits


def test_whole_images_by_the_command(native, rectangles, tmp_path, capsys):
    """A row for each rate and one for the codec beside it, which has at least the bytes of our files."""
    save(native, tmp_path / "native.safetensors")
    words = ["evaluate", rectangles, "--fit", "whole", "--model", tmp_path / "native.safetensors", "--no-lpips"]
    words += ["--features", "none", "--bpp", "0.1", "0.3", "--peers", "jpeg", "--report", tmp_path / "out", "--json"]
    status, out, _ = run_command(capsys, *words)
    assert status == 0
    rows = json.loads(out)
    assert [row["name"] for row in rows] == ["native at 0.1", "JPEG at 0.1", "native at 0.3", "JPEG at 0.3"]
    assert rows[1]["file_bytes"] >= rows[0]["file_bytes"]
    assert rows[2]["file_bytes"] > rows[0]["file_bytes"]
    assert (tmp_path / "out" / "median.png").is_file()
    assert "Each image whole, at its own size" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fit", "whole", "--size", "64"], "Leave out --size"),
        (["--fit", "whole", "--peers", "titok-l32=x"], "titok-l32 does not stand beside whole images"),
        (["--fit", "whole", "--bpp", "0.0001"], "below every rate"),
        (["--fit", "whole", "--peers", "heic"], "heic"),
    ],
)
def test_whole_images_that_cannot_be(native, rectangles, tmp_path, capsys, words, message):
    save(native, tmp_path / "native.safetensors")
    words = [rectangles, "--model", tmp_path / "native.safetensors", "--no-lpips", "--features", "none", *words]
    status, _, error = run_command(capsys, "evaluate", *words)
    assert status == 2
    assert message in error


PEER = """
from flowmo.evaluate.reconstruction import Reconstruction

class Peer:
    id_count, side = None, 48

    def reconstruct(self, images, indices):
        return Reconstruction(images.roll(1, -1), images.new_full((len(images),), 800.0))

def build_peer(name, weights, device):
    peer = Peer()
    peer.name = f"{name} of {weights}"
    return peer
"""


@pytest.mark.parametrize(
    ("peer", "size", "message"),
    [
        ("mine:blurry=a.pt", 48, None),
        ("mine:blurry", 32, "mine:blurry works at 48 × 48, not at 32 × 32. Add --size 48."),
        ("nothing:blurry", 48, "nothing:blurry is not a codec (jpeg, webp, avif, jxl), and nothing cannot build it"),
        ("titok", 48, "There is no tokenizer 'titok'. Choose from titok-l32"),
        ("titok-l32", 256, "titok-l32 needs its weights"),
        ("titok-l32=none.bin", 256, "none.bin cannot be read"),
    ],
)
def test_a_peer_of_the_users_own(peer, size, message, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PEER)
    save(tiny, tmp_path / "tiny.safetensors")
    words = ["evaluate", PICTURES, "--model", "tiny.safetensors", "--no-lpips", "--features", "none", "--limit", 2]
    status, out, error = run_command(capsys, *words, "--size", size, "--peers", peer, "--json")
    assert status == (2 if message else 0)
    if message:
        assert message in error
    else:
        row = json.loads(out)[1]
        assert (row["name"], row["bytes_per_image"]) == ("blurry of a.pt", 100)


def test_whole_images_of_a_few_pixels_are_refused_by_name(native, tmp_path, capsys):
    """AlexNet's features need 31 pixels a side."""
    Image.new("RGB", (200, 31)).save(tmp_path / "thin.png")
    save(native, tmp_path / "native.safetensors")
    words = ["evaluate", tmp_path, "--fit", "whole", "--model", tmp_path / "native.safetensors", "--features", "none"]
    status, _, error = run_command(capsys, *words, "--no-lpips")
    assert status == 2
    assert "thin.png is 200×31. Metrics need at least 32 pixels a side." in error


def test_payloads_are_what_they_say():
    """JPEG's scan found by another way: everything after the one scan's header and before the end mark."""
    from flowmo.evaluate.codecs import avif_payload, jpeg_payload, webp_payload

    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=30)
    data = stream.getvalue()
    start = data.index(b"\xff\xda")
    length = int.from_bytes(data[start + 2 : start + 4], "big")
    assert jpeg_payload(data) == len(data) - start - 2 - length - 2
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=30)
    assert webp_payload(stream.getvalue()) == pytest.approx(len(stream.getvalue()) - 20 - 10, abs=1)
    assert webp_payload(b"RIFF") == 4
    assert avif_payload(b"\0\0\0\x0cmdat1234") == 4
    assert avif_payload(b"\0\0\0\0free") == 8


def test_published_rates_are_table_1s():
    from flowmo.evaluate.published import TABLE_1

    rates = {row.name: round(row.bits_per_pixel, 3) for row in TABLE_1}
    printed = {"TiTok-L-32": 0.006, "TiTok-B-64": 0.012, "TiTok-S-128": 0.023, "LlamaGen-16": 0.055, "MaskBiT": 0.055}
    printed |= {"Cosmos DI-16x16": 0.062, "OpenMagViT-V2": 0.070, "FlowMo-Lo": 0.070, "ViT-VQGAN": 0.203}
    printed |= {"LlamaGen-32": 0.219, "FlowMo-Hi": 0.219, "Cosmos DI-8x8": 0.249}
    assert rates == printed


def test_the_report(tiny, tmp_path, capsys):
    """The command's whole output, from a model that knows nothing beside a codec that does."""
    from flowmo.cli import main

    pytest.importorskip("matplotlib")
    save(tiny, tmp_path / "tiny.safetensors")
    out = tmp_path / "out"
    words = ["evaluate", PICTURES, "--model", tmp_path / "tiny.safetensors", "--no-lpips", "--features", "none"]
    words += ["--peers", "jpeg", "--report", out, "--limit", 6, "--steps", 2]
    assert main([str(word) for word in words]) == 0
    first = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in first["rows"]] == ["tiny", "JPEG", "JPEG, without headers"]
    assert "tokenizer" in first["header"]["model"]
    text = (out / "report.md").read_text()
    assert "| tiny |" in text
    assert "OpenMagViT-V2" in text
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page, "works offline"
    for name in ("rate_distortion", "rfid_bpp", "worst", "median", "best"):
        assert (out / f"{name}.png").stat().st_size > 500
    capsys.readouterr()
    files = {path: path.read_bytes() for path in (out / "measured").glob("*/*.pt")}
    assert main([str(word) for word in words]) == 0
    assert {path: path.read_bytes() for path in (out / "measured").glob("*/*.pt")} == files, "nothing is measured again"
    assert json.loads((out / "report.json").read_text()) == first
    shutil.rmtree(out / "measured" / "tiny")
    assert main([str(word) for word in [*words, "--seed", 1]]) == 0  # another sample of the same bytes
    again = set((out / "measured").glob("*/*.pt"))
    assert len(files.keys() - again) == 1, "a codec's figures do not depend on the model that it stands beside"


def test_files_are_measured_as_they_are_written(tiny, picture_files):
    """The bits of a file are those that `flowmo encode` would write, for squares and through tiles."""
    codec = Codec(tiny)
    candidate = FlowMoReconstructor(tiny, steps=1, codec=codec)
    for side in (32, 48):
        picture = resize_and_crop(Image.open(picture_files[0]).convert("RGB"), side)
        result = candidate.reconstruct(to_tensor(picture)[None], [0])
        expected = len(codec.pack(tiny.encode_image(picture)))
        assert result.file_bits.tolist() == [8.0 * expected]
        assert result.bits[0] < result.file_bits[0]
    assert FlowMoReconstructor(tiny, steps=1).reconstruct(torch.zeros(1, 3, 32, 32), [0]).file_bits is None
    jpeg = CodecReconstructor("jpeg", 500, headers=False).reconstruct(torch.zeros(1, 3, 32, 32), [0])
    assert jpeg.file_bits[0] > jpeg.bits[0]


def test_the_heat_maps_colours():
    from reproduce.variance import heat_map

    colours = heat_map(torch.tensor([[0.0, 1.0, 2.0, 4.0]]))
    assert colours.shape == (3, 1, 4)
    assert (colours.sum(dim=0).diff() > 0).all()
    assert colours[:, 0, 0].max() < -0.9
    assert torch.isfinite(heat_map(torch.zeros(2, 2))).all()
    assert heat_map(torch.zeros(2, 2, device="meta")).device.type == "meta", "another device than the CPU's"


@pytest.mark.parametrize("side", [32, 64, 96])
def test_codecs_get_the_bytes_of_a_native_models_ids(side, native, source):
    """One token a cell of 16 pixels, four ids of 9 bits each, at any size."""
    made = Comparison(
        model=FlowMoReconstructor(native, steps=1), source=source, evaluators=Evaluators(), side=side, peers=["jpeg"]
    )
    assert made.budget == math.ceil((side // 16) ** 2 * 36 / 8)


def test_a_replaced_image_is_measured_again(tiny, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.effect_noise((40, 40), 80).convert("RGB").save(folder / name)
    Image.new("RGB", (20, 20)).save(folder / "small.png")
    candidate, settings = FlowMoReconstructor(tiny, steps=1), {"side": 32, "folder": tmp_path / "kept"}
    source = open_source(str(folder))
    assert measure(candidate, source, evaluators=Evaluators(), **settings).unreadable == 1
    assert measure(candidate, source, evaluators=Evaluators(), **settings).unreadable == 1
    with pytest.raises(EvaluationError, match="another"):
        measure(candidate, source, evaluators=Evaluators(), enlarge=True, **settings)
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes())  # copied once more
    os.utime(folder / "a.png", (1, 1))
    assert measure(candidate, source, evaluators=Evaluators(), **settings).unreadable == 1
    Image.new("RGB", (40, 40), "red").save(folder / "a.png")
    with pytest.raises(EvaluationError, match=r"a\.png has changed since"):
        measure(candidate, open_source(str(folder)), evaluators=Evaluators(), **settings)


def test_an_image_that_cannot_be_enlarged_is_named_and_left_out(tiny_model, tmp_path, capsys):
    Image.effect_noise((40, 40), 80).convert("RGB").save(tmp_path / "sound.png")
    Image.new("RGB", (120_000, 1)).save(tmp_path / "thin.png")
    words = ["evaluate", tmp_path, "--model", tiny_model, "--no-lpips", "--features", "none", "--enlarge", "--json"]
    status, out, _ = run_command(capsys, *words)
    assert status == 0
    assert json.loads(out)["unreadable"] == 1


def test_names_that_are_not_utf_8_are_in_a_report(tiny_model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xe9.png", "wb") as file:
        Image.effect_noise((40, 40), 80).convert("RGB").save(file, "PNG")
    words = ["evaluate", os.fsdecode(folder), "--model", tiny_model, "--no-lpips", "--features", "none"]
    assert run_command(capsys, *words, "--report", tmp_path / "report")[0] == 0
    assert json.loads((tmp_path / "report" / "report.json").read_text())["header"]["images"].startswith("caf\udce9")
    assert r"\udce9.png" in (tmp_path / "report" / "index.html").read_text()


def test_evaluation_warns_as_reconstruction_does(tiny_model, tmp_path, capsys):
    Image.effect_noise((40, 40), 80).convert("RGB").save(tmp_path / "a.png")
    words = ["evaluate", tmp_path, "--model", tiny_model, "--no-lpips", "--features", "none"]
    status, _, error = run_command(capsys, *words, "--steps", 1, "--guidance", 3)
    assert (status, "--guidance changes nothing" in error) == (0, True)
    status, _, error = run_command(capsys, *words, "--fit", "whole", "--enlarge")
    assert (status, "--enlarge is for crops" in error) == (2, True)


def test_a_large_image_is_decoded_in_the_blocks_of_decode(native):
    """Whole cells of more than 48 a side, whose activations would grow with the area."""
    image = torch.rand(3, 16, 800, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = FlowMoReconstructor(native, seed=3).reconstruct(image[None], [5]).images[0]
    assert torch.equal(ours, native.decode_tensor(native.encode_image(image), seed=image_seed(3, 5)))
