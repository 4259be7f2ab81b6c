"""The ``.flowmo`` file: the ids of one picture, bit-packed behind a short header.

Layout, integers little-endian:

    4 bytes   magic "FLMO"
    1         version, 1
    8         identity of the tokenizer (architecture and weights): its codes are noise to any other
    4 + 4     height and width of the picture in pixels
    2         side of a tile in pixels; the tiling follows from these three (``pictures.Tiling``)
    1         bits of an id
    4         count of ids
    …         the ids, lowest bit first, in the order tile, token, sub-token
    4         CRC-32 of everything before it
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import torch

from flowmo.bits import pack_ids, packed_size, unpack_ids
from flowmo.errors import FlowMoError
from flowmo.pictures import MAX_PIXELS, Tiling
from flowmo.tokenizer import Codes, FlowMo

MAGIC = b"FLMO"
VERSION = 1
HEADER = struct.Struct("<4sB8sIIHBI")
CRC = struct.Struct("<I")
MAX_BYTES = 1 << 28


class CodecError(FlowMoError, ValueError):
    """A ``.flowmo`` file that is damaged or of another tokenizer; the message is one line."""


def pack(codes: Codes, tokenizer: FlowMo) -> bytes:
    """The bytes of a picture's codes, as ``encode_image`` returned them.

    Raises:
        CodecError: codes without ids, or not of one picture.
    """
    if codes.ids is None or codes.tiling is None:
        raise CodecError("only the ids of one picture, from encode_image, can be written")
    tiling, bits = codes.tiling, (codes.id_count - 1).bit_length()
    packed = pack_ids(codes.ids.cpu().numpy(), bits)
    identity = bytes.fromhex(tokenizer.identity())
    head = HEADER.pack(MAGIC, VERSION, identity, tiling.height, tiling.width, tiling.tile, bits, codes.ids.numel())
    return head + packed + CRC.pack(zlib.crc32(head + packed))


def unpack(content: bytes, tokenizer: FlowMo) -> Codes:
    """The codes in the bytes of a ``.flowmo`` file; every byte is accounted for before anything is allocated.

    Raises:
        CodecError: not such a file, damaged, or written by another tokenizer.
    """
    if len(content) < HEADER.size + CRC.size or content[:4] != MAGIC:
        raise CodecError("not a .flowmo file")
    _, version, identity, height, width, tile, bits, count = HEADER.unpack_from(content)
    if version != VERSION:
        raise CodecError(f"version {version} of the format; this flowmo reads version {VERSION}")
    if len(content) != HEADER.size + packed_size(count, bits) + CRC.size:
        raise CodecError("damaged: its length is not what its header says")
    if zlib.crc32(content[: -CRC.size]) != CRC.unpack(content[-CRC.size :])[0]:
        raise CodecError("damaged: its checksum does not fit")
    if identity.hex() != tokenizer.identity():
        raise CodecError(f"written by tokenizer {identity.hex()}, not by this one ({tokenizer.identity()})")
    quantizer, side = tokenizer.quantizer, tokenizer.config.data.image_size
    tiling = Tiling(height, width, side)
    if tile != side or not 0 < height * width <= MAX_PIXELS or 2**bits != quantizer.id_count:
        raise CodecError(f"damaged: {height}×{width} pixels in tiles of {tile}, ids of {bits} bits")
    shape = (len(tiling.corners), tokenizer.code_length, quantizer.sub_tokens)
    if count != np.prod(shape):
        raise CodecError(f"damaged: {count} ids for {shape[0]} tiles of {shape[1] * shape[2]} ids")
    ids = unpack_ids(memoryview(content)[HEADER.size :], count, bits).reshape(shape)
    return Codes(torch.from_numpy(ids), (side, side), quantizer.id_count, tiling)
