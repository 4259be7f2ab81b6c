"""Ids as bits: packed without a gap, lowest bit first."""

from __future__ import annotations

import numpy as np


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` ids of ``bits`` bits."""
    return (count * bits + 7) // 8


def pack_ids(ids: np.ndarray, bits: int) -> bytes:
    """Ids of any shape, each in [0, 2^bits), in C order; the last byte is filled up with zeros."""
    spread = (ids.reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(spread.astype(np.uint8), bitorder="little").tobytes()


def unpack_ids(content: bytes | memoryview, count: int, bits: int) -> np.ndarray:
    """The first ``count`` ids of ``packed_size(count, bits)`` bytes or more: int64."""
    flat = np.frombuffer(content, np.uint8, count=packed_size(count, bits))
    spread = np.unpackbits(flat, count=count * bits, bitorder="little").reshape(count, bits)
    return (spread.astype(np.int64) << np.arange(bits)).sum(axis=-1)
