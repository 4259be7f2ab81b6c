"""Context models of native-size codes: the probability of every bit of a plane of ids, in integers alone.

An image has a lattice of cells and one id per cell in each of its planes. An id has D digits of B bits: FSQ's levels,
or LFQ's signs. Plane s of a cell is predicted from planes 0 … s of the cells around it, as far as they are coded, and
each digit from those before it in its id. The 2^B − 1 logits of a digit are the nodes of a binary tree, whose root is
the highest bit.

Cells are coded in few steps. ``order`` gives the step of every cell and repeats over the lattice, so the number of
steps does not grow with the image. The cells of one step see only those of earlier steps and are computed together.

Products are of float64 numbers that are whole and below 2^53 in every partial sum. They are exact in any order of
summation, so every machine and library finds the same probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flowmo.codec.context import (
    FRACTION,
    LARGEST_LOGIT,
    BitCoder,
    Bits,
    ContextError,
    IntegerModel,
    logistic_table,
)

WEIGHT_FRACTION = 12
"""Binary digits behind the point of the weights of products. Biases, activations and logits have ``FRACTION``."""
LARGEST_ACTIVATION = (1 << 16) - 1
CELLS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class PlaneModel(IntegerModel):
    """Probabilities of S planes from K cells around, H hidden units. ``neighbours`` includes (0, 0), the cell itself.

    Attributes:
        order: rows × columns, the step of a cell at its row and column modulo these.
        start: S × H, bias of the first hidden layer.
        around: S × K·S·D × H, from the digits of ``neighbours``: 2 · digit + 1 − 2^B, and 0 where not coded.
        middle: S × H × H, from the first hidden layer to the second.
        middle_start: S × H, bias of the second hidden layer.
        digits: S × S·D × 2^B × H, what each known digit of the cell adds to the second hidden layer.
        readout: S × D × H × 2^B − 1, to the logits of a digit.
        bias: S × D × 2^B − 1, of the logits.
    """

    FORMAT = "planes 1"

    order: np.ndarray
    start: np.ndarray
    around: np.ndarray
    middle: np.ndarray
    middle_start: np.ndarray
    digits: np.ndarray
    readout: np.ndarray
    bias: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order.ndim != 2 or not self.order.size:
            raise ContextError("order gives no step to the cells of a lattice")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        (planes, hidden), (digits, nodes) = self.start.shape, self.bias.shape[1:]
        return weight_shapes(planes, digits, nodes.bit_length(), len(self.neighbours), hidden)

    @property
    def shape(self) -> tuple[int, int]:
        """Planes of an image, and bits of an id."""
        planes, digits, nodes = self.bias.shape
        return planes, digits * nodes.bit_length()

    def plane(self, earlier: np.ndarray) -> Plane:
        """The model of the plane that follows ``earlier`` ones: ids rows × columns × planes."""
        return Plane(self, earlier)

    @cached_property
    def products(self) -> dict[str, np.ndarray]:
        """The weights that are multiplied, as float64."""
        return {name: self.arrays[name].astype(np.float64) for name in ("around", "middle", "readout")}


def weight_shapes(planes: int, digits: int, bits: int, neighbours: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a ``PlaneModel``'s weights."""
    nodes = (1 << bits) - 1
    return {
        "start": (planes, hidden),
        "around": (planes, neighbours * planes * digits, hidden),
        "middle": (planes, hidden, hidden),
        "middle_start": (planes, hidden),
        "digits": (planes, planes * digits, nodes + 1, hidden),
        "readout": (planes, digits, hidden, nodes),
        "bias": (planes, digits, nodes),
    }


@dataclass(frozen=True)
class Plane:
    """A ``BitModel`` of one plane of an image, whose cells are its tokens."""

    model: PlaneModel
    earlier: np.ndarray

    @property
    def tokenizer(self) -> str:
        return self.model.tokenizer

    @property
    def identity(self) -> bytes:
        return self.model.identity

    @property
    def shape(self) -> tuple[int, int]:
        """Cells, and bits of an id."""
        rows, columns, _ = self.earlier.shape
        return rows * columns, self.model.shape[1]

    def run(self, pictures: int, code: BitCoder) -> Bits:
        """All bits of the plane, each through ``code``, which gets all cells of a step at once. One picture only."""
        model, s = self.model, self.earlier.shape[2]
        around, middle, readout = (model.products[name][s] for name in ("around", "middle", "readout"))
        digits, nodes = model.bias.shape[1:]
        bits, table, largest = nodes.bit_length(), logistic_table(), LARGEST_LOGIT << FRACTION
        known: Bits = np.zeros((pictures, *self.shape), np.int8)
        lattice = Lattice(self.earlier.shape[0], self.earlier.shape[1], model.neighbours, model.order)
        earlier = digits_of(self.earlier.reshape(len(known[0]), s), digits, bits)
        field = lattice.field(self.earlier, model.shape[0], digits, bits)
        for cells in lattice.steps():
            seen = field[lattice.around(cells)].reshape(len(cells), -1)
            hidden = model.start[s] + product(seen, around, WEIGHT_FRACTION - FRACTION)
            hidden = model.middle_start[s] + product(activated(hidden), middle, WEIGHT_FRACTION)
            hidden += model.digits[s, np.arange(s * digits), earlier[cells]].sum(axis=1)
            for digit in range(digits):
                logits = model.bias[s, digit] + product(activated(hidden), readout[digit], WEIGHT_FRACTION)
                p = table[np.clip(logits, -largest, largest) + largest]
                node: np.ndarray = np.ones(len(cells), np.int64)
                for bit in reversed(range(bits)):
                    index = digit * bits + bit
                    chosen = code(cells, index, np.take_along_axis(p, node[:, None] - 1, 1).T)
                    known[:, cells, index] = chosen
                    node = 2 * node + chosen[0]
                value = node - (1 << bits)
                hidden += model.digits[s, s * digits + digit, value]
                field[lattice.at(cells), s * digits + digit] = centred(value, bits)
        return known


class Lattice:
    """Where the cells of an image are in a field of digits, which has a margin of zeros.

    Args:
        neighbours: rows and columns away.
        order: of ``PlaneModel``.
    """

    def __init__(self, rows: int, columns: int, neighbours: tuple[tuple[int, int], ...], order: np.ndarray):
        self.rows, self.columns, self.order = rows, columns, order
        self.margin = max((abs(away) for pair in neighbours for away in pair), default=0)
        self.width = columns + 2 * self.margin
        self.offsets = np.array([down * self.width + right for down, right in neighbours], np.int64)

    @property
    def step_of(self) -> np.ndarray:
        """The step of every cell."""
        row, column = np.indices((self.rows, self.columns)).reshape(2, -1)
        return self.order[row % self.order.shape[0], column % self.order.shape[1]]

    def steps(self) -> list[np.ndarray]:
        """Indices of the cells of each step, in the order of coding; large steps in parts of ``CELLS_AT_ONCE``."""
        step_of = self.step_of
        cells = np.argsort(step_of, kind="stable")
        steps = np.split(cells, np.flatnonzero(np.diff(step_of[cells])) + 1)
        return [step[i : i + CELLS_AT_ONCE] for step in steps for i in range(0, len(step), CELLS_AT_ONCE)]

    def at(self, cells: np.ndarray) -> np.ndarray:
        """Rows of the field that belong to cells."""
        row, column = np.divmod(cells, self.columns)
        return (row + self.margin) * self.width + column + self.margin

    def around(self, cells: np.ndarray) -> np.ndarray:
        """Rows of the field that belong to the neighbours of cells: cells × K."""
        return self.at(cells)[:, None] + self.offsets

    def field(self, ids: np.ndarray, planes: int, digits: int, bits: int) -> np.ndarray:
        """Digits of the first planes' ids, rows × columns × planes, and zeros: int16, positions × planes · digits."""
        margin, known = self.margin, ids.shape[2]
        field: np.ndarray = np.zeros((self.rows + 2 * margin, self.width, planes, digits), np.int16)
        values = digits_of(ids, digits, bits).reshape(self.rows, self.columns, known, digits)
        field[margin : margin + self.rows, margin : margin + self.columns, :known] = centred(values, bits)
        return field.reshape(-1, planes * digits)


def product(x: np.ndarray, weights: np.ndarray, shift: int) -> np.ndarray:
    """⌊x · weights / 2^shift⌋ of whole numbers: int64."""
    return np.floor((x.astype(np.float64) @ weights) * 2.0**-shift).astype(np.int64)


def activated(hidden: np.ndarray) -> np.ndarray:
    """The bounds keep every sum of a product exact."""
    return np.clip(hidden, 0, LARGEST_ACTIVATION)


def digits_of(ids: np.ndarray, digits: int, bits: int) -> np.ndarray:
    """ids … × planes -> their digits, … × planes · digits."""
    spread = (ids[..., None] >> bits * np.arange(digits)) & ((1 << bits) - 1)
    return spread.reshape(*ids.shape[:-1], ids.shape[-1] * digits)


def centred(digit: np.ndarray, bits: int) -> np.ndarray:
    """Digits as the network sees them, around 0."""
    return 2 * digit + 1 - (1 << bits)
