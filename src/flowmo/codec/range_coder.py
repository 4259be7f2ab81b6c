"""Bits to bytes and back under a ``BitModel``, through constriction's range coder (Bamler 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from flowmo.codec.context import ONE, BitModel, Bits, ContextError

WORD = 4
"""Bytes of the coder's words."""


def library() -> ModuleType:
    """constriction's stream codes.

    Raises:
        ContextError: it is not installed.
    """
    try:
        import constriction
    except ImportError:
        raise ContextError("entropy coding needs constriction: pip install 'flowmo[codec]'") from None
    return constriction.stream


def available() -> bool:
    """Whether the range coder is installed."""
    try:
        library()
    except ContextError:
        return False
    return True


def encode(model: BitModel, bits: Bits) -> bytes:
    """The bits of some pictures, n × tokens × bits of a token, as one string."""
    coded: list[tuple[Bits, np.ndarray]] = []

    def look_up(token: Any, bit: int, p: np.ndarray) -> Bits:
        coded.append((bits[:, token, bit], p))
        return bits[:, token, bit]

    model.run(len(bits), look_up)
    return _string(coded)


def _string(coded: Sequence[tuple[Bits, np.ndarray]]) -> bytes:
    """Of bits and their probabilities · ``ONE``, in the order of coding."""
    stream = library()
    encoder = stream.queue.RangeEncoder()
    symbols, p = (np.concatenate([part.ravel() for part in column]) for column in zip(*coded, strict=True))
    # The division is exact, by a power of 2.
    encoder.encode(symbols.astype(np.int32), stream.model.Bernoulli(perfect=False), p / ONE)
    # The first byte counts most; zeros at the end are what the decoder reads there anyway.
    return encoder.get_compressed().astype(">u4").tobytes().rstrip(b"\0")


def decode(model: BitModel, content: bytes, pictures: int) -> Bits:
    """The inverse of ``encode``, whose strings may be followed by zeros; another string gives other bits.

    Raises:
        ContextError: the string cannot come from ``encode``: each group of bits has one that does.
    """
    stream = library()
    words = np.frombuffer(content + bytes(-len(content) % WORD), ">u4").astype(np.uint32)
    decoder, family = stream.queue.RangeDecoder(words), stream.model.Bernoulli(perfect=False)

    coded: list[tuple[Bits, np.ndarray]] = []

    def next_bits(token: Any, bit: int, p: np.ndarray) -> Bits:
        coded.append((decoder.decode(family, p.ravel() / ONE).astype(np.int8).reshape(p.shape), p))
        return coded[-1][0]

    try:
        bits = model.run(pictures, next_bits)
    except AssertionError:  # constriction's word for data that its model cannot have made
        raise ContextError("no string of this context model") from None
    if _string(coded) != content.rstrip(b"\0"):
        raise ContextError("no string of this context model")
    return bits
