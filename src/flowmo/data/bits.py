"""Ids as bits, lowest bit first."""

from typing import TypeAlias

import numpy as np

Bits: TypeAlias = np.ndarray
"""0 or 1, int8: images × tokens × bits per token."""


def _split(ids: np.ndarray, id_bits: int) -> np.ndarray:
    return ((ids[..., None] >> np.arange(id_bits)) & 1).astype(np.int8)


def _join(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.int64) << np.arange(bits.shape[-1])).sum(axis=-1)


def token_bits(ids: np.ndarray, id_bits: int) -> Bits:
    """Ids, images × tokens × sub-tokens -> bits, images × tokens × (sub-tokens · id_bits)."""
    return _split(ids, id_bits).reshape(*ids.shape[:2], -1)


def token_ids(bits: Bits, id_bits: int) -> np.ndarray:
    """Invert ``token_bits``: int64."""
    return _join(bits.reshape(*bits.shape[:2], -1, id_bits))


def packed_size(count: int, id_bits: int) -> int:
    """Return the number of bytes of ``count`` packed ids."""
    return (count * id_bits + 7) // 8


def pack_ids(ids: np.ndarray, id_bits: int) -> bytes:
    """Pack ids of any shape, each in [0, 2^id_bits), in C order. Zeros fill the last byte."""
    return np.packbits(_split(ids, id_bits), bitorder="little").tobytes()


def unpack_ids(content: bytes | np.ndarray, count: int, id_bits: int) -> np.ndarray:
    """Unpack the first ``count`` ids of ``packed_size(count, id_bits)`` or more bytes: int64."""
    packed = np.frombuffer(content, np.uint8, count=packed_size(count, id_bits))
    return _join(np.unpackbits(packed, count=count * id_bits, bitorder="little").reshape(count, id_bits))
