"""The .flowmo file as docs/codec.md tells it: a reader written from that page alone, in whole numbers and the standard
library, finds the ids that were written."""

import binascii
import math
import zlib

import numpy as np
import pytest
import torch
from test_planes import NEIGHBOURS, D, S, random_codes, random_model

from flowmo import FlowMo
from flowmo.codec.context import ContextModel
from flowmo.codec.file import Codec
from flowmo.model.tiling import Tiling
from flowmo.tokenizer import Codes

MODULUS = 1 << 64


def read(content, tokens, ids, id_bits, context=None):
    """Height, width and ids, flat, in the order of tiles, tokens and ids of a token."""
    assert content[:3] == b"FLM"
    assert content[3] & 15 == 2
    sizes, place = [], 8
    for _ in range(3):
        size, place = number(content, place)
        sizes.append(size + 1)
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


def number(content, place):
    """The number at a place, and the place behind it."""
    value = shift = 0
    while content[place] > 127:
        value |= (content[place] & 127) << shift
        shift, place = shift + 7, place + 1
    return value | content[place] << shift, place + 1


def read_planes(content, id_bits, context=None):
    """Version 3: height, width and ids by plane, as far as they are sound."""
    assert content[:3] == b"FLM"
    assert content[3] & 15 == 3
    height, place = number(content, 8)
    width, place = number(content, place)
    planes, place = content[place], place + 1 + 2 * (content[3] >> 4)
    crc = binascii.crc_hqx(content[:place], 0)
    assert crc == int.from_bytes(content[place : place + 2], "little")
    place += 2
    rows, columns = height // 16 + 1, width // 16 + 1
    packed_size = (rows * columns * id_bits + 7) // 8
    found = []
    for _ in range(planes):
        length = packed_size
        if content[3] >> 4:
            length, place = number(content, place)
        packed = content[place : place + length]
        place += length + 2
        if place > len(content):
            break
        if length < packed_size:
            ids = decoded_plane(packed, found, rows, columns, context)
            packed = sum(n << id_bits * i for i, n in enumerate(ids)).to_bytes(packed_size, "little")
        crc = binascii.crc_hqx(packed, crc)
        if crc != int.from_bytes(content[place - 2 : place], "little"):
            break
        whole = int.from_bytes(packed, "little")
        found.append([whole >> id_bits * i & (1 << id_bits) - 1 for i in range(rows * columns)])
    return height + 1, width + 1, found


def decoded_plane(body, earlier, rows, columns, context):
    """The ids of the plane behind the earlier ones, by a context model."""
    coder, s = RangeDecoder(body), len(earlier)
    order = context["order"]
    steps = [order[r % len(order)][c % len(order[0])] for r in range(rows) for c in range(columns)]
    digits, nodes = len(context["bias"][0]), len(context["bias"][0][0])
    bits, tables = nodes.bit_length(), context["digits"][s]
    found = [None] * (rows * columns)
    for step in sorted(set(steps)):
        cells = [cell for cell in range(rows * columns) if steps[cell] == step]  # fewer than 4096 here
        known = [found[cell] if steps[cell] < step else None for cell in range(rows * columns)]
        hidden = {cell: second_layer(cell, [*earlier, known], rows, columns, context) for cell in cells}
        for cell in cells:
            found[cell] = 0
        for digit in range(digits):
            logits = {}
            for cell in cells:
                there = dot([clipped(h) for h in hidden[cell]], context["readout"][s][digit], 4096, nodes)
                logits[cell] = [a + b for a, b in zip(context["bias"][s][digit], there, strict=True)]
            node, value = dict.fromkeys(cells, 0), dict.fromkeys(cells, 0)
            for _ in range(bits):
                for cell in cells:
                    bit = coder.bit(table(logits[cell][node[cell]]))
                    node[cell], value[cell] = 2 * node[cell] + 1 + bit, 2 * value[cell] + bit
            for cell in cells:
                found[cell] |= value[cell] << bits * digit
                hidden[cell] = plus(hidden[cell], tables[s * digits + digit][value[cell]])
    return found


def second_layer(cell, known, rows, columns, context):
    """Of a cell, before the first digit. ``known``: ids of the planes up to that which is read, ``None`` for none."""
    s = len(known) - 1
    planes, digits, nodes = len(context["bias"]), len(context["bias"][0]), len(context["bias"][0][0])
    bits, seen = nodes.bit_length(), []
    for down, right in context["neighbours"]:
        row, column = cell // columns + down, cell % columns + right
        inside = 0 <= row < rows and 0 <= column < columns
        for plane in range(planes):
            id = known[plane][row * columns + column] if inside and plane <= s else None
            seen += [0 if id is None else 2 * (id >> bits * digit & nodes) - nodes for digit in range(digits)]
    hidden = [clipped(h) for h in plus(context["start"][s], dot(seen, context["around"][s], 16))]
    hidden = plus(context["middle_start"][s], dot(hidden, context["middle"][s], 4096))
    for plane in range(s):
        for digit in range(digits):
            value = known[plane][cell] >> bits * digit & nodes
            hidden = plus(hidden, context["digits"][s][plane * digits + digit][value])
    return hidden


def plus(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]


def dot(x, weights, divisor, width=None):
    """x · weights, divided and rounded down."""
    width = len(weights[0]) if weights else width or 0
    return [sum(a * row[i] for a, row in zip(x, weights, strict=True)) // divisor for i in range(width)]


def clipped(x):
    return min(max(x, 0), 65535)


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
    return table(logit)


def table(logit):
    """k of 65536 of a logit."""
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


@pytest.mark.parametrize(("height", "width", "planes"), [(1, 1, 4), (16, 17, 1), (100, 61, 3), (33, 400, 4)])
def test_packed_planes(native, height, width, planes):
    codes = random_codes(height, width, planes=planes)
    content = Codec(native).pack(codes)
    expected = codes.ids[0].T.tolist()
    assert read_planes(content, 9) == (height, width, expected)
    assert read_planes(content[:-1], 9) == (height, width, expected[:-1])


@pytest.mark.parametrize("seed", range(4))
def test_coded_planes(native, seed):
    """Of random models, with ids drawn from these, so that they are coded and not packed."""
    pytest.importorskip("constriction")
    rng = np.random.default_rng(seed)
    order = (np.add.outer(2 * np.arange(3), np.arange(4)), np.array([[0, 2], [3, 1]]), np.array([[5]]))[seed % 3]
    bias = rng.integers(-3500, -200, (S, D, 7))
    model = random_model(native, seed, hidden=seed, scale=1500, bias=bias, order=order)
    context = {"neighbours": NEIGHBOURS, **{name: array.tolist() for name, array in model.arrays.items()}}
    ids = np.zeros((5, 6, 0), np.int64)
    for _ in range(S):
        bits = model.plane(ids)(1, lambda cells, bit, p: (rng.integers(0, 1 << 16, p.shape) < p).astype(np.int8))
        drawn = (bits[0].astype(np.int64) << np.arange(9)).sum(axis=-1)
        ids = np.concatenate((ids, drawn.reshape(5, 6, 1)), axis=2)
    codes = Codes(torch.from_numpy(ids.reshape(1, 30, S)), (80, 96), 512, image_size=(70, 93))
    content = Codec(native, model).pack(codes)
    assert content[3] >> 4 == 1
    assert read_planes(content, 9, context) == (70, 93, codes.ids[0].T.tolist())
