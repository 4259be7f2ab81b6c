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

from flowmo.coding.context import (
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
        order: rows × columns, the step of a cell at its row and column modulo these; all steps from 0 to the largest.
        start: S × steps × H, what a plane and a step add to the first hidden layer.
        around: S × K·S·D × H, from the digits of ``neighbours``: 2 · digit + 1 − 2^B, and 0 where not coded.
        middle: S × H × H, from the first hidden layer to the second.
        middle_start: S × H.
        digits: S × D × 2^B × H, what a digit of the id adds to the second hidden layer once it is known.
        readout: S × D × H × 2^B − 1, to the logits of a digit.
        bias: S × D × 2^B − 1.
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
        if self.order.ndim != 2 or not np.array_equal(np.unique(self.order), np.arange(self.start.shape[1])):
            raise ContextError("order does not number the steps of a lattice")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        (planes, _, hidden), (digits, nodes) = self.start.shape, self.bias.shape[1:]
        inputs = len(self.neighbours) * planes * digits
        return {
            "around": (planes, inputs, hidden),
            "middle": (planes, hidden, hidden),
            "middle_start": (planes, hidden),
            "digits": (planes, digits, nodes + 1, hidden),
            "readout": (planes, digits, hidden, nodes),
            "bias": (planes, digits, (1 << nodes.bit_length()) - 1),
        }

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
        lattice = Lattice(self.earlier.shape[0], self.earlier.shape[1], model.neighbours, model.order)
        field = lattice.field(self.earlier, model.shape[0], digits, bits)
        known: Bits = np.zeros((pictures, *self.shape), np.int8)
        for step, cells in lattice.steps():
            seen = field[lattice.around(cells)].reshape(len(cells), -1)
            hidden = model.start[s, step] + product(seen, around, WEIGHT_FRACTION - FRACTION)
            hidden = model.middle_start[s] + product(activated(hidden), middle, WEIGHT_FRACTION)
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
                hidden += model.digits[s, digit, value]
                field[lattice.at(cells), s * digits + digit] = 2 * value + 1 - (1 << bits)
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

    def steps(self) -> list[tuple[int, np.ndarray]]:
        """(step, indices of its cells) in the order of coding; large steps in parts of ``CELLS_AT_ONCE``."""
        row, column = np.indices((self.rows, self.columns))
        step_of = self.order[row % self.order.shape[0], column % self.order.shape[1]].ravel()
        cells = np.argsort(step_of, kind="stable")
        parts = np.split(cells, np.flatnonzero(np.diff(step_of[cells])) + 1)
        return [
            (int(step_of[part[0]]), part[start : start + CELLS_AT_ONCE])
            for part in parts
            for start in range(0, len(part), CELLS_AT_ONCE)
        ]

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
        values = (ids[..., None] >> bits * np.arange(digits)) & ((1 << bits) - 1)
        field[margin : margin + self.rows, margin : margin + self.columns, :known] = 2 * values + 1 - (1 << bits)
        return field.reshape(-1, planes * digits)


def product(x: np.ndarray, weights: np.ndarray, shift: int) -> np.ndarray:
    """⌊x · weights / 2^shift⌋ of whole numbers: int64."""
    return np.floor((x.astype(np.float64) @ weights) * 2.0**-shift).astype(np.int64)


def activated(hidden: np.ndarray) -> np.ndarray:
    """The bounds keep every sum of a product exact."""
    return np.clip(hidden, 0, LARGEST_ACTIVATION)
