"""Fits a ``ContextModel`` to the ids of many images: in floating point, then rounded to integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.codec.context import (
    FRACTION,
    NEIGHBOURS,
    ONE,
    ContextModel,
    Predictor,
    context_shapes,
    neighbour_indices,
)
from flowmo.data.bits import Bits, token_bits
from flowmo.data.tokens import TokenDataset
from flowmo.model.transformer import code_lattice
from flowmo.streams import Stream, stream

BATCH_TOKENS = 512
COUNT_BATCH = 1024
LEARNING_RATE = 2e-3
COOLDOWN = 0.5
"""Final fraction of the steps, over which the learning rate falls linearly to 0."""


def frequencies(tokens: TokenDataset) -> ContextModel:
    """Return the context-free baseline: how often each bit of each token is set."""
    t, b = _shape(tokens)
    count = np.zeros((t, b))
    for start in range(0, len(tokens), COUNT_BATCH):
        indices = range(start, min(start + COUNT_BATCH, len(tokens)))
        count += image_bits(tokens, indices).sum(axis=0, dtype=np.int64)
    p = (count + 0.5) / (len(tokens) + 1)
    shapes = context_shapes(t, b, 0, 0)
    arrays: dict[str, np.ndarray] = {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}
    arrays["bias"] = np.rint((1 << FRACTION) * np.log(p / (1 - p))).astype(np.int64)
    return ContextModel(tokens.metadata.tokenizer, (), **arrays)


def fit(
    tokens: TokenDataset,
    layout: str = "lattice",
    hidden: int = 128,
    steps: int = 4000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ContextModel:
    """Fit a context model to the tokens of a dataset. 4 000 steps take minutes on one core.

    Args:
        layout: the tokenizer's ``model.code_layout``.
        hidden: number of hidden units.
    """
    generator = stream(seed, Stream.CONTEXT_MODEL)
    t, b = _shape(tokens)
    network = Network(t, b, NEIGHBOURS[layout], hidden, generator)

    def loss() -> Tensor:
        chosen = torch.randint(len(tokens), (max(BATCH_TOKENS // t, 1),), generator=generator).tolist()
        signs = torch.from_numpy(image_bits(tokens, chosen)).float() * 2 - 1
        return F.softplus(-signs * network(signs)).mean()

    minimise(network, loss, LEARNING_RATE, steps, progress)
    return ContextModel(tokens.metadata.tokenizer, NEIGHBOURS[layout], **network.rounded())


def image_bits(tokens: TokenDataset, indices: Sequence[int]) -> Bits:
    """Bits of some samples."""
    return token_bits(np.stack([tokens.ids(index).numpy() for index in indices]), tokens.metadata.id_bits)


def code_lengths(models: Mapping[str, ContextModel], tokens: TokenDataset) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Measure models on other tokens. Returns each image's bits packed, n, and coded by each model, n × 1."""
    bits = image_bits(tokens, range(len(tokens)))
    lengths = {name: ideal_code_length(model.run, bits)[:, None] for name, model in models.items()}
    return np.full(len(bits), bits[0].size), lengths


def ideal_code_length(predict: Predictor, bits: Bits) -> np.ndarray:
    """Ideal code length of each image in bits: float64 n."""
    total = np.zeros(len(bits))

    def add(token: Any, bit: int, p: np.ndarray) -> Bits:
        chosen = bits[:, token, bit]
        lengths = -np.log2(np.where(chosen == 1, p, ONE - p) / ONE)
        np.add(total, lengths.reshape(len(bits), -1).sum(axis=1), out=total)
        return chosen

    predict(len(bits), add)
    return total


def _shape(tokens: TokenDataset) -> tuple[int, int]:
    return tokens.metadata.tokens, tokens.metadata.sub_tokens * tokens.metadata.id_bits


def minimise(
    network: torch.nn.Module,
    loss: Callable[[], Tensor],
    learning_rate: float,
    steps: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Minimise ``loss``, which draws its own batch, with Adam."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (steps - step) / (COOLDOWN * steps))
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if progress:
            progress(step + 1, steps)


class FloatModel(torch.nn.Module):
    """An integer model in floating point. Its parameters have the same names and shapes.

    Args:
        scales: standard deviations of the initial weights; 0 where absent.

    Attributes:
        fractions: fractional bits of weights in fixed point; ``FRACTION`` where absent.
    """

    fractions: ClassVar[Mapping[str, int]] = {}

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], scales: Mapping[str, float], generator: torch.Generator):
        super().__init__()
        for name, shape in shapes.items():
            weights = scales.get(name, 0.0) * torch.randn(shape, generator=generator)
            self.register_parameter(name, torch.nn.Parameter(weights))

    @torch.no_grad()
    def rounded(self) -> dict[str, np.ndarray]:
        """Return the weights in fixed point."""
        limit = (1 << 15) - 1
        scaled = {name: w * (1 << self.fractions.get(name, FRACTION)) for name, w in self.named_parameters()}
        return {name: x.round().clamp(-limit, limit).numpy().astype(np.int64) for name, x in scaled.items()}


class Network(FloatModel):
    """``ContextModel`` in floating point, for all bits at once."""

    def __init__(
        self, t: int, b: int, neighbours: tuple[tuple[int, int], ...], hidden: int, generator: torch.Generator
    ):
        near = len(neighbours) * b
        scales = {"hidden": near**-0.5, "own": b**-0.5, "readout": max(hidden, 1) ** -0.5}
        super().__init__(context_shapes(t, b, len(neighbours), hidden), scales, generator)
        self.register_buffer("around", torch.from_numpy(neighbour_indices(*code_lattice(t), neighbours)))

    def forward(self, signs: Tensor) -> Tensor:
        """Signs n × T × B, −1 or 1 -> logits of the same shape, each from the bits coded before it."""
        inputs = F.pad(signs, (0, 0, 0, 1))[:, self.around].flatten(2)  # n T K·B, zeros outside the lattice
        from_own = signs[..., None] * self.own  # n T B H
        before = from_own.cumsum(dim=2) - from_own
        hidden = F.relu((self.place + inputs @ self.hidden)[:, :, None] + before)
        from_hidden = (hidden * self.readout).sum(dim=-1)
        return self.bias + from_hidden + inputs @ self.direct + signs @ self.earlier.tril(-1).T

    def rounded(self) -> dict[str, np.ndarray]:
        arrays = super().rounded()
        return arrays | {"earlier": np.tril(arrays["earlier"], -1)}
