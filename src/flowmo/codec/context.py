"""Context models: the probability of every bit of a picture's ids from the bits before it, in integers alone.

The ids of a picture are coded bit by bit, token after token on the lattice of ``transformer.code_lattice``. A small
autoregressive network (NADE, Uria et al. 2016) sees the bits of some tokens to the left and above and those of the
token itself that are known already. Without any of these it is a table of frequencies, one for each bit of each token.

Both ends of a file must find the same probabilities to the last digit, whatever machine they run on. Weights and
activations are therefore fixed-point integers, and so is the table that stands for the logistic function.
"""

from __future__ import annotations

import decimal
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flowmo.errors import FlowMoError
from flowmo.model.transformer import code_lattice

FRACTION = 8
"""Binary digits behind the point of weights, activations and logits."""
LARGEST_LOGIT = 10
ONE = 1 << 16
"""Probabilities are k / ``ONE`` with 0 < k < ``ONE``."""
NEIGHBOURS = {
    "lattice": ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-1, -2), (-1, 2), (-2, -1), (-2, 1)),
    "diagonal": ((0, -1), (0, -2), (0, -3), (0, -4)),
}
"""Tokens that a token's bits are predicted from, as rows and columns away, by ``model.code_layout``."""
IDENTITY_BYTES = 4

Bits: TypeAlias = np.ndarray
"""0 or 1, int8: pictures × tokens × bits of a token."""


BitCoder = Callable[[Any, int, np.ndarray], Bits]
"""Called with a token, a bit of it, and the probabilities · ``ONE`` that this bit is set in each picture; codes the
bits and returns them. Instead of one token there may be an array of n; probabilities and bits are then pictures × n."""


class ContextError(FlowMoError, ValueError):
    """A file that is no context model, or one of other ids; the message is one line."""


def token_bits(ids: np.ndarray, id_bits: int) -> Bits:
    """The bits of ids n × tokens × sub-tokens, lowest first: n × tokens × (sub-tokens · id_bits)."""
    spread = (ids[..., None] >> np.arange(id_bits)) & 1
    return spread.reshape(*ids.shape[:2], -1).astype(np.int8)


def ids_of_bits(bits: Bits, id_bits: int) -> np.ndarray:
    """The inverse of ``token_bits``, int64."""
    spread: np.ndarray = bits.reshape(*bits.shape[:2], -1, id_bits).astype(np.int64)
    return (spread << np.arange(id_bits)).sum(axis=-1)


@cache
def logistic_table() -> np.ndarray:
    """σ(l) · ``ONE`` for every logit l in fixed point from −``LARGEST_LOGIT`` to it.

    By decimal arithmetic, whose exponential is rounded correctly by definition and so the same everywhere.
    """
    with decimal.localcontext(prec=30):
        step, largest = decimal.Decimal(1) / (1 << FRACTION), LARGEST_LOGIT << FRACTION
        exact = [ONE / (1 + (-i * step).exp()) for i in range(-largest, largest + 1)]
    return np.array([min(max(int(p.to_integral_value()), 1), ONE - 1) for p in exact], dtype=np.int64)


class BitModel(Protocol):
    """What says how likely the bits of a tokenizer's ids are.

    Attributes:
        tokenizer: identity of the tokenizer, 16 hex digits.
        shape: tokens of a picture, and bits of a token.
        identity: names the model in files that need it.
    """

    @property
    def tokenizer(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def identity(self) -> bytes: ...

    def run(self, pictures: int, code: BitCoder) -> Bits:
        """All bits of some pictures, each through ``code``, in the order of coding."""


def cost(model: BitModel, bits: Bits) -> np.ndarray:
    """Bits that coding takes, for every picture: float64 n."""
    total = np.zeros(len(bits))

    def look_up(token: Any, bit: int, p: np.ndarray) -> Bits:
        chosen = bits[:, token, bit]
        surprise = -np.log2(np.where(chosen == 1, p, ONE - p) / ONE)
        np.add(total, surprise.reshape(len(bits), -1).sum(axis=1), out=total)
        return chosen

    model.run(len(bits), look_up)
    return total


@dataclass(frozen=True, eq=False)
class IntegerModel:
    """What all context models share: a name and a file. Fields after the first two are arrays of 16-bit integers.

    Attributes:
        tokenizer: identity of the tokenizer, 16 hex digits.
        neighbours: rows and columns from a token to those it is predicted from.
    """

    FORMAT: ClassVar[str]

    tokenizer: str
    neighbours: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        for name, shape in self._shapes().items():
            if getattr(self, name).shape != shape:
                raise ContextError(f"{name} has shape {getattr(self, name).shape}, not {shape}")
        # Of 16 bits, as they are stored, no sum in a model can leave 64.
        if any(np.abs(array).max(initial=0) >= 1 << 15 for array in self.arrays.values()):
            raise ContextError("weights of more than 16 bits")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes that the arrays must have, by name, as far as they follow from others."""
        raise NotImplementedError

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)[2:]}

    @cached_property
    def identity(self) -> bytes:
        """Names the model in files that need it."""
        digest = hashlib.blake2b(
            repr((self.FORMAT, self.tokenizer, self.neighbours)).encode(), digest_size=IDENTITY_BYTES
        )
        for array in self.arrays.values():
            digest.update(np.ascontiguousarray(array, "<i2").tobytes())
        return digest.digest()

    def save(self) -> bytes:
        """The content of a file that ``read`` takes: safetensors of int16."""
        arrays = {name: np.asarray(array, np.int16) for name, array in self.arrays.items()}
        facts = {"flowmo_context": self.FORMAT, "tokenizer": self.tokenizer, "neighbours": json.dumps(self.neighbours)}
        return save(arrays, facts)

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a file.

        Raises:
            ContextError: there is none, or it holds no context model of this kind.
        """
        try:
            with safe_open(path, "np") as file:
                facts = file.metadata() or {}
                if facts.get("flowmo_context") != cls.FORMAT:
                    raise ContextError("not a context model of this kind of tokenizer and this version of flowmo")
                arrays = {field.name: file.get_tensor(field.name).astype(np.int64) for field in fields(cls)[2:]}
            neighbours = tuple((int(row), int(column)) for row, column in json.loads(facts["neighbours"]))
            return cls(facts["tokenizer"], neighbours, **arrays)
        except (OSError, SafetensorError, ContextError, KeyError, TypeError, ValueError, IndexError) as error:
            raise ContextError(f"{path}: {' '.join(str(error).split())[:200]}") from None


@dataclass(frozen=True, eq=False)
class ContextModel(IntegerModel):
    """A ``BitModel``: probabilities of the bits of a tokenizer's ids. T tokens of B bits, K neighbours, H hidden units.

    All arrays are integers, those of the network with ``FRACTION`` binary digits behind the point. K and H are 0 for
    plain frequencies.

    Attributes:
        bias: T × B, logits.
        place: T × H, what a token's place adds to the hidden units.
        hidden: K·B × H, what the neighbours' bits, −1 or 1 and 0 outside the lattice, add.
        own: B × H, what the token's own bits add once they are known.
        readout: B × H, from the hidden units, negative ones cut off, to logits.
        direct: K·B × B, from the neighbours' bits to logits.
        earlier: B × B, from the token's own earlier bits to logits; zero on and above the diagonal.
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
            raise ContextError(f"neighbours {self.neighbours} are not all coded before a token")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        (t, b), h, k = self.bias.shape, self.place.shape[1], len(self.neighbours)
        shapes = {"place": (t, h), "hidden": (k * b, h), "own": (b, h), "readout": (b, h)}
        return shapes | {"direct": (k * b, b), "earlier": (b, b)}

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens of a picture, and bits of a token."""
        return self.bias.shape

    def run(self, pictures: int, code: BitCoder) -> Bits:
        """All bits of some pictures, each through ``code``, in the order of coding."""
        tokens, bits = self.shape
        rows, columns = code_lattice(tokens)
        table, largest = logistic_table(), LARGEST_LOGIT << FRACTION
        known: Bits = np.zeros((pictures, tokens, bits), np.int8)
        signs: np.ndarray = np.zeros((pictures, tokens, bits), np.int64)
        for token in range(tokens):
            row, column = divmod(token, columns)
            seen: np.ndarray = np.zeros((pictures, len(self.neighbours), bits), np.int64)
            for place, (down, right) in enumerate(self.neighbours):
                if 0 <= row + down < rows and 0 <= column + right < columns:
                    seen[:, place] = signs[:, (row + down) * columns + column + right]
            inputs = seen.reshape(pictures, -1)
            hidden = self.place[token] + inputs @ self.hidden
            direct = self.bias[token] + inputs @ self.direct
            for bit in range(bits):
                own = signs[:, token]
                logit = direct[:, bit] + own @ self.earlier[bit]
                logit += (np.maximum(hidden, 0) @ self.readout[bit]) >> FRACTION
                chosen = code(token, bit, table[np.clip(logit, -largest, largest) + largest])
                known[:, token, bit] = chosen
                own[:, bit] = 2 * chosen.astype(np.int64) - 1
                hidden += own[:, bit, None] * self.own[bit]
        return known
