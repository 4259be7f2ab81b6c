"""The .flowmo file: every id comes back, and damage of any kind is an error of one line."""

import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from flowmo import FlowMo, preset
from flowmo.cli import main
from flowmo.codec import file as codec
from flowmo.codec.context import ContextModel
from flowmo.codec.file import Codec, CodecError, find_context
from flowmo.codec.generator import GeneratorModel
from flowmo.data.tokens import Vocabulary
from flowmo.generate.generator import Generator, load_generator, save_generator
from flowmo.model.tiling import Tiling
from flowmo.tokenizer import Codes

T, B = 6, 8


@pytest.fixture
def codes(tiny, picture):
    return tiny.encode_image(picture.resize((60, 40)))


def peaked(tokenizer: FlowMo, sure: int = 900) -> ContextModel:
    """A context model that expects every bit of a token to repeat the token before it."""
    empty = {"place": (T, 0), "hidden": (B, 0), "own": (B, 0), "readout": (B, 0), "earlier": (B, B), "bias": (T, B)}
    arrays = {name: np.zeros(shape, np.int64) for name, shape in empty.items()}
    return ContextModel(tokenizer.identity(), ((0, -1),), direct=sure * np.eye(B, dtype=np.int64), **arrays)


@pytest.fixture
def context(tiny):
    pytest.importorskip("constriction")
    return peaked(tiny)


def alike(codes: Codes) -> Codes:
    """Codes as the model above expects them."""
    return Codes(codes.ids[:, :1].expand(-1, T, -1).contiguous(), codes.size, codes.id_count, codes.tiling)


def test_round_trip_keeps_every_id(tiny, codes):
    ours = Codec(tiny)
    content = ours.pack(codes)
    again = ours.unpack(content)
    assert torch.equal(again.ids, codes.ids)
    assert again.tiling == codes.tiling
    assert again.size == codes.size
    assert len(content) == 4 + 4 + 3 + codes.nbytes + 4


def test_a_picture_of_just_the_max_pixels_is_read(tiny, codes):
    ours = Codec(tiny)
    content = ours.pack(codes)
    assert torch.equal(ours.unpack(content, max_pixels=60 * 40).ids, codes.ids)
    with pytest.raises(CodecError, match="40×60 pixels, more than 2,399"):
        ours.unpack(content, max_pixels=60 * 40 - 1)


def test_nothing_is_packed_that_no_reader_accepts(tiny, codes, monkeypatch):
    monkeypatch.setattr("flowmo.codec.file.MAX_PIXELS", 60 * 40 - 1)
    with pytest.raises(CodecError, match="40×60 pixels is too large for a file"):
        Codec(tiny).pack(codes)


@pytest.mark.parametrize("change", [lambda ids: ids + 5000, lambda ids: ids - 600, lambda ids: ids.float()])
def test_ids_out_of_range_are_not_packed(tiny, codes, change):
    """Only their lowest bits would be written, under a valid checksum."""
    wrong = Codes(change(codes.ids), codes.size, codes.id_count, codes.tiling)
    with pytest.raises(CodecError, match=f"whole numbers from 0 to {codes.id_count - 1}"):
        Codec(tiny).pack(wrong)


def test_any_buffer_is_unpacked(tiny, codes):
    content = Codec(tiny).pack(codes)
    for kind in (memoryview, bytearray):
        assert torch.equal(Codec(tiny).unpack(kind(content)).ids, codes.ids)


def test_a_context_model_makes_likely_codes_short(tiny, codes, context):
    ours, likely = Codec(tiny, context), alike(codes)
    packed, coded = Codec(tiny).pack(likely), ours.pack(likely)
    assert len(coded) <= len(packed) - 10
    assert coded[3] == codec.VERSION | codec.CONTEXT << 4
    assert torch.equal(ours.unpack(coded).ids, likely.ids)
    assert torch.equal(ours.unpack(packed).ids, likely.ids), "packed files are read all the same"


def test_unlikely_codes_are_packed_instead(tiny, codes, context):
    flip = torch.tensor([0, 15, 0, 15, 0, 15])[None, :, None]
    unlikely = Codes((alike(codes).ids ^ flip), codes.size, codes.id_count, codes.tiling)
    content = Codec(tiny, context).pack(unlikely)
    assert content[3] >> 4 == codec.PACKED
    assert content == Codec(tiny).pack(unlikely)


@pytest.mark.parametrize("seed", range(6))
def test_random_ids_of_random_tokenizers(tiny_config, seed):
    """Sizes of pictures, of codes and of ids at random, packed and coded."""
    rng = random.Random(seed)
    group = rng.choice((1, 2, 3, 5, 9))
    config = tiny_config.override(
        f"model.code_length={rng.randrange(1, 20)}",
        f"model.context_dim={group * rng.randrange(1, 5)}",
        f"model.codebook_size_for_entropy={group}",
    )
    tokenizer = FlowMo(config)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(8):
        tiling = Tiling(rng.randrange(1, 200), rng.randrange(1, 200), 32)
        shape = (tiling.count, config.model.code_length, tokenizer.quantizer.sub_tokens)
        ids = torch.randint(0, tokenizer.quantizer.id_count, shape, generator=generator)
        codes = Codes(ids, (32, 32), tokenizer.quantizer.id_count, tiling)
        again = Codec(tokenizer).unpack(Codec(tokenizer).pack(codes))
        assert torch.equal(again.ids, ids)
        assert again.tiling == tiling


@pytest.mark.parametrize("name", ["nano", "small", "lo", "hi"])
def test_random_ids_of_every_preset(name):
    """Of its code, with networks that are small: they have no say in it."""
    small = [f"model.{net}{setting}" for net in ("", "enc_") for setting in ("hidden_size=64", "num_heads=2")]
    tokenizer = FlowMo(preset(name).override(*small, "model.enc_depth=1", "model.dec_depth=1"))
    side, generator = tokenizer.config.data.image_size, torch.Generator().manual_seed(0)
    for height, width in ((side, side), (1, side + 1), (3 * side - 7, 2 * side)):
        tiling, quantizer = Tiling(height, width, side), tokenizer.quantizer
        shape = (tiling.count, tokenizer.code_length, quantizer.sub_tokens)
        ids = torch.randint(0, quantizer.id_count, shape, generator=generator)
        codes = Codes(ids, (side, side), quantizer.id_count, tiling)
        content = Codec(tokenizer).pack(codes)
        assert torch.equal(Codec(tokenizer).unpack(content).ids, ids)
        assert len(content) <= codes.nbytes + 19
        assert codes.bits == tiling.count * tokenizer.config.bits_per_image


@pytest.mark.parametrize("seed", range(6))
def test_random_ids_under_random_context_models(tiny, seed):
    pytest.importorskip("constriction")
    rng = np.random.default_rng(seed)
    hidden, neighbours = int(rng.integers(0, 9)), ((0, -1), (-1, 0), (-1, 1))[: seed % 4]
    shapes = {"bias": (T, B), "place": (T, hidden), "hidden": (len(neighbours) * B, hidden), "own": (B, hidden)}
    shapes |= {"readout": (B, hidden), "direct": (len(neighbours) * B, B), "earlier": (B, B)}
    arrays = {name: rng.integers(-300, 300, shape) for name, shape in shapes.items()}
    arrays["earlier"] = np.tril(arrays["earlier"], -1)
    ours = Codec(tiny, ContextModel(tiny.identity(), neighbours, **arrays))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(6):
        tiling = Tiling(int(rng.integers(1, 90)), int(rng.integers(1, 90)), 32)
        ids = torch.randint(0, 16, (tiling.count, T, 2), generator=generator) & int(rng.integers(0, 16))
        assert torch.equal(ours.unpack(ours.pack(Codes(ids, (32, 32), 16, tiling))).ids, ids)


@pytest.fixture(params=["packed", "coded"])
def written(request, tiny, codes):
    """A codec, and a file that it wrote."""
    if request.param == "packed":
        return Codec(tiny), Codec(tiny).pack(codes)
    pytest.importorskip("constriction")
    ours = Codec(tiny, peaked(tiny))
    content = ours.pack(alike(codes))
    assert content[3] >> 4 == codec.CONTEXT
    return ours, content


def test_every_change_of_a_byte_is_noticed(written):
    ours, content = written
    for place in range(len(content)):
        for change in range(1, 256):
            damaged = bytearray(content)
            damaged[place] ^= change
            with pytest.raises(CodecError) as refused:
                ours.unpack(bytes(damaged))
            assert "\n" not in str(refused.value)


def test_every_truncation_and_every_tail_is_noticed(written):
    ours, content = written
    for length in range(len(content)):
        with pytest.raises(CodecError):
            ours.unpack(content[:length])
    for tail in (b"\0", b"\xff", content):
        with pytest.raises(CodecError):
            ours.unpack(content + tail)


def test_noise_is_refused(written):
    ours, content = written
    noise = random.Random(0)
    for _ in range(500):
        start = content[: noise.choice((0, 3, 4, 8, 11))]
        with pytest.raises(CodecError):
            ours.unpack(start + noise.randbytes(noise.randrange(200)))


def with_checksum(head: bytes, packed: bytes) -> bytes:
    return head + packed + struct.pack("<I", zlib.crc32(head + packed))


@pytest.mark.parametrize("coding", [codec.PACKED, codec.CONTEXT])
def test_claims_of_a_terabyte_cost_nothing(tiny, context, coding, monkeypatch):
    """A header that asks for much, with a right checksum, is refused before anything is decoded or allocated."""
    ours = Codec(tiny, context)
    for work in ("range_coder.decode", "unpack_ids"):
        monkeypatch.setattr(f"flowmo.codec.file.{work}", lambda *_: pytest.fail("that is work"))
    first = codec.MAGIC + bytes([codec.VERSION | coding << 4]) + ours.identity
    name = context.identity[:2] if coding else b""
    tracemalloc.start()
    for height, width, tile in (
        (2**34, 2**34, 32),
        (2**32, 1, 32),
        (2**20, 2**20, 32),
        (40, 40, 2**30),
        (40, 40, 64),
        (9000, 9000, 32),
    ):
        sizes = b"".join(codec.varint(n - 1) for n in (height, width, tile))
        for body in (b"", bytes(500)):
            with pytest.raises(CodecError, match=r"damaged|the limit here"):
                ours.unpack(with_checksum(first + sizes + name, body))
    for height, width in ((1, 10**8), (10**8, 1)):
        sizes = b"".join(codec.varint(n - 1) for n in (height, width, 32))
        with pytest.raises(CodecError, match=r"damaged: .* tiles"):
            ours.unpack(with_checksum(first + sizes + name, b"\1" * Tiling(height, width, 32).count))
    for endless in (b"\x80" * 5, b"\xff" * 40, b"\x80\x00\x01\x01"):
        with pytest.raises(CodecError, match="does not end"):
            ours.unpack(with_checksum(first + endless, bytes(20)))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 50e6, "copies of the longest of these files"


def test_ids_that_no_token_has_are_refused(tiny_config):
    """Of 25 ids in 5 bits, 25 to 31 are none; a right checksum does not make them some."""
    fsq = FlowMo(
        tiny_config.override(
            "model.quantization_type=fsq",
            "model.fsq_levels=5",
            "model.context_dim=2",
            "model.codebook_size_for_entropy=5",
        )
    )
    assert fsq.quantizer.id_count == 25
    ours, tiling = Codec(fsq), Tiling(32, 32, 32)
    fine = torch.full((1, 6, 1), 24)
    content = ours.pack(Codes(fine, (32, 32), 25, tiling))
    assert torch.equal(ours.unpack(content).ids, fine)
    head = content[: -4 - 4]
    with pytest.raises(CodecError, match="id 31 where 24 is the largest"):
        ours.unpack(with_checksum(head, b"\xff" * 4))


def test_codes_of_another_tokenizer_are_refused(tiny, codes):
    content = Codec(tiny).pack(codes)
    with torch.no_grad():
        tiny.decoder.picture_out.bias.add_(1e-3)
    with pytest.raises(CodecError, match="written by tokenizer"):
        Codec(tiny).unpack(content)


def test_another_version_is_refused(tiny, codes):
    content = bytearray(Codec(tiny).pack(codes))
    content[3] = 1
    with pytest.raises(CodecError, match="reads versions 2 and 3"):
        Codec(tiny).unpack(bytes(content))


def test_another_context_model_is_refused(tiny, codes, context):
    content = Codec(tiny, context).pack(alike(codes))
    with pytest.raises(CodecError, match="which is not available"):
        Codec(tiny).unpack(content)
    with pytest.raises(CodecError, match="not the available one"):
        Codec(tiny, peaked(tiny, 800)).unpack(content)
    with torch.no_grad():
        tiny.decoder.picture_out.bias.add_(1e-3)
    with pytest.raises(CodecError, match="The context model is of tokenizer"):
        Codec(tiny, context)


def test_the_context_model_beside_a_tokenizer_is_found(tiny, tiny_model, context):
    assert find_context(tiny_model, tiny) is None
    beside = tiny_model.with_name("tiny.context.safetensors")
    beside.write_bytes(context.save())
    assert find_context(tiny_model, tiny).identity == context.identity
    with torch.no_grad():
        tiny.decoder.picture_out.bias.add_(1e-3)
    assert find_context(tiny_model, tiny) is None, "of another tokenizer"


def test_only_single_pictures_are_written(tiny, images, codes):
    with pytest.raises(CodecError, match="one image"):
        Codec(tiny).pack(tiny.encode(images))
    with pytest.raises(CodecError, match="not of one image of this tokenizer"):
        Codec(tiny).pack(Codes(codes.ids[:, :3], codes.size, codes.id_count, codes.tiling))


def test_continuous_tokenizers_write_nothing(tiny_config):
    with pytest.raises(CodecError, match="continuous"):
        Codec(FlowMo(tiny_config.override("model.quantization_type=kl")))


def test_a_continuous_code_is_refused_by_name(tiny, tiny_config, codes):
    continuous = FlowMo(tiny_config.override("model.quantization_type=kl"))
    code = continuous.encode_image(Image.new("RGB", (32, 32)))
    with pytest.raises(CodecError, match="continuous code has no ids"):
        Codec(tiny).pack(code)
    with pytest.raises(TypeError, match="id_count"):
        _ = Codes(codes.ids, codes.size).bits


@pytest.fixture
def generator(tiny):
    """One of random weights that expects large ids."""
    facts = {"tokenizer": tiny.identity(), "model": "tiny", "image_size": 32}
    small = ("generator.depth=1", "generator.hidden_size=64", "generator.num_heads=1")
    torch.manual_seed(0)
    generator = Generator(
        preset("maskgit_nano").override(*small), Vocabulary(tokens=T, sub_tokens=2, id_bits=4, classes=(), **facts)
    )
    with torch.no_grad():
        generator.network.logits_out.bias[12:] = 12
    return generator


def test_every_damage_to_a_file_of_a_generator_is_noticed(tiny, codes, generator):
    pytest.importorskip("constriction")
    ours = Codec(tiny, GeneratorModel(generator, steps=2))
    likely = Codes(codes.ids | 12, codes.size, codes.id_count, codes.tiling)
    content = ours.pack(likely)
    assert content[3] >> 4 == codec.CONTEXT
    assert torch.equal(ours.unpack(content).ids, likely.ids)
    damaged = [content[:length] for length in range(len(content))]
    for place, byte in enumerate(content):
        damaged += [content[:place] + bytes([byte ^ change]) + content[place + 1 :] for change in (1, 0x10, 0x80, 255)]
    for bad in damaged:
        with pytest.raises(CodecError) as refused:
            ours.unpack(bad)
        assert "\n" not in str(refused.value)


def test_a_generator_codes_files_too(tiny, tiny_model, generator, photo, tmp_path):
    """Through the command, and refused without it."""
    pytest.importorskip("constriction")
    file, out = str(tmp_path / "generator.safetensors"), tmp_path / "photo.flowmo"
    save_generator(generator, file)
    words = ["--model", str(tiny_model), "--generator", file]
    ours = Codec(tiny, GeneratorModel(load_generator(file)))
    codes = tiny.encode_image(Image.open(photo))
    likely = Codes(codes.ids | 12, codes.size, codes.id_count, codes.tiling)
    content = ours.pack(likely)
    assert content[3] >> 4 == codec.CONTEXT
    assert torch.equal(ours.unpack(content).ids, likely.ids)
    out.write_bytes(content)
    assert main(["decode", str(out), *words, "--steps", "1"]) == 0
    assert main(["decode", str(out), *words[:2], "--steps", "1", "--force"]) == 2
    assert main(["encode", photo, *words, "-o", str(tmp_path / "b.flowmo")]) == 0
    assert torch.equal(ours.unpack((tmp_path / "b.flowmo").read_bytes()).ids, codes.ids)


@pytest.fixture
def photo(tmp_path, picture):
    picture.resize((70, 50)).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")
