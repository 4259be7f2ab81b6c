"""Bits to bytes and back under a ``ContextModel``, through constriction's range coder (Bamler 2022)."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from flowmo.coding.context import ONE, Bits, ContextError, ContextModel

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


def encode(model: ContextModel, bits: Bits) -> bytes:
    """The bits of some pictures, n × tokens × bits of a token, as one string."""
    return _string(bits.transpose(1, 2, 0), model.probabilities(bits))


def _string(bits: np.ndarray, p: np.ndarray) -> bytes:
    """Of bits and their probabilities · ``ONE``, both in the order of coding."""
    stream = library()
    encoder = stream.queue.RangeEncoder()
    symbols = np.ascontiguousarray(bits, np.int32).ravel()
    encoder.encode(symbols, stream.model.Bernoulli(perfect=False), p.ravel() / ONE)  # exact: 16 binary digits
    # The first byte counts most; zeros at the end are what the decoder reads there anyway.
    return encoder.get_compressed().astype(">u4").tobytes().rstrip(b"\0")


def decode(model: ContextModel, content: bytes, pictures: int) -> Bits:
    """The inverse of ``encode``, whose strings may be followed by zeros; another string gives other bits.

    Raises:
        ContextError: the string cannot come from ``encode``: each group of bits has one that does.
    """
    stream = library()
    words = np.frombuffer(content + bytes(-len(content) % WORD), ">u4").astype(np.uint32)
    decoder, family = stream.queue.RangeDecoder(words), stream.model.Bernoulli(perfect=False)

    asked: list[np.ndarray] = []

    def next_bits(token: int, bit: int, p: np.ndarray) -> Bits:
        asked.append(p)
        return decoder.decode(family, p / ONE).astype(np.int8)

    try:
        bits = model.run(pictures, next_bits)
    except AssertionError:  # constriction's word for data that its model cannot have made
        raise ContextError("no string of this context model") from None
    if _string(bits.transpose(1, 2, 0), np.stack(asked)) != content.rstrip(b"\0"):
        raise ContextError("no string of this context model")
    return bits
