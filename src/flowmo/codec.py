"""The ``.flowmo`` file: the ids of one picture behind a short header, packed or entropy-coded.

    3 bytes   magic "FLM"
    1         version, 2, in the lower four bits; how the ids are coded in the upper: 0 packed, 1 by a
              context model or a generator
    4         the first of the tokenizer's identity (architecture and weights): its codes are noise to any other
    1 to 5    height of the picture in pixels, less 1
    1 to 5    its width, less 1
    1 to 5    side of a tile in pixels, less 1; the tiling follows from these three (``pictures.Tiling``)
    2         the first of the context model's identity, where there is one
    …         the ids in the order tile, token, sub-token, lowest bit first; or the context model's string of them
    4         CRC-32 of the header and of the packed ids, little-endian

Numbers of 1 to 5 bytes hold seven bits a byte, lowest first, and set the eighth bit of all bytes but the last. The
checksum is of the ids however they are coded: a context model that decodes to other ids is found out.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import torch

from flowmo import checkpoint
from flowmo.bits import pack_ids, packed_size, unpack_ids
from flowmo.coding import range_coder
from flowmo.coding.context import BitModel, ContextError, ContextModel, ids_of_bits, token_bits
from flowmo.errors import FlowMoError
from flowmo.pictures import MAX_PIXELS, Tiling
from flowmo.tokenizer import Codes, FlowMo

MAGIC = b"FLM"
VERSION = 2
PACKED, CONTEXT = 0, 1
IDENTITY_BYTES = 4
CONTEXT_BYTES = 2
CRC = struct.Struct("<I")
LONGEST_NUMBER = 5
SHORTEST = len(MAGIC) + 1 + IDENTITY_BYTES + 3 + CRC.size
MAX_BYTES = 1 << 28
MOST_TILED = 4
"""Times the most pixels that a picture may have, those of all its tiles together may have. A line of pixels in square
tiles would be worth gigabytes of ids in a file of kilobytes."""
CONTEXT_SUFFIX = ".context.safetensors"


class CodecError(FlowMoError, ValueError):
    """A ``.flowmo`` file that is damaged or of another tokenizer; the message is one line."""


class Codec:
    """Writes and reads the pictures of one tokenizer.

    Args:
        context: a context model of the tokenizer's ids, which makes files shorter and is needed to read those that
            it made.

    Raises:
        CodecError: a continuous tokenizer, or a context model of another one.
        ContextError: there is a context model, and constriction is not installed.
    """

    def __init__(self, tokenizer: FlowMo, context: BitModel | None = None):
        quantizer, identity = tokenizer.quantizer, tokenizer.identity()
        if quantizer.id_count is None or quantizer.sub_tokens is None:
            raise CodecError("this tokenizer is continuous and has no ids to write")
        self.context = context
        self.identity = bytes.fromhex(identity)[:IDENTITY_BYTES]
        self.tile = tokenizer.config.data.image_size
        self.id_count, self.bits = quantizer.id_count, (quantizer.id_count - 1).bit_length()
        self.tokens, self.sub_tokens = tokenizer.code_length, quantizer.sub_tokens
        if context is not None:
            range_coder.library()
        if context is not None and (context.tokenizer, context.shape) != (identity, self._shape):
            raise CodecError(f"the context model is of tokenizer {context.tokenizer}, not of this one ({identity})")

    @property
    def _shape(self) -> tuple[int, int]:
        return self.tokens, self.sub_tokens * self.bits

    def pack(self, codes: Codes) -> bytes:
        """The bytes of a picture's codes, as ``encode_image`` returned them.

        Raises:
            CodecError: codes that are not of one picture, or of another tokenizer, or of a picture so long and thin
                that no reader takes them.
        """
        tiling = codes.tiling
        if tiling is None:
            raise CodecError("only the ids of one picture, from encode_image, can be written")
        if codes.ids is None:
            raise CodecError("a continuous code has no ids to write")
        ids = codes.ids.cpu().numpy()
        if ids.shape != (tiling.count, self.tokens, self.sub_tokens) or codes.id_count != self.id_count:
            raise CodecError(f"ids of shape {ids.shape} below {codes.id_count} are not of this tokenizer")
        if tiling.count * tiling.tile**2 > MOST_TILED * MAX_PIXELS:
            raise CodecError(f"{tiling.count} tiles are too many for a file")
        packed = pack_ids(ids, self.bits)
        coded, coding, name = packed, PACKED, b""
        if self.context is not None:
            string = range_coder.encode(self.context, token_bits(ids, self.bits))
            string = string.ljust(len(ids), b"\0")  # a byte a tile: no short file can ask for much work
            if len(string) + CONTEXT_BYTES < len(packed):
                coded, coding, name = string, CONTEXT, self.context.identity[:CONTEXT_BYTES]
        sizes = b"".join(number(n - 1) for n in (tiling.height, tiling.width, tiling.tile))
        head = MAGIC + bytes([VERSION | coding << 4]) + self.identity + sizes + name
        return head + coded + CRC.pack(zlib.crc32(head + packed))

    def unpack(self, content: bytes, most_pixels: int = MAX_PIXELS) -> Codes:
        """The codes in the bytes of a ``.flowmo`` file; every byte is accounted for before anything is allocated.

        Args:
            most_pixels: of the picture; a file that says more is refused before its ids are decoded.

        Raises:
            CodecError: not such a file, damaged, too large, or written by another tokenizer or with another context
                model.
            ContextError: it is entropy-coded, and constriction is not installed.
        """
        if content[:3] != MAGIC or len(content) < SHORTEST:
            raise CodecError("not a .flowmo file")
        version, coding = content[3] & 15, content[3] >> 4
        if version != VERSION or coding not in (PACKED, CONTEXT):
            raise CodecError(f"version {version}, coding {coding} of the format; this flowmo reads version {VERSION}")
        place = len(MAGIC) + 1 + IDENTITY_BYTES
        identity = content[place - IDENTITY_BYTES : place]
        if identity != self.identity:
            raise CodecError(f"written by tokenizer {identity.hex()}, not by this one ({self.identity.hex()})")
        sizes = []
        for _ in range(3):
            size, place = read_number(content, place)
            sizes.append(size + 1)
        height, width, tile = sizes
        if tile != self.tile or height * width > MAX_PIXELS:
            raise CodecError(f"damaged: {height}×{width} pixels in tiles of {tile}")
        if height * width > most_pixels:
            raise CodecError(f"{height}×{width} are more than {most_pixels:,} pixels, the most that is taken here")
        tiling = Tiling(height, width, tile)
        if tiling.count > 1 and tiling.count * tile**2 > MOST_TILED * most_pixels:
            raise CodecError(f"damaged: {height}×{width} pixels in {tiling.count} tiles")
        context = None
        if coding == CONTEXT:
            context = self._context(content[place : place + CONTEXT_BYTES])
            place += CONTEXT_BYTES
        head, coded = content[:place], content[place : -CRC.size]
        packed = self._packed(coded, context, tiling.count)
        if zlib.crc32(head + packed) != CRC.unpack(content[-CRC.size :])[0]:
            raise CodecError("damaged: its checksum does not fit")
        shape = (tiling.count, self.tokens, self.sub_tokens)
        ids = torch.from_numpy(unpack_ids(packed, math.prod(shape), self.bits).reshape(shape))
        if ids.max() >= self.id_count:
            raise CodecError(f"damaged: id {ids.max()} where {self.id_count - 1} is the largest")
        return Codes(ids, (tile, tile), self.id_count, tiling)

    def _context(self, name: bytes) -> BitModel:
        """The context model, where it is the one of that name."""
        if self.context is None:
            range_coder.library()
            raise CodecError(f"coded with context model {name.hex()}, which is not at hand")
        ours = self.context.identity[:CONTEXT_BYTES]
        if name != ours:
            raise CodecError(f"coded with context model {name.hex()}, not with the one at hand ({ours.hex()})")
        return self.context

    def _packed(self, coded: bytes, context: BitModel | None, tiles: int) -> bytes:
        """The packed ids of so many tiles, out of what a context model made of them, or of themselves."""
        size = packed_size(tiles * self.tokens * self.sub_tokens, self.bits)
        if context is None:
            if len(coded) != size:
                raise CodecError("damaged: its length is not what its header says")
            return coded
        if not tiles <= len(coded) < size or coded != coded.rstrip(b"\0").ljust(tiles, b"\0"):
            raise CodecError("damaged: its length is not what its header says")
        try:
            return pack_ids(ids_of_bits(range_coder.decode(context, coded, tiles), self.bits), self.bits)
        except ContextError as error:
            raise CodecError(f"damaged: {error}") from None


def find_context(source: str | Path, tokenizer: FlowMo) -> ContextModel | None:
    """The context model beside a tokenizer's file, ``NAME.context.safetensors`` beside ``NAME.safetensors``.

    ``None`` where there is none for this tokenizer, or constriction, which uses it, is not installed.

    Raises:
        ContextError: the file is damaged.
    """
    path = checkpoint.find(source)
    path = path.with_name(path.name.removesuffix(path.suffix) + CONTEXT_SUFFIX)
    if not path.is_file() or not range_coder.available():
        return None
    context = ContextModel.read(path)
    return context if context.tokenizer == tokenizer.identity() else None


def number(value: int) -> bytes:
    """A number of up to ``LONGEST_NUMBER`` bytes."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def read_number(content: bytes, place: int) -> tuple[int, int]:
    """The number at a place of some bytes, and the place behind it.

    Raises:
        CodecError: it does not end, or could be shorter.
    """
    value = 0
    for i, byte in enumerate(content[place : place + LONGEST_NUMBER]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            if byte == 0 and i:
                break
            return value, place + i + 1
    raise CodecError("damaged: a size in its header does not end")
