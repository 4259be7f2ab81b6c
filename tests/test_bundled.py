"""The bundled models as a user meets them: offline, from bare ids, on photographs they never saw."""

import pytest
import torch
from conftest import SHARED
from PIL import Image

import flowmo
from flowmo.checkpoint.files import BUNDLED
from flowmo.codec.file import Codec, CodecError, MissingPlanes, find_context
from flowmo.data import open_source
from flowmo.evaluate.metrics.pairs import psnr, ssim
from flowmo.evaluate.reconstruction import Evaluators, FlowMoReconstructor, measure
from flowmo.evaluate.summary import Summary
from flowmo.images import resize_and_crop, to_bytes, to_tensor
from flowmo.losses.perceptual import LPIPS

PSNR_OF_SIXTEEN, SSIM_OF_SIXTEEN = 23.09, 0.673
PSNR_OF_NATIVE = 25.10
HELD_OUT = SHARED / "data" / "imagenette_128" / "val"


@pytest.fixture(scope="module")
def nano():
    return flowmo.load("nano")


@pytest.fixture
def photographs(picture_files):
    return torch.stack([to_tensor(resize_and_crop(Image.open(f).convert("RGB"), 128)) for f in picture_files])


def test_is_the_preset_and_fits(nano):
    assert nano.config.model.code_length * nano.config.model.context_dim == 288 * 8
    assert nano.config.eval == flowmo.preset("nano").eval
    assert nano.config.architecture() == flowmo.preset("nano").architecture()
    assert (BUNDLED / "nano.safetensors").stat().st_size <= 48 * 2**20
    assert nano.config.data.train == nano.config.data.val == "", "no path of whoever trained it"


def test_unseen_photographs_are_recognised_by_their_pixels(nano, photographs):
    """The decoded picture is nearer to its own original than to any other, and nearer than the mean colour is."""
    codes = nano.encode(photographs)
    decoded = nano.decode(codes.ids)
    own = psnr(photographs, decoded)
    flat = psnr(photographs, photographs.mean(dim=(2, 3), keepdim=True).expand_as(photographs))
    assert own.mean() > flat.mean() + 2
    for i, picture in enumerate(decoded):
        assert psnr(photographs, picture.expand_as(photographs)).argmax() == i


def test_figures_of_sixteen_pictures(nano, photographs):
    """The example photographs and their mirror images, to what another processor's rounding may change."""
    pictures = torch.cat((photographs, photographs.flip(-1)))
    decoded = nano.decode(nano.encode(pictures).ids)
    assert float(psnr(pictures, decoded).mean()) == pytest.approx(PSNR_OF_SIXTEEN, abs=0.1)
    assert float(ssim(to_bytes(pictures), to_bytes(decoded)).mean()) == pytest.approx(SSIM_OF_SIXTEEN, abs=0.01)


def test_whole_pictures_through_tiles(nano, picture):
    codes = nano.encode_image(picture)
    decoded = nano.decode_image(codes)
    assert decoded.size == picture.size
    assert codes.nbytes == 288 * len(codes)
    pair = to_tensor(picture), to_tensor(decoded)
    flat = pair[0].mean(dim=(1, 2), keepdim=True).expand_as(pair[0])
    assert psnr(pair[0][None], pair[1][None]) > psnr(pair[0][None], flat[None]) + 2


def test_figures_of_the_model_card(nano, trained_weights, monkeypatch):
    """A sample of the held-out set lands where the card says the whole of it does."""
    if not HELD_OUT.is_dir():
        pytest.skip("needs ../shared/data/imagenette_128/val")
    monkeypatch.setattr(nano, "chunk_size", 16)  # rounds otherwise than alone, by less than the errors below
    evaluators = Evaluators(lpips_alex=LPIPS("alex", trained_weights, download=False))
    report = Summary.of("nano", measure(FlowMoReconstructor(nano), open_source(HELD_OUT), 128, evaluators, limit=100))
    card = (BUNDLED / "nano.md").read_text()
    stated = {row.split("|")[1].strip(): row.split("|")[2] for row in card.splitlines() if row.startswith("| ")}
    mean, spread = (float(word) for word in stated["PSNR (dB)"].replace("±", " ").split())
    assert abs(report.psnr - mean) < 3 * spread / 10, "three standard errors of a hundred pictures"
    mean, spread = (float(word) for word in stated["LPIPS (AlexNet)"].replace("±", " ").split())
    assert abs(report.lpips_alex - mean) < 3 * spread / 10


@pytest.fixture(scope="module")
def native():
    return flowmo.load("native")


def test_native_is_the_preset_and_fits(native):
    assert native.config.architecture() == flowmo.preset("native").architecture()
    assert (BUNDLED / "native.safetensors").stat().st_size <= 20 * 2**20
    assert native.config.data.train == native.config.data.val == "", "no path of whoever trained it"


def test_native_at_three_rates(native, picture_files):
    """Bytes grow with the rate, and so does the quality of an example photograph, whole, from its file."""
    codec, finest = Codec(native, find_context("native", native)), []
    for path in picture_files[2:5]:
        original = flowmo.read_image(path)
        sizes, quality, whole = [], [], native.encode_image(original)
        for sub_tokens in (1, 4, 8):
            codes = whole.coarser(sub_tokens)
            content = codec.pack(codes)
            decoded = native.decode_image(codec.unpack(content))
            assert decoded.size == original.size
            assert len(content) < codes.nbytes, "the context model earns its place"
            sizes.append(8 * len(content) / original.width / original.height)
            quality.append(float(psnr(to_tensor(original)[None], to_tensor(decoded)[None])))
        assert sizes == sorted(sizes)
        assert max(sizes) < 0.27
        assert quality == sorted(quality), path.name
        assert quality[-1] > 19
        finest.append(quality[-1])
    assert sum(finest) / len(finest) == pytest.approx(PSNR_OF_NATIVE, abs=0.1)


def test_half_a_file_of_native_is_a_coarser_image(native, picture):
    codec = Codec(native, find_context("native", native))
    content = codec.pack(native.encode_image(picture))
    with pytest.warns(MissingPlanes, match="coarser"):
        half = codec.unpack(content[: len(content) // 2])
    assert 1 <= half.ids.shape[2] < 8
    assert native.decode_image(half).size == picture.size
    with pytest.raises(CodecError):
        codec.unpack(content[:20])
