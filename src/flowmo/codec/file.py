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

Version 3 is for tokenizers of native size. It has no tiles: a plane holds one sub-token of every cell, and a prefix of
the planes is a coarser image. It differs after the width:

    1         number of planes
    2         the first of the context model's identity, where there is one
    2         CRC-16 of the header
    and for each plane
    1 to 5    length of its ids in bytes, where there is a context model; packed ids keep their length
    …         the ids in the order of cells, packed; or the context model's string of them
    2         CRC-16 of the packed ids, which continues the CRC-16 before it
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from binascii import crc_hqx
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from flowmo.checkpoint import files as checkpoint
from flowmo.codec import range_coder
from flowmo.codec.bits import pack_ids, packed_size, unpack_ids
from flowmo.codec.context import BitModel, ContextError, ContextModel, ids_of_bits, token_bits
from flowmo.codec.planes import PlaneModel
from flowmo.errors import FlowMoError
from flowmo.images import MAX_PIXELS, Tiling
from flowmo.tokenizer import Codes, FlowMo

MAGIC = b"FLM"
VERSION = 2
PLANES_VERSION = 3
PACKED, CONTEXT = 0, 1
IDENTITY_BYTES = 4
CONTEXT_BYTES = 2
CRC = struct.Struct("<I")
PLANE_CRC = struct.Struct("<H")
LONGEST_NUMBER = 5
SHORTEST = len(MAGIC) + 1 + IDENTITY_BYTES + 3 + CRC.size
MAX_BYTES = 1 << 28
MOST_TILED = 4
"""Times the most pixels that a picture may have, those of all its tiles or cells together may have. A line of pixels in
square tiles would be worth gigabytes of ids in a file of kilobytes."""
CELLS_PER_BYTE = 16
"""Most cells per byte of an entropy-coded plane: no short file can ask for much work."""
CONTEXT_SUFFIX = ".context.safetensors"


class CodecError(FlowMoError, ValueError):
    """A ``.flowmo`` file that is damaged or of another tokenizer; the message is one line."""


class MissingPlanes(UserWarning):
    """A file in planes ends early or is damaged; the planes before the damage give a coarser image.

    Attributes:
        planes: planes that were read.
        total: planes that the file should have.
    """

    def __init__(self, planes: int, total: int, reason: str):
        super().__init__(f"{reason}; the image is coarser, from {planes} of {total} planes")
        self.planes, self.total = planes, total


class Codec:
    """Writes and reads the pictures of one tokenizer.

    Args:
        context: a context model of the tokenizer's ids, which makes files shorter and is needed to read those that
            it made. A tokenizer of native size takes a ``PlaneModel``.

    Raises:
        CodecError: a continuous tokenizer, or a context model of another one.
        ContextError: there is a context model, and constriction is not installed.
    """

    def __init__(self, tokenizer: FlowMo, context: BitModel | PlaneModel | None = None):
        quantizer, identity = tokenizer.quantizer, tokenizer.identity()
        if quantizer.id_count is None or quantizer.sub_tokens is None:
            raise CodecError("this tokenizer is continuous and has no ids to write")
        self.context = context
        self.identity = bytes.fromhex(identity)[:IDENTITY_BYTES]
        self.tile, self.cell = tokenizer.config.data.image_size, tokenizer.config.model.patch_size
        self.id_count, self.bits = quantizer.id_count, (quantizer.id_count - 1).bit_length()
        self.tokens, self.sub_tokens = tokenizer.code_length, quantizer.sub_tokens
        self.version = PLANES_VERSION if tokenizer.native_size else VERSION
        self.variable_rate = tokenizer.variable_rate
        if context is None:
            return
        range_coder.library()
        if isinstance(context, PlaneModel) != tokenizer.native_size:
            raise CodecError("tokenizers of native size and of fixed size have different kinds of context models")
        if (context.tokenizer, context.shape) != (identity, self._shape):
            raise CodecError(f"the context model is of tokenizer {context.tokenizer}, not of this one ({identity})")

    @property
    def _shape(self) -> tuple[int, int]:
        if self.version == PLANES_VERSION:
            return self.sub_tokens, self.bits
        return self.tokens, self.sub_tokens * self.bits

    def pack(self, codes: Codes) -> bytes:
        """The bytes of a picture's codes, as ``encode_image`` returned them.

        Raises:
            CodecError: codes that are not of one picture, or of another tokenizer, or of a picture so long and thin
                that no reader takes them.
        """
        if codes.ids is None:
            raise CodecError("a continuous code has no ids to write")
        if self.version == VERSION:
            return self._pack_tiles(codes, codes.ids.cpu().numpy())
        contents = [self._pack_planes(codes, codes.ids.cpu().numpy(), None)]
        if isinstance(self.context, PlaneModel):
            contents.append(self._pack_planes(codes, codes.ids.cpu().numpy(), self.context))
        return min(contents, key=len)

    def _pack_tiles(self, codes: Codes, ids: np.ndarray) -> bytes:
        tiling = codes.tiling
        if tiling is None:
            raise CodecError("only the ids of one picture, from encode_image, can be written")
        if ids.shape != (tiling.count, self.tokens, self.sub_tokens) or codes.id_count != self.id_count:
            raise CodecError(f"ids of shape {ids.shape} below {codes.id_count} are not of this tokenizer")
        if tiling.count * tiling.tile**2 > MOST_TILED * MAX_PIXELS:
            raise CodecError(f"{tiling.count} tiles are too many for a file")
        packed = pack_ids(ids, self.bits)
        coded, coding, name = packed, PACKED, b""
        if self.context is not None and not isinstance(self.context, PlaneModel):
            string = range_coder.encode(self.context, token_bits(ids, self.bits))
            string = string.ljust(len(ids), b"\0")  # a byte a tile: no short file can ask for much work
            if len(string) + CONTEXT_BYTES < len(packed):
                coded, coding, name = string, CONTEXT, self.context.identity[:CONTEXT_BYTES]
        sizes = b"".join(number(n - 1) for n in (tiling.height, tiling.width, tiling.tile))
        head = MAGIC + bytes([VERSION | coding << 4]) + self.identity + sizes + name
        return head + coded + CRC.pack(zlib.crc32(head + packed))

    def _pack_planes(self, codes: Codes, ids: np.ndarray, context: PlaneModel | None) -> bytes:
        if len(ids) != 1:
            raise CodecError("only the ids of one picture, from encode_image, can be written")
        height, width = codes.output_size
        rows, columns = self._lattice(height, width)
        cells, planes = ids.shape[1:]
        if cells != rows * columns or planes not in self._plane_counts or codes.id_count != self.id_count:
            raise CodecError(f"ids of shape {ids.shape} below {codes.id_count} are not of this tokenizer")
        if self._too_many(cells, MAX_PIXELS):
            raise CodecError(f"{rows}×{columns} cells are too many for a file")
        coding, name = (PACKED, b"") if context is None else (CONTEXT, context.identity[:CONTEXT_BYTES])
        content = MAGIC + bytes([PLANES_VERSION | coding << 4]) + self.identity
        content += number(height - 1) + number(width - 1) + bytes([planes]) + name
        crc = crc_hqx(content, 0)
        content += PLANE_CRC.pack(crc)
        for plane in range(planes):
            packed = coded = pack_ids(ids[..., plane], self.bits)
            if context is not None:
                model = context.plane(ids[0, :, :plane].reshape(rows, columns, plane))
                string = range_coder.encode(model, token_bits(ids[..., plane : plane + 1], self.bits))
                coded = min(packed, string.ljust(least_bytes(cells), b"\0"), key=len)
                content += number(len(coded))
            crc = crc_hqx(packed, crc)
            content += coded + PLANE_CRC.pack(crc)
        return content

    @property
    def _plane_counts(self) -> range:
        """Numbers of planes that an image can have."""
        return range(1 if self.variable_rate else self.sub_tokens, self.sub_tokens + 1)

    def _lattice(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of cells."""
        return math.ceil(height / self.cell), math.ceil(width / self.cell)

    def _too_many(self, cells: int, most_pixels: int) -> bool:
        return cells > 1 and cells * self.cell**2 > MOST_TILED * most_pixels

    def unpack(
        self,
        content: bytes,
        most_pixels: int = MAX_PIXELS,
        on_missing: Callable[[MissingPlanes], object] = warnings.warn,
    ) -> Codes:
        """The codes in the bytes of a ``.flowmo`` file; every byte is accounted for before anything is allocated.

        Args:
            most_pixels: of the picture; a file that says more is refused before its ids are decoded.
            on_missing: called if the file is in planes and only the first of them are sound. The codes then have
                fewer sub-tokens.

        Raises:
            CodecError: not such a file, damaged, too large, or written by another tokenizer or with another context
                model.
            ContextError: it is entropy-coded, and constriction is not installed.
        """
        if content[:3] != MAGIC or len(content) < SHORTEST:
            raise CodecError("not a .flowmo file")
        version, coding = content[3] & 15, content[3] >> 4
        if version not in (VERSION, PLANES_VERSION) or coding not in (PACKED, CONTEXT):
            raise CodecError(
                f"version {version}, coding {coding} of the format; this flowmo reads versions {VERSION} and "
                f"{PLANES_VERSION}"
            )
        place = len(MAGIC) + 1 + IDENTITY_BYTES
        identity = content[place - IDENTITY_BYTES : place]
        if identity != self.identity:
            raise CodecError(f"written by tokenizer {identity.hex()}, not by this one ({self.identity.hex()})")
        if version != self.version:
            raise CodecError(f"damaged: version {version} where this tokenizer writes version {self.version}")
        height, place = read_number(content, place)
        width, place = read_number(content, place)
        height, width = height + 1, width + 1
        if height * width > MAX_PIXELS:
            raise CodecError(f"damaged: {height}×{width} pixels")
        if height * width > most_pixels:
            raise CodecError(f"{height}×{width} are more than {most_pixels:,} pixels, the most that is taken here")
        if version == PLANES_VERSION:
            return self._unpack_planes(content, place, height, width, most_pixels, on_missing)
        return self._unpack_tiles(content, place, height, width, most_pixels)

    def _unpack_tiles(self, content: bytes, place: int, height: int, width: int, most_pixels: int) -> Codes:
        """The rest of a file of version 2; ``place`` is behind the width."""
        tile, place = read_number(content, place)
        tile += 1
        if tile != self.tile:
            raise CodecError(f"damaged: {height}×{width} pixels in tiles of {tile}")
        tiling = Tiling(height, width, tile)
        if tiling.count > 1 and tiling.count * tile**2 > MOST_TILED * most_pixels:
            raise CodecError(f"damaged: {height}×{width} pixels in {tiling.count} tiles")
        context = None
        if content[3] >> 4 == CONTEXT:
            context = self._context(content[place : place + CONTEXT_BYTES])
            place += CONTEXT_BYTES
        assert not isinstance(context, PlaneModel)  # ``__init__`` takes none for fixed size
        head, coded = content[:place], content[place : -CRC.size]
        packed = self._packed(coded, context, tiling.count)
        if zlib.crc32(head + packed) != CRC.unpack(content[-CRC.size :])[0]:
            raise CodecError("damaged: its checksum does not fit")
        shape = (tiling.count, self.tokens, self.sub_tokens)
        ids = torch.from_numpy(unpack_ids(packed, math.prod(shape), self.bits).reshape(shape))
        if ids.max() >= self.id_count:
            raise CodecError(f"damaged: id {ids.max()} where {self.id_count - 1} is the largest")
        return Codes(ids, (tile, tile), self.id_count, tiling)

    def _unpack_planes(
        self,
        content: bytes,
        place: int,
        height: int,
        width: int,
        most_pixels: int,
        on_missing: Callable[[MissingPlanes], object],
    ) -> Codes:
        """The rest of a file of version 3; ``place`` is behind the width."""
        coded = content[3] >> 4 == CONTEXT
        total, name = content[place : place + 1], content[place + 1 : place + 1 + coded * CONTEXT_BYTES]
        place += 1 + len(name)
        crc = crc_hqx(content[:place], 0)
        place += PLANE_CRC.size
        if content[place - PLANE_CRC.size : place] != PLANE_CRC.pack(crc):
            raise CodecError("damaged: the checksum of its header does not fit")
        rows, columns = self._lattice(height, width)
        if total[0] not in self._plane_counts:
            raise CodecError(f"damaged: {total[0]} planes of a tokenizer that has {self.sub_tokens}")
        if self._too_many(rows * columns, most_pixels):
            raise CodecError(f"damaged: {height}×{width} pixels in {rows}×{columns} cells")
        context = self._context(name) if coded else None
        assert context is None or isinstance(context, PlaneModel)  # ``__init__`` takes no other for native size
        ids: np.ndarray = np.zeros((rows * columns, 0), np.int64)
        try:
            for _ in range(total[0]):
                model = None if context is None else context.plane(ids.reshape(rows, columns, ids.shape[1]))
                plane, place, crc = self._read_plane(content, place, rows * columns, crc, model)
                ids = np.concatenate((ids, plane[:, None]), axis=1)
        except CodecError as error:
            if ids.shape[1] not in self._plane_counts:
                raise
            on_missing(MissingPlanes(ids.shape[1], total[0], str(error)))
        else:
            if place != len(content):
                raise CodecError("damaged: bytes follow its last plane")
        size = (rows * self.cell, columns * self.cell)
        return Codes(torch.from_numpy(ids)[None], size, self.id_count, image_size=(height, width))

    def _read_plane(
        self, content: bytes, place: int, cells: int, crc: int, model: BitModel | None
    ) -> tuple[np.ndarray, int, int]:
        """The ids of a plane, the place behind it and its checksum; ``place`` and ``crc`` are those before it."""
        length = size = packed_size(cells, self.bits)
        if model is not None:
            length, place = read_number(content, place)
        packed, end = content[place : place + length], place + length + PLANE_CRC.size
        if length > size:
            raise CodecError("damaged: a plane is longer than its ids")
        if end > len(content):
            raise CodecError("damaged: it ends early")
        if model is not None and length < size:
            packed = self._decoded(model, packed, 1, least_bytes(cells))
        crc = crc_hqx(packed, crc)
        if content[end - PLANE_CRC.size : end] != PLANE_CRC.pack(crc):
            raise CodecError("damaged: the checksum of a plane does not fit")
        ids = unpack_ids(packed, cells, self.bits)
        if ids.max() >= self.id_count:
            raise CodecError(f"damaged: id {ids.max()} where {self.id_count - 1} is the largest")
        return ids, end, crc

    def _context(self, name: bytes) -> BitModel | PlaneModel:
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
        if len(coded) >= size:
            raise CodecError("damaged: its length is not what its header says")
        return self._decoded(context, coded, tiles, tiles)

    def _decoded(self, context: BitModel, coded: bytes, pictures: int, least: int) -> bytes:
        """The packed ids of so many pictures, out of a context model's string of ``least`` bytes or more."""
        if len(coded) < least or coded != coded.rstrip(b"\0").ljust(least, b"\0"):
            raise CodecError("damaged: its length is not what its header says")
        try:
            return pack_ids(ids_of_bits(range_coder.decode(context, coded, pictures), self.bits), self.bits)
        except ContextError as error:
            raise CodecError(f"damaged: {error}") from None


def least_bytes(cells: int) -> int:
    """Bytes that the context model's string of a plane has at least; zeros fill it up."""
    return -(-cells // CELLS_PER_BYTE)


def find_context(source: str | Path, tokenizer: FlowMo) -> ContextModel | PlaneModel | None:
    """The context model beside a tokenizer's file, ``NAME.context.safetensors`` beside ``NAME.safetensors``.

    ``None`` where there is none for this tokenizer, or constriction, which uses it, is not installed.

    Raises:
        ContextError: the file is damaged.
    """
    path = checkpoint.find(source)
    path = path.with_name(path.name.removesuffix(path.suffix) + CONTEXT_SUFFIX)
    if not path.is_file() or not range_coder.available():
        return None
    context = read_context(path, tokenizer)
    return context if context.tokenizer == tokenizer.identity() else None


def read_context(path: Path, tokenizer: FlowMo) -> ContextModel | PlaneModel:
    """The context model in a file, of the kind that the tokenizer takes.

    Raises:
        ContextError: there is none, or it is damaged or of another kind.
    """
    return PlaneModel.read(path) if tokenizer.native_size else ContextModel.read(path)


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
    digits = content[place : place + LONGEST_NUMBER]
    for i, byte in enumerate(digits):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            if byte == 0 and i:
                break
            return value, place + i + 1
    if len(digits) < LONGEST_NUMBER and all(byte > 127 for byte in digits):
        raise CodecError("damaged: it ends early")
    raise CodecError("damaged: a size in it does not end")
