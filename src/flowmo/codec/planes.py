"""Context models of native-size codes, in integer arithmetic.

An image has a lattice of cells and one id per cell in each plane. An id has D digits of B bits: FSQ's levels or LFQ's
signs. Plane s of a cell is predicted from planes 0 … s of its neighbours, as far as they are coded, and each digit also
from the earlier digits of its id. A digit's 2^B − 1 logits are the nodes of a binary tree; the root is the highest bit.

All cells of one coding step are computed together and see only cells of earlier steps. ``order`` gives each cell's step
and repeats over the lattice, so the number of steps does not grow with the image.

Matrix products use float64 on integers whose partial sums stay below 2^53. They are exact in any summation order, so
every machine computes the same probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from flowmo.codec.context import (
    FRACTION,
    BitCoder,
    ContextError,
    IntegerModel,
    Predictor,
    neighbour_indices,
    probability,
)
from flowmo.data.bits import Bits

WEIGHT_FRACTION = 12
"""Fractional bits of the weights of products. Biases, activations and logits have ``FRACTION``."""
LARGEST_ACTIVATION = (1 << 16) - 1
CELLS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class PlaneModel(IntegerModel):
    """Predicts S planes from K neighbouring cells, with H hidden units. ``neighbours`` includes (0, 0), itself.

    Attributes:
        order: rows × columns, the step of a cell, indexed by its row and column modulo this shape.
        start: S × H, bias of the first hidden layer.
        around: S × K·S·D × H, from the neighbours' digits (2 · digit + 1 − 2^B, and 0 where not coded).
        middle: S × H × H, from the first hidden layer to the second.
        middle_start: S × H, bias of the second hidden layer.
        digits: S × S·D × 2^B × H, from each known digit of the cell to the second hidden layer.
        readout: S × D × H × (2^B − 1), from the second hidden layer to a digit's logits.
        bias: S × D × (2^B − 1), of the logits.
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
            raise ContextError("The array order is empty or has no rows and columns.")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        (planes, hidden), (digits, nodes) = self.start.shape, self.bias.shape[1:]
        return weight_shapes(planes, digits, nodes.bit_length(), len(self.neighbours), hidden)

    @property
    def shape(self) -> tuple[int, int]:
        """Planes per image and bits per id."""
        planes, digits, nodes = self.bias.shape
        return planes, digits * nodes.bit_length()

    def plane(self, earlier: np.ndarray) -> Predictor:
        """Return the predictor of the plane after ``earlier``, ids of one image, rows × columns × planes.

        Its tokens are the cells; one call codes all cells of a step.
        """
        return partial(self._run, earlier)

    @cached_property
    def products(self) -> dict[str, np.ndarray]:
        """The weights of products, as float64."""
        return {name: self.arrays[name].astype(np.float64) for name in ("around", "middle", "readout")}

    def _run(self, earlier: np.ndarray, images: int, code: BitCoder) -> Bits:
        rows, columns, s = earlier.shape
        around, middle, readout = (self.products[name][s] for name in ("around", "middle", "readout"))
        digits, bits = self.bias.shape[1], self.bias.shape[2].bit_length()
        known: Bits = np.zeros((images, rows * columns, digits * bits), np.int8)
        coded = split_digits(earlier.reshape(rows * columns, s), digits, bits)
        field = digit_field(coded, self.shape[0] * digits, bits)
        neighbours = neighbour_indices(rows, columns, self.neighbours)
        for cells in _groups(cell_steps(rows, columns, self.order)):
            inputs = field[neighbours[cells]].reshape(len(cells), -1)
            hidden = self.start[s] + product(inputs, around, WEIGHT_FRACTION - FRACTION)
            hidden = self.middle_start[s] + product(activation(hidden), middle, WEIGHT_FRACTION)
            hidden += self.digits[s, np.arange(s * digits), coded[cells]].sum(axis=1)
            for digit in range(digits):
                p = probability(self.bias[s, digit] + product(activation(hidden), readout[digit], WEIGHT_FRACTION))
                node: np.ndarray = np.ones(len(cells), np.int64)
                for bit in reversed(range(digit * bits, (digit + 1) * bits)):
                    chosen = code(cells, bit, np.take_along_axis(p, node[:, None] - 1, 1).T)
                    known[:, cells, bit] = chosen
                    node = 2 * node + chosen[0]
                value = node - (1 << bits)
                hidden += self.digits[s, s * digits + digit, value]
                field[cells, s * digits + digit] = centre(value, bits)
        return known


def weight_shapes(planes: int, digits: int, bits: int, neighbours: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a ``PlaneModel``."""
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


def cell_steps(rows: int, columns: int, order: np.ndarray) -> np.ndarray:
    """Return the step of every cell of an image."""
    row, column = np.indices((rows, columns)).reshape(2, -1)
    return order[row % order.shape[0], column % order.shape[1]]


def _groups(steps: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the cells of each step, in parts of at most ``CELLS_AT_ONCE``."""
    cells = np.argsort(steps, kind="stable")
    for group in np.split(cells, np.flatnonzero(np.diff(steps[cells])) + 1):
        yield from np.split(group, range(CELLS_AT_ONCE, len(group), CELLS_AT_ONCE))


def digit_field(digits: np.ndarray, width: int, bits: int) -> np.ndarray:
    """Cells × digits -> centred digits, padded with zeros on the right and by one row: int16, (cells + 1) × width."""
    return np.pad(centre(digits, bits).astype(np.int16), ((0, 1), (0, width - digits.shape[1])))


def product(x: np.ndarray, weights: np.ndarray, shift: int) -> np.ndarray:
    """⌊x · weights / 2^shift⌋ of integer-valued arrays: int64."""
    return np.floor((x.astype(np.float64) @ weights) * 2.0**-shift).astype(np.int64)


def activation(hidden: np.ndarray) -> np.ndarray:
    """ReLU with an upper bound that keeps every product exact."""
    return np.clip(hidden, 0, LARGEST_ACTIVATION)


def split_digits(ids: np.ndarray, digits: int, bits: int) -> np.ndarray:
    """Ids … × planes -> digits … × planes · digits."""
    values = (ids[..., None] >> bits * np.arange(digits)) & ((1 << bits) - 1)
    return values.reshape(*ids.shape[:-1], ids.shape[-1] * digits)


def centre(digit: np.ndarray, bits: int) -> np.ndarray:
    """Shift digits to be symmetric about 0, as the network sees them."""
    return 2 * digit + 1 - (1 << bits)
