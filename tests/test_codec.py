import random

import pytest
import torch

from flowmo import codec
from flowmo.codec import CodecError
from flowmo.tokenizer import Codes


@pytest.fixture
def codes(tiny, picture):
    return tiny.encode_image(picture.resize((60, 40)))


def test_round_trip_keeps_every_id(tiny, codes):
    content = codec.pack(codes, tiny)
    again = codec.unpack(content, tiny)
    assert torch.equal(again.ids, codes.ids)
    assert again.tiling == codes.tiling
    assert again.size == codes.size
    assert len(content) == codec.HEADER.size + codes.nbytes + 4


def test_random_ids(tiny, codes):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(0, 16, codes.ids.shape, generator=generator)
        changed = Codes(ids, codes.size, codes.id_count, codes.tiling)
        assert torch.equal(codec.unpack(codec.pack(changed, tiny), tiny).ids, ids)


def test_every_changed_byte_is_noticed(tiny, codes):
    content = codec.pack(codes, tiny)
    for i in range(len(content)):
        damaged = bytearray(content)
        damaged[i] ^= 1 << (i % 8)
        with pytest.raises(CodecError):
            codec.unpack(bytes(damaged), tiny)


def test_every_truncation_and_noise_is_noticed(tiny, codes):
    content = codec.pack(codes, tiny)
    for length in range(len(content)):
        with pytest.raises(CodecError):
            codec.unpack(content[:length], tiny)
    noise = random.Random(0)
    for _ in range(200):
        with pytest.raises(CodecError):
            codec.unpack(b"FLMO" + noise.randbytes(noise.randrange(200)), tiny)


def test_a_header_that_claims_a_terabyte(tiny):
    import zlib

    identity = bytes.fromhex(tiny.identity())
    for height, width, count in ((2**32 - 1, 2**32 - 1, 0), (10**6, 10**6, 0), (1, 1, 2**32 - 1), (0, 0, 0)):
        head = codec.HEADER.pack(b"FLMO", 1, identity, height, width, 32, 4, count)
        with pytest.raises(CodecError, match="damaged"):
            codec.unpack(head + codec.CRC.pack(zlib.crc32(head)), tiny)


def test_another_tokenizer_is_refused(tiny, codes):
    content = codec.pack(codes, tiny)
    with torch.no_grad():
        tiny.encoder.code_out.bias += 1
    with pytest.raises(CodecError, match="written by tokenizer"):
        codec.unpack(content, tiny)


def test_only_pictures_can_be_packed(tiny, images):
    with pytest.raises(CodecError, match="one picture"):
        codec.pack(tiny.encode(images), tiny)
