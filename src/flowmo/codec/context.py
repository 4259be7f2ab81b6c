"""Context models: the probability of each bit of an image's ids given the bits before it, in integer arithmetic.

Encoder and decoder must compute identical probabilities on any machine. So weights, activations and the table of the
logistic function are fixed-point integers.
"""

from __future__ import annotations

import decimal
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flowmo.data.bits import Bits
from flowmo.errors import FlowMoError, one_line
from flowmo.model.transformer import code_lattice

FRACTION = 8
"""Fractional bits of weights, activations and logits."""
LARGEST_LOGIT = 10
LIMIT = 1 << 15
"""Bound of weights, 16-bit integers, and of the offsets to neighbours."""
ONE = 1 << 16
"""A probability is k / ``ONE`` with 0 < k < ``ONE``."""
NEIGHBOURS = {
    "lattice": ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-1, -2), (-1, 2), (-2, -1), (-2, 1)),
    "diagonal": ((0, -1), (0, -2), (0, -3), (0, -4)),
}
"""Offsets (rows, columns) to the tokens that predict a token, by ``model.code_layout``."""
IDENTITY_BYTES = 4

BitCoder = Callable[[Any, int, np.ndarray], Bits]
"""Codes one bit of one token in every image. Called with the token, the bit's index and P(bit = 1) · ``ONE`` per image;
returns the bits. The token may be an array of n tokens; probabilities and bits are then images × n."""
Predictor = Callable[[int, BitCoder], Bits]
"""Passes every bit of n images through the ``BitCoder`` in coding order, and returns the bits."""


class ContextError(FlowMoError, ValueError):
    """A context model that cannot be read or used. The message is one line."""


@cache
def logistic_table() -> np.ndarray:
    """σ(l) · ``ONE`` for every fixed-point logit l in [−``LARGEST_LOGIT``, ``LARGEST_LOGIT``].

    Decimal arithmetic rounds the exponential correctly, so the table is the same on every machine.
    """
    with decimal.localcontext(prec=30):
        step, largest = decimal.Decimal(1) / (1 << FRACTION), LARGEST_LOGIT << FRACTION
        exact = [ONE / (1 + (-i * step).exp()) for i in range(-largest, largest + 1)]
    return np.array([min(max(int(p.to_integral_value()), 1), ONE - 1) for p in exact], dtype=np.int64)


def probability(logits: np.ndarray) -> np.ndarray:
    """σ(logits) · ``ONE`` of fixed-point logits, clipped to ``LARGEST_LOGIT``."""
    largest = LARGEST_LOGIT << FRACTION
    return logistic_table()[np.clip(logits, -largest, largest) + largest]


def neighbour_indices(rows: int, columns: int, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Indices of the neighbours of every point of a lattice: points × K. Outside the lattice, rows · columns."""
    row, column = np.indices((rows, columns)).reshape(2, -1, 1)
    down, right = np.array(offsets, np.int64).reshape(-1, 2).T
    row, column = row + down, column + right
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return np.where(inside, row * columns + column, rows * columns)


@dataclass(frozen=True, eq=False)
class IntegerModel:
    """Base of the integer context models. All fields after the first two are arrays of 16-bit integers.

    Attributes:
        tokenizer: the tokenizer's identity, 16 hex digits.
        neighbours: offsets (rows, columns) from a token to those that predict it.
    """

    FORMAT: ClassVar[str]

    tokenizer: str
    neighbours: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        for name, shape in self._shapes().items():
            if getattr(self, name).shape != shape:
                raise ContextError(f"The array {name} has shape {getattr(self, name).shape}, not {shape}.")
        # 16-bit weights keep every sum within 64 bits
        if any(a.min(initial=0) <= -LIMIT or a.max(initial=0) >= LIMIT for a in self.arrays.values()):
            raise ContextError("The weights exceed 16 bits.")
        if any(abs(offset) >= LIMIT for pair in self.neighbours for offset in pair):
            raise ContextError("A neighbour is too far away.")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Required shapes, as far as they follow from other arrays."""
        raise NotImplementedError

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)[2:]}

    @cached_property
    def identity(self) -> bytes:
        header = repr((self.FORMAT, self.tokenizer, self.neighbours)).encode()
        digest = hashlib.blake2b(header, digest_size=IDENTITY_BYTES)
        for array in self.arrays.values():
            digest.update(np.ascontiguousarray(array, "<i2").tobytes())
        return digest.digest()

    def save(self) -> bytes:
        """Serialize to int16 safetensors for ``read``."""
        metadata = {"flowmo_context": self.FORMAT, "tokenizer": self.tokenizer}
        metadata["neighbours"] = json.dumps(self.neighbours)
        return save({name: np.asarray(array, np.int16) for name, array in self.arrays.items()}, metadata)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a model from a file.

        Raises:
            ContextError: the file is missing, damaged or holds another kind of model.
        """
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                if metadata.get("flowmo_context") != cls.FORMAT:
                    raise ContextError("This is not a context model for this kind of tokenizer.")
                arrays = {field.name: file.get_tensor(field.name) for field in fields(cls)[2:]}
            if any(array.dtype != np.int16 for array in arrays.values()):
                raise ContextError("Its arrays are not 16-bit integers.")
            arrays = {name: array.astype(np.int64) for name, array in arrays.items()}
            neighbours = tuple((int(row), int(column)) for row, column in json.loads(metadata["neighbours"]))
            return cls(metadata["tokenizer"], neighbours, **arrays)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ContextError(f"{path}: {one_line(error)}") from None


@dataclass(frozen=True, eq=False)
class ContextModel(IntegerModel):
    """Predicts the bits of fixed-size codes: T tokens of B bits, K neighbours, H hidden units.

    A small autoregressive network (NADE, Uria et al. 2016) sees the bits of some tokens to the left and above on
    ``code_lattice``, and the token's own earlier bits. With K = H = 0 it is a table of bit frequencies.

    Attributes:
        bias: T × B, logits.
        place: T × H, position embedding added to the hidden units.
        hidden: K·B × H, from the neighbours' bits (−1 or 1, and 0 outside the lattice) to the hidden units.
        own: B × H, from the token's own bits, once known, to the hidden units.
        readout: B × H, from the hidden units after ReLU to logits.
        direct: K·B × B, from the neighbours' bits to logits.
        earlier: B × B, from the token's earlier bits to logits; zero on and above the diagonal.
    """

    FORMAT = "1"

    bias: np.ndarray
    place: np.ndarray
    hidden: np.ndarray
    own: np.ndarray
    readout: np.ndarray
    direct: np.ndarray
    earlier: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        if any((row, column) >= (0, 0) for row, column in self.neighbours):
            raise ContextError(f"The neighbours {self.neighbours} are not all coded before a token.")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return context_shapes(*self.shape, len(self.neighbours), self.place.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return self.bias.shape

    def run(self, images: int, code: BitCoder) -> Bits:
        tokens, bits = self.shape
        known: Bits = np.zeros((images, tokens, bits), np.int8)
        signs: np.ndarray = np.zeros((images, tokens + 1, bits), np.int64)  # the last row stays 0
        for token, around in enumerate(neighbour_indices(*code_lattice(tokens), self.neighbours)):
            inputs = signs[:, around].reshape(images, -1)
            hidden = self.place[token] + inputs @ self.hidden
            direct = self.bias[token] + inputs @ self.direct
            own = signs[:, token]
            for bit in range(bits):
                logit = direct[:, bit] + own @ self.earlier[bit]
                logit += (np.maximum(hidden, 0) @ self.readout[bit]) >> FRACTION
                chosen = code(token, bit, probability(logit))
                known[:, token, bit] = chosen
                own[:, bit] = 2 * chosen.astype(np.int64) - 1
                hidden += own[:, bit, None] * self.own[bit]
        return known


def context_shapes(tokens: int, bits: int, neighbours: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a ``ContextModel``, in the order of its fields."""
    near = neighbours * bits
    return {
        "bias": (tokens, bits),
        "place": (tokens, hidden),
        "hidden": (near, hidden),
        "own": (bits, hidden),
        "readout": (bits, hidden),
        "direct": (near, bits),
        "earlier": (bits, bits),
    }
