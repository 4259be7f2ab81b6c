"""The ``.flowmo`` file: the ids of one image behind a short header, packed or entropy-coded.

    version 2: header, varint tile − 1, [context], ids of all tiles, CRC-32
    version 3: header, planes, [context], CRC-16, and for each plane: [varint length], ids of all cells, CRC-16
    header:    "FLM", version | coding << 4, identity of the tokenizer, varint height − 1, varint width − 1

Parts in brackets exist in entropy-coded files; context is the identity of the context model. Version 3 is for
tokenizers of native size. A plane is one sub-token of every cell; a prefix of the planes is a coarser image. Checksums
cover the packed ids, so they detect a context model that decodes to other ids. ``docs/codec.md`` specifies every byte.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from binascii import crc_hqx
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from flowmo.checkpoint import files as checkpoint
from flowmo.codec import range_coder
from flowmo.codec.context import ContextError, ContextModel, Predictor
from flowmo.codec.planes import PlaneModel
from flowmo.data.bits import pack_ids, packed_size, token_bits, token_ids, unpack_ids
from flowmo.errors import FlowMoError
from flowmo.images import MAX_PIXELS
from flowmo.model.codes import Codes
from flowmo.model.tiling import MAX_OVERHANG, Tiling
from flowmo.tokenizer import FlowMo

MAGIC = b"FLM"
VERSION, PLANES_VERSION = 2, 3
PACKED, CONTEXT = 0, 1
IDENTITY_BYTES = 4
CONTEXT_BYTES = 2
CRC = struct.Struct("<I")
PLANE_CRC = struct.Struct("<H")
VARINT_BYTES = 5
MIN_BYTES = len(MAGIC) + 1 + IDENTITY_BYTES + 3 + CRC.size
MAX_BYTES = 1 << 28
CELLS_PER_BYTE = 16
"""Upper limit of the cells per byte of a coded plane, so that a short file cannot cause much work."""
CONTEXT_SUFFIX = ".context.safetensors"
Context: TypeAlias = Any
"""A ``PlaneModel`` for a tokenizer of native size, else a ``ContextModel`` or another class with its ``tokenizer``,
``shape``, ``identity`` and ``run``."""


class CodecError(FlowMoError, ValueError):
    """A ``.flowmo`` file that cannot be written or read. The message is one line."""


def _damaged(reason: str) -> CodecError:
    return CodecError(f"The file is damaged: {reason}.")


class MissingPlanes(UserWarning):
    """A file in planes ends early or is damaged; the planes before the damage give a coarser image.

    Attributes:
        planes: number of planes that were read.
        total: number of planes in the intact file.
    """

    def __init__(self, planes: int, total: int, reason: str):
        super().__init__(f"{reason} The image is coarser, from {planes} of {total} planes.")
        self.planes, self.total = planes, total


class Codec:
    """Writes and reads the images of one tokenizer.

    Args:
        context: a context model of the tokenizer's ids. It shortens files, and reading those files needs it. A
            tokenizer of native size takes a ``PlaneModel``.

    Raises:
        CodecError: the tokenizer is continuous, or the context model belongs to another one.
        ContextError: there is a context model, but constriction is not installed.
    """

    def __init__(self, tokenizer: FlowMo, context: Context | None = None):
        quantizer, identity = tokenizer.quantizer, tokenizer.identity()
        if quantizer.id_count is None or quantizer.sub_tokens is None:
            raise CodecError("This tokenizer is continuous and has no ids to write.")
        self.identity = bytes.fromhex(identity)[:IDENTITY_BYTES]
        self.tile, self.cell = tokenizer.config.data.image_size, tokenizer.config.model.patch_size
        self.id_count, self.bits = quantizer.id_count, (quantizer.id_count - 1).bit_length()
        self.tokens, self.sub_tokens = tokenizer.code_length, quantizer.sub_tokens
        self.native = tokenizer.native_size
        self.version = PLANES_VERSION if self.native else VERSION
        fewest = 1 if self.native and tokenizer.variable_rate else self.sub_tokens
        self.plane_counts = range(fewest, self.sub_tokens + 1)
        self.context = context
        if context is None:
            return
        range_coder.library()
        shape = (self.sub_tokens, self.bits) if self.native else (self.tokens, self.sub_tokens * self.bits)
        if isinstance(context, PlaneModel) != self.native:
            raise CodecError("Tokenizers of native size and of fixed size take different kinds of context models.")
        if (context.tokenizer, context.shape) != (identity, shape):
            raise CodecError(f"The context model is of tokenizer {context.tokenizer}, not of this one ({identity}).")

    def pack(self, codes: Codes) -> bytes:
        """Serialize the codes of one image, from ``encode_image``.

        Raises:
            CodecError: the codes are not of one image or not of this tokenizer, or the image is so large, or so long
                and thin, that no reader accepts it.
        """
        if codes.ids is None:
            raise CodecError("A continuous code has no ids to write.")
        ids, size = codes.ids.cpu().numpy(), codes.output_size
        one_image = self.native or codes.tiling is not None
        fits = ids.shape[:2] == self.shape(*size) and ids.shape[2] in self.plane_counts
        if not (one_image and fits and codes.id_count == self.id_count):
            raise CodecError(
                f"Ids of shape {ids.shape} below {codes.id_count} are not of one image of this tokenizer. "
                "Take them from encode_image."
            )
        if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= self.id_count:
            raise CodecError(f"Ids must be whole numbers from 0 to {self.id_count - 1}.")
        ids = ids.astype(np.int64)
        if math.prod(size) > MAX_PIXELS or self._too_large(*size, MAX_PIXELS):
            raise CodecError(f"An image of {size[0]}×{size[1]} pixels is too large for a file, or too thin.")
        write = self._pack_planes if self.native else self._pack_tiles
        models = [None] if self.context is None else [None, self.context]  # packed wins a tie
        return min((write(size, ids, model) for model in models), key=len)

    def _header(self, context: Context | None, size: tuple[int, int], layout_fields: bytes) -> bytes:
        coding, context_id = (PACKED, b"") if context is None else (CONTEXT, context.identity[:CONTEXT_BYTES])
        start = MAGIC + bytes([self.version | coding << 4]) + self.identity
        return start + varint(size[0] - 1) + varint(size[1] - 1) + layout_fields + context_id

    def _pack_tiles(self, size: tuple[int, int], ids: np.ndarray, context: Context | None) -> bytes:
        header, packed = self._header(context, size, varint(self.tile - 1)), pack_ids(ids, self.bits)
        # at least 1 byte per tile bounds the decoding work
        content = packed if context is None else self._encode(context.run, ids, len(ids))
        return header + content + CRC.pack(zlib.crc32(header + packed))

    def _pack_planes(self, size: tuple[int, int], ids: np.ndarray, context: Context | None) -> bytes:
        cells, planes = ids.shape[1:]
        content = self._header(context, size, bytes([planes]))
        crc = crc_hqx(content, 0)
        content += PLANE_CRC.pack(crc)
        for plane in range(planes):
            packed = coded = pack_ids(ids[..., plane], self.bits)
            if context is not None:
                model = context.plane(ids[0, :, :plane].reshape(*self._lattice(*size), plane))
                coded = min(packed, self._encode(model, ids[..., plane : plane + 1], min_bytes(cells)), key=len)
                content += varint(len(coded))
            crc = crc_hqx(packed, crc)
            content += coded + PLANE_CRC.pack(crc)
        return content

    def _encode(self, model: Predictor, ids: np.ndarray, min_length: int) -> bytes:
        return range_coder.encode(model, token_bits(ids, self.bits)).ljust(min_length, b"\0")

    def _lattice(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of cells."""
        return math.ceil(height / self.cell), math.ceil(width / self.cell)

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Tiles and tokens per tile; at native size one tile, whose tokens are the cells."""
        if self.native:
            return 1, math.prod(self._lattice(height, width))
        return Tiling(height, width, self.tile).count, self.tokens

    def _too_large(self, height: int, width: int, max_pixels: int) -> bool:
        """True if the tiles or cells cover too many pixels."""
        tiles, cells = self.shape(height, width)
        count, side = (cells, self.cell) if self.native else (tiles, self.tile)
        return count > 1 and count * side**2 > MAX_OVERHANG * max_pixels

    def unpack(
        self,
        content: bytes,
        max_pixels: int = MAX_PIXELS,
        on_missing: Callable[[MissingPlanes], object] = warnings.warn,
    ) -> Codes:
        """Parse the bytes of a ``.flowmo`` file. Sizes are checked before anything is allocated.

        Args:
            max_pixels: refuse a larger image before its ids are decoded.
            on_missing: callback if only the first planes of a file are intact. The codes then have fewer sub-tokens.

        Raises:
            CodecError: not such a file, damaged, too large, or from another tokenizer or context model.
            ContextError: the file is entropy-coded, but constriction is not installed.
        """
        content = bytes(content)
        if content[:3] != MAGIC:
            raise CodecError("This is not a .flowmo file.")
        if len(content) < MIN_BYTES:
            raise _damaged("it ends early")
        reader, version, coding = Reader(content, len(MAGIC) + 1), content[3] & 15, content[3] >> 4
        if version not in (VERSION, PLANES_VERSION) or coding not in (PACKED, CONTEXT):
            raise CodecError(
                f"The file has version {version}, coding {coding}. This flowmo reads versions {VERSION} and "
                f"{PLANES_VERSION}."
            )
        identity = reader.take(IDENTITY_BYTES)
        if identity != self.identity:
            raise CodecError(
                f"The file is written by tokenizer {identity.hex()}, not by this one ({self.identity.hex()}). "
                "Load the model that wrote it (--model)."
            )
        if version != self.version:
            raise _damaged(f"version {version} where this tokenizer writes version {self.version}")
        height, width = reader.varint() + 1, reader.varint() + 1
        max_pixels = min(max_pixels, MAX_PIXELS)
        if height * width > max_pixels:
            raise CodecError(f"The image has {height}×{width} pixels, more than {max_pixels:,}, the limit here.")
        if self._too_large(height, width, max_pixels):
            raise _damaged(f"{height}×{width} pixels need too many tiles or cells")
        planes = reader.take(1)[0] if self.native else self.sub_tokens
        tile = self.tile if self.native else reader.varint() + 1
        if planes not in self.plane_counts or tile != self.tile:
            raise _damaged(f"{planes} planes, or tiles of {tile} pixels, are not of this tokenizer")
        context_id = reader.take(CONTEXT_BYTES) if coding == CONTEXT else None
        if self.native:
            return self._unpack_planes(reader, context_id, (height, width), planes, on_missing)
        return self._unpack_tiles(reader, context_id, (height, width))

    def _unpack_tiles(self, reader: Reader, context_id: bytes | None, size: tuple[int, int]) -> Codes:
        context, header = self._context(context_id), reader.content[: reader.position]
        predict = None if context is None else context.run
        content = reader.take(len(reader.content) - reader.position - CRC.size)
        shape = (*self.shape(*size), self.sub_tokens)
        packed = self._decode(predict, content, math.prod(shape), shape[0], shape[0])
        if reader.take(CRC.size) != CRC.pack(zlib.crc32(header + packed)):
            raise _damaged("its checksum does not match")
        ids = torch.from_numpy(self._unpack_ids(packed, math.prod(shape)).reshape(shape))
        return Codes(ids, (self.tile, self.tile), self.id_count, Tiling(*size, self.tile))

    def _unpack_planes(
        self,
        reader: Reader,
        context_id: bytes | None,
        size: tuple[int, int],
        planes: int,
        on_missing: Callable[[MissingPlanes], object],
    ) -> Codes:
        crc = crc_hqx(reader.content[: reader.position], 0)
        if reader.take(PLANE_CRC.size) != PLANE_CRC.pack(crc):
            raise _damaged("the checksum of its header does not match")
        context, (rows, columns) = self._context(context_id), self._lattice(*size)
        ids: np.ndarray = np.zeros((rows, columns, 0), np.int64)
        try:
            for _ in range(planes):
                model = None if context is None else context.plane(ids)
                plane, crc = self._read_plane(reader, rows * columns, crc, model)
                ids = np.concatenate((ids, plane.reshape(rows, columns, 1)), axis=2)
        except CodecError as error:
            if ids.shape[2] not in self.plane_counts:
                raise
            on_missing(MissingPlanes(ids.shape[2], planes, str(error)))
        else:
            if reader.position != len(reader.content):
                raise _damaged("bytes follow its last plane")
        flat = torch.from_numpy(ids.reshape(1, rows * columns, -1))
        return Codes(flat, (rows * self.cell, columns * self.cell), self.id_count, image_size=size)

    def _read_plane(self, reader: Reader, cells: int, crc: int, model: Predictor | None) -> tuple[np.ndarray, int]:
        """Return a plane's ids and its checksum. ``crc``: the checksum before it."""
        size = packed_size(cells, self.bits)
        length = size if model is None else reader.varint()
        content, stored = reader.take(length), reader.take(PLANE_CRC.size)
        packed = self._decode(None if length == size else model, content, cells, 1, min_bytes(cells))
        crc = crc_hqx(packed, crc)
        if stored != PLANE_CRC.pack(crc):
            raise _damaged("the checksum of a plane does not match")
        return self._unpack_ids(packed, cells), crc

    def _context(self, context_id: bytes | None) -> Context | None:
        """Return the context model if it has this identity; ``None`` for a packed file."""
        if context_id is None:
            return None
        range_coder.library()
        held = self.context.identity[:CONTEXT_BYTES] if self.context else b""
        if context_id != held:
            available = f"not the available one ({held.hex()})" if held else "which is not available"
            advice = "Name its file (--context)."
            raise CodecError(f"The file needs context model {context_id.hex()}, {available}. {advice}")
        return self.context

    def _decode(self, model: Predictor | None, content: bytes, count: int, streams: int, min_length: int) -> bytes:
        """Decode ``count`` ids of ``streams`` tiles, or of one plane, to packed ids. Zeros pad to ``min_length``."""
        size = packed_size(count, self.bits)
        if not (len(content) == size if model is None else min_length <= len(content) < size):
            raise _damaged("its length does not match its header")
        if model is None:
            return content
        if content != content.rstrip(b"\0").ljust(min_length, b"\0"):
            raise _damaged("zeros follow its coded ids")
        try:
            return pack_ids(token_ids(range_coder.decode(model, content, streams), self.bits), self.bits)
        except ContextError:
            raise _damaged("its context model cannot decode it") from None

    def _unpack_ids(self, packed: bytes, count: int) -> np.ndarray:
        ids = unpack_ids(packed, count, self.bits)
        if ids.max() >= self.id_count:
            raise _damaged(f"it has id {ids.max()} where {self.id_count - 1} is the largest")
        return ids


def min_bytes(cells: int) -> int:
    """Minimum length of a coded plane; zeros pad shorter strings."""
    return -(-cells // CELLS_PER_BYTE)


def find_context(source: str | Path, tokenizer: FlowMo) -> ContextModel | PlaneModel | None:
    """Read the context model beside a tokenizer's file, ``NAME.context.safetensors`` beside ``NAME.safetensors``.

    Returns ``None`` if there is none for this tokenizer, or if constriction is not installed.

    Raises:
        ContextError: the file is damaged.
    """
    return context_beside(source, tokenizer) if range_coder.available() else None


def context_beside(source: str | Path, tokenizer: FlowMo) -> ContextModel | PlaneModel | None:
    """``find_context`` for copying the model, which needs no constriction."""
    path = context_path(checkpoint.find(source))
    context = read_context(path, tokenizer) if path.is_file() else None
    return context if context is not None and context.tokenizer == tokenizer.identity() else None


def context_path(weights: Path) -> Path:
    """Return the path of the context model of a tokenizer's file."""
    return weights.with_name(weights.name.removesuffix(weights.suffix) + CONTEXT_SUFFIX)


def read_context(path: Path, tokenizer: FlowMo) -> ContextModel | PlaneModel:
    """Read a context model of the kind that the tokenizer takes. Raises ``ContextError``."""
    return PlaneModel.read(path) if tokenizer.native_size else ContextModel.read(path)


class Reader:
    """A position in the bytes of a file. Reading past the end raises ``CodecError``."""

    def __init__(self, content: bytes, position: int):
        self.content, self.position = content, position

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.content) - self.position:
            raise _damaged("it ends early")
        self.position += count
        return self.content[self.position - count : self.position]

    def varint(self) -> int:
        """Read a number. One that is longer than necessary counts as damaged."""
        value = 0
        for i in range(VARINT_BYTES):
            byte = self.take(1)[0]
            value |= (byte & 127) << 7 * i
            if byte < 128:
                if byte or not i:
                    return value
                break
        raise _damaged("a number in it does not end or is longer than necessary")


def varint(value: int) -> bytes:
    """Encode a number in at most ``VARINT_BYTES`` bytes."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
