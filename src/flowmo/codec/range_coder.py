"""Bits to bytes and back under a context model, by constriction's range coder (Bamler 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

from flowmo.codec.context import ONE, ContextError, Predictor
from flowmo.data.bits import Bits

WORD_BYTES = 4


def library() -> ModuleType:
    """Return constriction's stream codes. Raises ``ContextError`` if it is not installed."""
    try:
        import constriction
    except ImportError:
        raise ContextError("Entropy coding needs constriction. Run pip install 'flowmo[codec]'.") from None
    return constriction.stream


def available() -> bool:
    """True if constriction is installed."""
    return find_spec("constriction") is not None


def encode(predict: Predictor, bits: Bits) -> bytes:
    """Encode the bits of some images, n × tokens × bits per token, as one string."""
    coded: list[tuple[Bits, np.ndarray]] = []

    def look_up(token: Any, bit: int, p: np.ndarray) -> Bits:
        coded.append((bits[:, token, bit], p))
        return coded[-1][0]

    predict(len(bits), look_up)
    return _encode(coded)


def _encode(coded: Sequence[tuple[Bits, np.ndarray]]) -> bytes:
    """Encode (bits, probabilities · ``ONE``) in coding order."""
    stream = library()
    encoder = stream.queue.RangeEncoder()
    symbols, p = (np.concatenate([part.ravel() for part in column]) for column in zip(*coded, strict=True))
    # division by a power of two is exact
    encoder.encode(symbols.astype(np.int32), stream.model.Bernoulli(perfect=False), p / ONE)
    # big-endian words; the decoder reads missing bytes as zeros
    return encoder.get_compressed().astype(">u4").tobytes().rstrip(b"\0")


def decode(predict: Predictor, content: bytes, images: int) -> Bits:
    """Invert ``encode``. Zeros may follow the string.

    Raises:
        ContextError: ``encode`` never writes this string.
    """
    stream = library()
    words = np.frombuffer(content + bytes(-len(content) % WORD_BYTES), ">u4").astype(np.uint32)
    decoder, family = stream.queue.RangeDecoder(words), stream.model.Bernoulli(perfect=False)
    coded: list[tuple[Bits, np.ndarray]] = []

    def next_bits(token: Any, bit: int, p: np.ndarray) -> Bits:
        coded.append((decoder.decode(family, p.ravel() / ONE).astype(np.int8).reshape(p.shape), p))
        return coded[-1][0]

    try:
        bits = predict(images, next_bits)
    except AssertionError:  # constriction's error for impossible data
        bits = None
    if bits is None or _encode(coded) != content.rstrip(b"\0"):  # each group of bits has one string
        raise ContextError("The string was not written with this context model.")
    return bits
