"""Other tokenizers, with random weights in their true architectures: shapes, ids, rates, and files that are wrong.

Each definition was compared once with its authors' code on the same random weights: equal ids, pictures within 5e-5.
"""

import contextlib

import pytest
import torch

from flowmo.evaluate.published import TABLE_1
from flowmo.model.torchvision_import import before_importing
from reproduce.peers import CONTINUOUS, DISCRETE, SIDE, PeerError, build_peer
from reproduce.peers.cosmos import FILES, Cosmos
from reproduce.peers.titok import TiTok
from reproduce.peers.vqgan import bits_to_ids, ids_to_bits

RATES = {row.name: row for row in TABLE_1}
RUN = ("titok-s128", "llamagen16", "llamagen32", "maskbit", "openmagvit2")


def noise(side):
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def image():
    return noise(64)


@pytest.mark.parametrize("name", RUN)
def test_true_architectures(name, tmp_path):
    """Convolutions take any size, and are shown a sixteenth of a picture."""
    title, build, _ = DISCRETE[name]
    image = noise(SIDE if name.startswith("titok") else 64)
    share = image[0, 0].numel() / SIDE**2
    torch.manual_seed(0)
    made = build()
    path = tmp_path / "weights.pt"
    torch.save({"model": made.state_dict()} if "llama" in name else made.state_dict(), path)
    peer = build_peer(name, path)
    result = peer.reconstruct(image, [0])
    assert result.images.shape == image.shape
    assert result.images.abs().max() <= 1
    row = RATES[title]
    assert result.ids.shape == (1, row.tokens * share)
    assert peer.id_count == round(2**row.bits)
    assert 0 <= result.ids.min() <= result.ids.max() < peer.id_count
    assert float(result.bits[0]) / image[0, 0].numel() == pytest.approx(row.bits_per_pixel)
    made.eval()
    with torch.no_grad():
        x = (image + 1) / 2 * (1 - made.low) + made.low
        assert torch.equal(made.encode(x).flatten(1), result.ids)
    broken = made.state_dict()
    del broken["decoder.conv_in.bias" if name != "titok-s128" else "decoder.ln_pre.bias"]
    torch.save(broken, path)
    with pytest.raises(PeerError, match="does not hold the weights of this tokenizer: 1 tensors differ"):
        made.read(path)


@pytest.mark.parametrize(("size", "tokens", "title"), [("large", 32, "TiTok-L-32"), ("base", 64, "TiTok-B-64")])
def test_large_titok_without_its_memory(size, tokens, title):
    with torch.device("meta"):
        network = TiTok(size, tokens)
        ids = network.encode(torch.empty(2, 3, SIDE, SIDE))
        assert ids.shape == (2, RATES[title].tokens)
        assert network.decode(ids).shape == (2, 3, SIDE, SIDE)
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    assert parameters == pytest.approx({"large": 641, "base": 205}[size], rel=0.01)


class Encoder(torch.nn.Module):
    """What Cosmos' TorchScript takes and gives, with the stride as an attribute."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small = torch.nn.functional.avg_pool2d(x, self.stride)
        ids = ((small.mean(1) + 1) / 2 * 63999).to(torch.int32)
        return ids, small


class Decoder(torch.nn.Module):
    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        grey = ids.float()[:, None] / 63999 * 2 - 1
        return torch.nn.functional.interpolate(grey, scale_factor=float(self.stride)).repeat(1, 3, 1, 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "stride"), [("cosmos8", 8), ("cosmos16", 16)])
def test_cosmos_torchscript(name, stride, image, tmp_path):
    for file, network in zip(FILES, (Encoder(stride), Decoder(stride)), strict=True):
        torch.jit.script(network).save(str(tmp_path / file))
    peer = build_peer(name, tmp_path)
    result = peer.reconstruct(image, [0])
    row = RATES[peer.name]
    assert result.ids.shape == (1, row.tokens // 16)
    assert result.images.shape == image.shape
    assert (result.images.mean() - image.mean()).abs() < 0.01
    assert float(result.bits[0]) / 64**2 == pytest.approx(row.bits_per_pixel)
    assert Cosmos.id_count == 64000


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_continuous_autoencoders(kind, image, tmp_path):
    before_importing("diffusers")
    diffusers = pytest.importorskip("diffusers")
    channels = {"sdxl": 4, "flux": 16}[kind]
    shape = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "latent_channels": channels}
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, **shape)
    vae.save_pretrained(tmp_path)
    result = build_peer(kind, tmp_path).reconstruct(image, [0])
    assert result.images.shape == image.shape
    assert result.bits[0] == channels * 8**2 * 16
    assert result.ids is None


def test_bits_and_ids():
    ids = torch.arange(64).view(1, 8, 8)
    assert torch.equal(bits_to_ids(ids_to_bits(ids, 6)), ids)
    assert bits_to_ids(torch.tensor([[1.0, -1.0, 1.0]])).tolist() == [5]


def test_peers_that_cannot_be_had(tmp_path):
    with pytest.raises(PeerError, match=r"no tokenizer 'vqgan'\. Choose from titok-l32"):
        build_peer("vqgan", None)
    with pytest.raises(PeerError, match=r"llamagen16=PATH \(vq_ds16_c2i\.pt"):
        build_peer("llamagen16", None)
    with pytest.raises(PeerError, match="cannot be read"):
        build_peer("maskbit", tmp_path / "nothing.bin")
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    with pytest.raises(PeerError, match="cannot be read"):
        build_peer("maskbit", tmp_path / "bad.safetensors")
    with pytest.raises(PeerError, match="is not TorchScript"):
        build_peer("cosmos8", tmp_path)


def test_a_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "ran").mkdir, ()

    torch.save(Trap(), tmp_path / "trap.bin")
    with pytest.raises(PeerError, match="cannot be read"):
        build_peer("maskbit", tmp_path / "trap.bin")
    assert not (tmp_path / "ran").exists()


def test_weights_of_something_else_are_refused(tmp_path):
    """MaskBit's file holds its quantizer and nothing unknown; a Lightning checkpoint also holds its discriminator."""
    for name, extra, refused in (("maskbit", "quantize.a", False), ("maskbit", "discriminator.a", True)):
        network = DISCRETE[name][1]()
        torch.save({**network.state_dict(), extra: torch.zeros(1)}, tmp_path / "weights.bin")
        with pytest.raises(PeerError) if refused else contextlib.nullcontext():
            network.read(tmp_path / "weights.bin")


def test_rows_that_do_not_depend_on_the_batch(image):
    peer = DISCRETE["maskbit"][1]().eval()
    pair = torch.cat((image, -image))
    assert torch.equal(peer.reconstruct(pair, [0, 1]).ids[1:], peer.reconstruct(-image, [1]).ids)
