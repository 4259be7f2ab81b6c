"""Fits a ``PlaneModel`` to the ids of many images: in floating point, then rounded to integers.

``flowmo.codec.planes`` defines planes, cells and digits. There are S planes, D digits per id and K neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from context_tokens import FloatModel, ideal_code_length, minimise
from torch import Tensor

from flowmo.codec.context import FRACTION, ContextError, neighbour_indices
from flowmo.codec.planes import WEIGHT_FRACTION, PlaneModel, cell_steps, digit_field, split_digits, weight_shapes
from flowmo.data.bits import token_bits
from flowmo.streams import Stream, stream
from flowmo.tokenizer import Codes, FlowMo

BATCH_CELLS = 1024
LEARNING_RATE = 4e-3
NEIGHBOURS = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1))
SQUARE_SIDE = 32
ORDER = 2 * np.arange(SQUARE_SIDE)[:, None] + np.arange(SQUARE_SIDE)
"""Coding step of each cell in a 32 × 32 square. Cells of one step are coded in parallel, in all squares. In each
square, the four neighbours to the left and above come before a cell. Any image takes at most 94 steps per plane."""


def frequencies(ids_of_images: Sequence[np.ndarray], tokenizer: FlowMo) -> PlaneModel:
    """Return the context-free baseline: the marginal frequencies of each digit's values."""
    digits, bits = id_digits(tokenizer)
    planes = ids_of_images[0].shape[2]
    values = split_digits(np.concatenate([ids.reshape(-1, planes) for ids in ids_of_images]), digits, bits)
    counts = np.stack([np.bincount(column, minlength=1 << bits) for column in values.T])
    nodes = []
    for level in range(bits):  # of the tree, from its root
        halves = counts.reshape(len(counts), 1 << level, 2, -1).sum(axis=-1) + 0.5
        nodes.append(np.log(halves[..., 1] / halves[..., 0]))
    bias = np.concatenate(nodes, axis=1).reshape(planes, digits, -1)
    arrays = {name: np.zeros(shape) for name, shape in weight_shapes(planes, digits, bits, 0, 0).items()}
    arrays |= {"order": np.zeros((1, 1)), "bias": np.rint(bias * (1 << FRACTION))}
    return PlaneModel(tokenizer.identity(), (), **{name: array.astype(np.int64) for name, array in arrays.items()})


def fit(
    ids_of_images: Sequence[np.ndarray],
    tokenizer: FlowMo,
    hidden: int = 64,
    steps: int = 2000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PlaneModel:
    """Fit a context model to the ids of images from a tokenizer of native size.

    Args:
        ids_of_images: one array per image, rows × columns × planes, with all planes.
        hidden: number of hidden units.
        steps: training iterations.

    Raises:
        ContextError: the number of levels of a digit is not a power of two.
    """
    generator = stream(seed, Stream.CONTEXT_MODEL)
    digits, bits = id_digits(tokenizer)
    samples = Samples(ids_of_images, digits, bits)
    network = PlaneNetwork(ids_of_images[0].shape[2], digits, bits, hidden, generator)

    def loss() -> Tensor:
        return network(*samples.batch(torch.randint(len(samples), (BATCH_CELLS,), generator=generator))).mean()

    minimise(network, loss, LEARNING_RATE, steps, progress)
    return PlaneModel(tokenizer.identity(), NEIGHBOURS, ORDER, **network.rounded())


def ids_on_lattice(codes: Codes, tokenizer: FlowMo) -> np.ndarray:
    """Ids of one image in the form that ``fit`` takes: rows × columns × planes."""
    assert codes.ids is not None
    cell = tokenizer.config.model.patch_size
    return codes.ids[0].cpu().numpy().reshape(codes.size[0] // cell, codes.size[1] // cell, -1)


def id_digits(tokenizer: FlowMo) -> tuple[int, int]:
    """Digits per id and bits per digit. Raises ``ContextError`` if the levels per digit are not a power of two."""
    quantizer = tokenizer.quantizer
    assert quantizer.sub_tokens is not None
    assert quantizer.id_count is not None
    digits = quantizer.channels // quantizer.sub_tokens
    bits = round(math.log2(quantizer.id_count) / digits)
    if quantizer.id_count != 1 << digits * bits:
        raise ContextError(
            f"Context models need digits of whole bits, but this tokenizer has {quantizer.id_count} ids."
        )
    return digits, bits


def plane_code_lengths(model: PlaneModel, ids: np.ndarray) -> np.ndarray:
    """Ideal code length of each plane of one image's ids, rows × columns × planes, in bits: float64 planes."""
    rows, columns, planes = ids.shape
    bits = token_bits(ids.reshape(1, rows * columns, planes), model.shape[1]).reshape(rows * columns, planes, -1)
    return np.array([ideal_code_length(model.plane(ids[..., :s]), bits[None, :, s])[0] for s in range(planes)])


def code_lengths(
    models: Mapping[str, PlaneModel], ids_of_images: Sequence[np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Measure models on the ids of other images.

    Returns the packed length of each image, n, and for each model the coded length of each plane, n × planes, in bits.
    """
    id_bits = next(iter(models.values())).shape[1]
    lengths = {name: np.stack([plane_code_lengths(m, ids) for ids in ids_of_images]) for name, m in models.items()}
    return np.array([ids.size * id_bits for ids in ids_of_images]), lengths


class Samples:
    """All cells of many images, with their neighbours, as training samples."""

    def __init__(self, ids_of_images: Sequence[np.ndarray], digits: int, bits: int):
        parts: list[tuple[np.ndarray, ...]] = []
        start = 0
        for ids in ids_of_images:
            rows, columns, planes = ids.shape
            values = split_digits(ids.reshape(rows * columns, planes), digits, bits)
            field, coding_step = digit_field(values, planes * digits, bits), cell_steps(rows, columns, ORDER)
            neighbours = neighbour_indices(rows, columns, NEIGHBOURS)
            causal = np.append(coding_step, 0)[neighbours] < coding_step[:, None]
            parts.append((field, neighbours + start, causal, values))
            start += len(field)
        self.field, self.neighbours, self.causal_mask, self.values = (
            torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)
        )

    def __len__(self) -> int:
        return len(self.neighbours)

    def batch(self, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Neighbours' digits n × K × S·D, causal mask of neighbours n × K, and the cells' digits n × S·D."""
        return self.field[self.neighbours[cells]].float(), self.causal_mask[cells].float(), self.values[cells].long()


class PlaneNetwork(FloatModel):
    """``PlaneModel`` in floating point, for many cells at once."""

    fractions: ClassVar = {"around": WEIGHT_FRACTION, "middle": WEIGHT_FRACTION, "readout": WEIGHT_FRACTION}

    def __init__(self, planes: int, digits: int, bits: int, hidden: int, generator: torch.Generator):
        shapes = weight_shapes(planes, digits, bits, len(NEIGHBOURS), hidden)
        scales = {"start": 0.1, "around": (shapes["around"][1] / 2) ** -0.5 / (1 << bits - 1)}
        scales |= {"middle": (2 / hidden) ** 0.5, "digits": 0.05, "readout": hidden**-0.5}
        super().__init__(shapes, scales, generator)
        self.planes, self.per_id, self.bits = planes, digits, bits

    def forward(self, neighbours: Tensor, causal_mask: Tensor, values: Tensor) -> Tensor:
        """A batch of ``Samples`` -> negative log-likelihood of each id in bits, n × S."""
        neighbours = neighbours.unflatten(-1, (self.planes, -1))
        # a product with one-hot digits has a much faster gradient than indexing
        one_hot = F.one_hot(values, 1 << self.bits).to(neighbours.dtype)
        planes = [self.plane(s, neighbours[:, :, : s + 1], causal_mask, values, one_hot) for s in range(self.planes)]
        return torch.stack(planes, dim=1)

    def plane(self, s: int, neighbours: Tensor, causal_mask: Tensor, values: Tensor, one_hot: Tensor) -> Tensor:
        """Negative log-likelihood of plane s in bits, n. ``neighbours``: n × K × (s + 1) × D."""
        digits, tables = self.per_id, self.digits[s]
        first = s * digits
        current = neighbours[:, :, s:] * causal_mask[..., None, None]
        inputs = torch.cat((neighbours[:, :, :s], current), dim=2).flatten(1)
        weights = self.around[s].unflatten(0, (-1, self.planes, digits))[:, : s + 1].flatten(0, 2)
        hidden = self.middle_start[s] + F.relu(self.start[s] + inputs @ weights) @ self.middle[s]
        hidden = hidden + one_hot[:, :first].flatten(1) @ tables[:first].flatten(0, 1)
        nll = torch.zeros(len(neighbours))
        for digit in range(digits):
            logits = self.bias[s, digit] + F.relu(hidden) @ self.readout[s, digit]
            value = values[:, first + digit]
            for bit in reversed(range(self.bits)):
                node = (1 << self.bits - 1 - bit) + (value >> bit + 1)
                logit = logits.gather(1, node[:, None] - 1)[:, 0]
                nll = nll + F.softplus(torch.where((value >> bit) & 1 == 1, -logit, logit))
            hidden = hidden + one_hot[:, first + digit] @ tables[first + digit]
        return nll / math.log(2)
