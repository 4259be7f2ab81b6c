"""The .flowmo file as docs/codec.md tells it: a reader written from that page alone, in whole numbers and the standard
library, finds the ids that were written."""

import math
import zlib

import numpy as np
import pytest
import torch

from flowmo import FlowMo
from flowmo.codec import Codec
from flowmo.coding.context import ContextModel
from flowmo.pictures import Tiling
from flowmo.tokenizer import Codes

MODULUS = 1 << 64


def read(content, tokens, ids, id_bits, context=None):
    """Height, width and ids, flat, in the order of tiles, tokens and ids of a token."""
    assert content[:3] == b"FLM"
    assert content[3] & 15 == 2
    sizes, place = [], 8
    for _ in range(3):
        size = shift = 0
        while content[place] > 127:
            size |= (content[place] & 127) << shift
            shift, place = shift + 7, place + 1
        sizes.append((size | content[place] << shift) + 1)
        place += 1
    height, width, side = sizes
    tiles = count_of_tiles(height, side) * count_of_tiles(width, side)
    if content[3] >> 4:
        place += 2
    head, body = content[:place], content[place:-4]
    if content[3] >> 4:
        bits = decoded_bits(body, tiles, context)
    else:
        whole = int.from_bytes(body, "little")
        bits = [whole >> i & 1 for i in range(tiles * tokens * ids * id_bits)]
    packed = sum(bit << i for i, bit in enumerate(bits)).to_bytes((len(bits) + 7) // 8, "little")
    assert zlib.crc32(head + packed) == int.from_bytes(content[-4:], "little")
    groups = range(0, len(bits), id_bits)
    return height, width, [sum(bits[start + i] << i for i in range(id_bits)) for start in groups]


def count_of_tiles(length, side):
    overlap = side // 8
    return 1 if length <= side else math.ceil((length - overlap) / (side - overlap))


def decoded_bits(body, tiles, context):
    """All bits in the order of packed ids."""
    coder = RangeDecoder(body)
    tokens, bits = len(context["bias"]), len(context["bias"][0])
    rows = max(r for r in range(1, math.isqrt(tokens) + 1) if tokens % r == 0)
    columns = tokens // rows
    signs = [[[0] * bits for _ in range(tokens)] for _ in range(tiles)]
    for token in range(tokens):
        for bit in range(bits):
            for tile in signs:
                value = coder.bit(chance(context, tile, token, bit, rows, columns))
                tile[token][bit] = 2 * value - 1
    return [int(sign > 0) for tile in signs for token in tile for sign in token]


def chance(context, signs, token, bit, rows, columns):
    """k of 65536 that a bit is 1."""
    row, column = divmod(token, columns)
    near = []
    for down, right in context["neighbours"]:
        inside = 0 <= row + down < rows and 0 <= column + right < columns
        near += signs[(row + down) * columns + column + right] if inside else [0] * len(signs[token])
    own = signs[token]
    hidden = [
        at
        + sum(n * row[i] for n, row in zip(near, context["hidden"], strict=True))
        + sum(s * row[i] for s, row in zip(own, context["own"], strict=True))
        for i, at in enumerate(context["place"][token])
    ]
    logit = context["bias"][token][bit]
    logit += sum(n * row[bit] for n, row in zip(near, context["direct"], strict=True))
    logit += sum(s * w for s, w in zip(own, context["earlier"][bit], strict=True))
    logit += sum(max(h, 0) * w for h, w in zip(hidden, context["readout"][bit], strict=True)) // 256
    logit = min(max(logit, -2560), 2560)
    return max(1, min(round(65536 / (1 + math.exp(-logit / 256))), 65535))


class RangeDecoder:
    def __init__(self, body):
        self.body, self.place = body, 0
        self.low, self.range = 0, MODULUS - 1
        self.point = self.word() << 32
        self.point |= self.word()

    def word(self):
        content = self.body[self.place : self.place + 4].ljust(4, b"\0")
        self.place += 4
        return int.from_bytes(content, "big")

    def bit(self, k):
        scale = self.range >> 24
        split = (65536 - k) * ((1 << 24) - 2) // 65536 + 1
        at = (self.point - self.low) % MODULUS // scale
        assert at < 1 << 24
        if at < split:
            self.range = scale * split
        else:
            self.low = (self.low + scale * split) % MODULUS
            self.range = scale * ((1 << 24) - split)
        if self.range < 1 << 32:
            self.low, self.range = (self.low << 32) % MODULUS, self.range << 32
            self.point = (self.point << 32) % MODULUS | self.word()
        return int(at >= split)


@pytest.mark.parametrize(
    ("height", "width", "tokens", "group"), [(1, 1, 6, 4), (32, 33, 7, 8), (200, 61, 12, 2), (129, 300, 1, 8)]
)
def test_packed_files(tiny_config, height, width, tokens, group):
    tokenizer = FlowMo(tiny_config.override(f"model.code_length={tokens}", f"model.codebook_size_for_entropy={group}"))
    tiling = Tiling(height, width, 32)
    shape = (tiling.count, tokens, 8 // group)
    ids = torch.randint(0, 1 << group, shape, generator=torch.Generator().manual_seed(0))
    content = Codec(tokenizer).pack(Codes(ids, (32, 32), 1 << group, tiling))
    assert read(content, tokens, 8 // group, group) == (height, width, ids.flatten().tolist())


@pytest.mark.parametrize("seed", range(4))
def test_coded_files(tiny, seed):
    """Of random models, with ids that these expect, so that they are coded and not packed."""
    pytest.importorskip("constriction")
    rng = np.random.default_rng(seed)
    tokens, bits, hidden = 6, 8, int(rng.integers(0, 6))
    neighbours = ((0, -1), (-1, 0), (-1, 1))[:seed]
    near = len(neighbours) * bits
    shapes = {"place": (tokens, hidden), "hidden": (near, hidden), "own": (bits, hidden), "readout": (bits, hidden)}
    shapes |= {"direct": (near, bits), "earlier": (bits, bits)}
    arrays = {name: rng.integers(-200, 200, shape) for name, shape in shapes.items()}
    arrays["earlier"] = np.tril(arrays["earlier"], -1)
    # From sure beyond the table's end to even chances.
    arrays["bias"] = rng.integers(-3500, -200, (tokens, bits))
    model = ContextModel(tiny.identity(), neighbours, **arrays)
    context = {"neighbours": neighbours, **{name: array.tolist() for name, array in arrays.items()}}
    tiling = Tiling(70, 50, 32)
    drawn = np.zeros((tiling.count, tokens, bits), np.int8)
    ours = model.run(tiling.count, lambda token, bit, p: (rng.integers(0, 1 << 16, len(p)) < p).astype(np.int8))
    drawn[:] = ours
    ids = torch.from_numpy((drawn.reshape(tiling.count, tokens, 2, 4) * (1 << np.arange(4))).sum(-1)).long()
    content = Codec(tiny, model).pack(Codes(ids, (32, 32), 16, tiling))
    assert content[3] >> 4 == 1
    assert read(content, tokens, 2, 4, context) == (70, 50, ids.flatten().tolist())
