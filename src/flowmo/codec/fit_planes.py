"""Fit a context model of planes to the ids of many images: in floating point, then rounded to integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.codec.context import FRACTION, ContextError, cost, token_bits
from flowmo.codec.fit import COOLDOWN
from flowmo.codec.planes import WEIGHT_FRACTION, Lattice, PlaneModel, digits_of, weight_shapes
from flowmo.streams import Stream, stream
from flowmo.tokenizer import Codes, FlowMo

CELLS = 1024
"""Cells of a step, from random images."""
RATE = 4e-3
NEIGHBOURS = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1))
SIDE = 32
ORDER = 2 * np.arange(SIDE)[:, None] + np.arange(SIDE)
"""Diagonals in squares of 32 × 32 cells. Within a square, the four neighbours to the left and above come before a cell.
All squares advance together, so no image takes more than 94 steps per plane."""


def frequencies(images: Sequence[np.ndarray], tokenizer: FlowMo) -> PlaneModel:
    """The model that knows how often each digit has each value, and nothing else."""
    digits, bits = shape_of_ids(tokenizer)
    planes = images[0].shape[2]
    values = digits_of(np.concatenate([ids.reshape(-1, planes) for ids in images]), digits, bits)
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
    images: Sequence[np.ndarray],
    tokenizer: FlowMo,
    hidden: int = 64,
    steps: int = 2000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PlaneModel:
    """A context model of ``hidden`` units for the ids of a tokenizer of native size.

    Args:
        images: ids of each, rows × columns × planes, all planes.

    Raises:
        ContextError: a tokenizer whose ids are not made of digits of whole bits.
    """
    generator = stream(seed, Stream.CONTEXT_MODEL)
    digits, bits = shape_of_ids(tokenizer)
    samples = Samples(images, digits, bits)
    net = PlaneNetwork(images[0].shape[2], digits, bits, hidden, generator)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (steps - step) / (COOLDOWN * steps))
        chosen = torch.randint(len(samples), (CELLS,), generator=generator)
        loss = net(*samples.batch(chosen)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress:
            progress(step + 1, steps)
    return PlaneModel(tokenizer.identity(), NEIGHBOURS, ORDER, **net.rounded())


def ids_on_lattice(codes: Codes, tokenizer: FlowMo) -> np.ndarray:
    """The ids of one image as ``fit`` takes them, rows × columns × planes."""
    assert codes.ids is not None
    cell = tokenizer.config.model.patch_size
    return codes.ids[0].cpu().numpy().reshape(codes.size[0] // cell, codes.size[1] // cell, -1)


def shape_of_ids(tokenizer: FlowMo) -> tuple[int, int]:
    """Digits of an id, and bits of a digit.

    Raises:
        ContextError: the levels of a digit are no power of two.
    """
    quantizer = tokenizer.quantizer
    assert quantizer.sub_tokens is not None
    assert quantizer.id_count is not None
    digits = quantizer.channels // quantizer.sub_tokens
    bits = round(math.log2(quantizer.id_count) / digits)
    if quantizer.id_count != 1 << digits * bits:
        raise ContextError(f"context models need digits of whole bits; this tokenizer's ids are {quantizer.id_count}")
    return digits, bits


def plane_costs(model: PlaneModel, ids: np.ndarray) -> np.ndarray:
    """Bits that coding takes for each plane of one image's ids, rows × columns × planes: float64 planes."""
    rows, columns, planes = ids.shape
    bits = token_bits(ids.reshape(1, rows * columns, planes), model.shape[1]).reshape(rows * columns, planes, -1)
    return np.array([cost(model.plane(ids[..., :s]), bits[None, :, s])[0] for s in range(planes)])


class Samples:
    """The cells of many images, and what surrounds them."""

    def __init__(self, images: Sequence[np.ndarray], digits: int, bits: int):
        parts: list[tuple[np.ndarray, ...]] = []
        start = 0
        for ids in images:
            rows, columns, planes = ids.shape
            lattice = Lattice(rows, columns, NEIGHBOURS, ORDER)
            cells, step_of = np.arange(rows * columns), lattice.step_of
            field, around = lattice.field(ids, planes, digits, bits), lattice.around(cells)
            steps: np.ndarray = np.zeros(len(field), np.int64)
            steps[lattice.at(cells)] = step_of
            values = digits_of(ids.reshape(rows * columns, planes), digits, bits)
            parts.append((field, around + start, steps[around] < step_of[:, None], values))
            start += len(field)
        self.field, self.around, self.known, self.values = (
            torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)
        )

    def __len__(self) -> int:
        return len(self.around)

    def batch(self, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The fields around some cells n × K × S·D, where their plane comes before n × K, and their digits n × S·D."""
        return self.field[self.around[cells]].float(), self.known[cells].float(), self.values[cells].long()


class PlaneNetwork(torch.nn.Module):
    """``PlaneModel`` in floating point, many cells at once; its parameters have the same names and shapes."""

    def __init__(self, planes: int, digits: int, bits: int, hidden: int, generator: torch.Generator):
        super().__init__()
        self.planes, self.per_id, self.bits = planes, digits, bits
        shapes = weight_shapes(planes, digits, bits, len(NEIGHBOURS), hidden)
        scales = {
            "start": 0.1,
            "around": (shapes["around"][1] / 2) ** -0.5 / (1 << bits - 1),
            "middle": (2 / hidden) ** 0.5,
            "digits": 0.05,
            "readout": hidden**-0.5,
        }
        for name, shape in shapes.items():
            weights = scales.get(name, 0.0) * torch.randn(shape, generator=generator)
            self.register_parameter(name, torch.nn.Parameter(weights))

    def forward(self, around: Tensor, known: Tensor, values: Tensor) -> Tensor:
        """n cells, as ``Samples.batch`` gives them -> surprise of each id in bits, n × S."""
        around = around.unflatten(-1, (self.planes, -1))
        # A product with one-hot digits looks the tables up; its gradient is several times faster than that of indexing.
        one_hot = F.one_hot(values, 1 << self.bits).to(around.dtype)
        planes = [self.plane(s, around[:, :, : s + 1], known, values, one_hot) for s in range(self.planes)]
        return torch.stack(planes, dim=1)

    def plane(self, s: int, around: Tensor, known: Tensor, values: Tensor, one_hot: Tensor) -> Tensor:
        """Plane s of n cells: surprise in bits, n. ``around``: n × K × s + 1 × D."""
        digits, tables = self.per_id, self.digits[s]
        first = s * digits
        seen = torch.cat((around[:, :, :s], around[:, :, s:] * known[..., None, None]), dim=2).flatten(1)
        weights = self.around[s].unflatten(0, (-1, self.planes, digits))[:, : s + 1].flatten(0, 2)
        hidden = self.middle_start[s] + F.relu(self.start[s] + seen @ weights) @ self.middle[s]
        hidden = hidden + one_hot[:, :first].flatten(1) @ tables[:first].flatten(0, 1)
        surprise = torch.zeros(len(around))
        for digit in range(digits):
            logits = self.bias[s, digit] + F.relu(hidden) @ self.readout[s, digit]
            value = values[:, first + digit]
            for bit in reversed(range(self.bits)):
                node = (1 << self.bits - 1 - bit) + (value >> bit + 1)
                logit = logits.gather(1, node[:, None] - 1)[:, 0]
                surprise = surprise + F.softplus(torch.where((value >> bit) & 1 == 1, -logit, logit))
            hidden = hidden + one_hot[:, first + digit] @ tables[first + digit]
        return surprise / math.log(2)

    @torch.no_grad()
    def rounded(self) -> dict[str, np.ndarray]:
        """The arrays of a ``PlaneModel``."""
        limit, scales = (
            (1 << 15) - 1,
            {"around": WEIGHT_FRACTION, "middle": WEIGHT_FRACTION, "readout": WEIGHT_FRACTION},
        )
        return {
            name: (p * (1 << scales.get(name, FRACTION))).round().clamp(-limit, limit).numpy().astype(np.int64)
            for name, p in self.named_parameters()
        }
