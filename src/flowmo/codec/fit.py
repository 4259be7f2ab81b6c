"""Fit a context model to the ids of many pictures: in floating point, then rounded to integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.codec.context import FRACTION, NEIGHBOURS, Bits, ContextModel, token_bits
from flowmo.data.tokens import Tokens
from flowmo.model.transformer import code_lattice
from flowmo.streams import Stream, stream

BATCH = 512
COUNTED = 1024
RATE = 2e-3
COOLDOWN = 0.5
"""Last share of the steps over which the learning rate falls to 0."""


def frequencies(tokens: Tokens) -> ContextModel:
    """The model that knows how often each bit of each token is set, and nothing else."""
    t, b = tokens_shape(tokens)
    count, scale = np.zeros((t, b)), 1 << FRACTION
    for start in range(0, len(tokens), COUNTED):
        count += image_bits(tokens, range(start, min(start + COUNTED, len(tokens)))).sum(axis=0, dtype=np.int64)
    p = (count + 0.5) / (len(tokens) + 1)
    nothing = {
        "place": np.zeros((t, 0)),
        "hidden": np.zeros((0, 0)),
        "own": np.zeros((b, 0)),
        "readout": np.zeros((b, 0)),
        "direct": np.zeros((0, b)),
        "earlier": np.zeros((b, b)),
    }
    bias = np.rint(scale * np.log(p / (1 - p)))
    arrays = {name: array.astype(np.int64) for name, array in {"bias": bias, **nothing}.items()}
    return ContextModel(tokens.metadata.tokenizer, (), **arrays)


def fit(
    tokens: Tokens,
    layout: str = "lattice",
    hidden: int = 128,
    steps: int = 4000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ContextModel:
    """A context model of ``hidden`` units for the ids of a tokenizer whose ``model.code_layout`` is ``layout``.

    A step takes ``BATCH`` tokens of random pictures. 4 000 take minutes on one core.
    """
    generator = stream(seed, Stream.CONTEXT_MODEL)
    t, b = tokens_shape(tokens)
    neighbours = NEIGHBOURS[layout]
    net = Network(t, b, neighbours, hidden, generator)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    pictures = max(BATCH // t, 1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (steps - step) / (COOLDOWN * steps))
        chosen = torch.randint(len(tokens), (pictures,), generator=generator).tolist()
        signs = torch.from_numpy(image_bits(tokens, chosen)).float() * 2 - 1
        loss = F.softplus(-signs * net(signs)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress:
            progress(step + 1, steps)
    return ContextModel(tokens.metadata.tokenizer, neighbours, **net.rounded())


def image_bits(tokens: Tokens, indices: Sequence[int]) -> Bits:
    """The bits of some samples."""
    return token_bits(np.stack([tokens.ids(index).numpy() for index in indices]), tokens.metadata.id_bits)


def tokens_shape(tokens: Tokens) -> tuple[int, int]:
    """Tokens of a picture and bits of a token."""
    return tokens.metadata.tokens, tokens.metadata.sub_tokens * tokens.metadata.id_bits


class Network(torch.nn.Module):
    """``ContextModel`` in floating point, all bits at once; its parameters have the same names and shapes."""

    def __init__(
        self, t: int, b: int, neighbours: tuple[tuple[int, int], ...], hidden: int, generator: torch.Generator
    ):
        super().__init__()
        k = len(neighbours)
        rows, columns = code_lattice(t)
        row, column = torch.arange(t) // columns, torch.arange(t) % columns
        down, right = torch.tensor(neighbours).T
        row, column = row[:, None] + down, column[:, None] + right
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        # Tokens outside the lattice are read from a place behind the last, which holds zeros.
        self.register_buffer("source", torch.where(inside, row * columns + column, t))

        def weights(*shape: int, scale: float = 0.0) -> torch.nn.Parameter:
            return torch.nn.Parameter(scale * torch.randn(shape, generator=generator))

        self.bias = weights(t, b)
        self.place = weights(t, hidden)
        self.hidden = weights(k * b, hidden, scale=(k * b) ** -0.5)
        self.own = weights(b, hidden, scale=b**-0.5)
        self.readout = weights(b, hidden, scale=max(hidden, 1) ** -0.5)
        self.direct = weights(k * b, b)
        self.earlier = weights(b, b)

    def forward(self, signs: Tensor) -> Tensor:
        """Signs n × T × B, −1 or 1 -> logits of the same shape, each from what is coded before it."""
        seen = F.pad(signs, (0, 0, 0, 1))[:, self.source].flatten(2)  # n T K·B
        from_own = signs[..., None] * self.own  # n T B H
        before = from_own.cumsum(dim=2) - from_own
        hidden = F.relu((self.place + seen @ self.hidden)[:, :, None] + before)
        from_hidden = (hidden * self.readout).sum(dim=-1)
        return self.bias + from_hidden + seen @ self.direct + signs @ self.earlier.tril(-1).T

    @torch.no_grad()
    def rounded(self) -> dict[str, np.ndarray]:
        """The arrays of a ``ContextModel``."""
        limit, scale = (1 << 15) - 1, 1 << FRACTION
        weights = {name: p.tril(-1) if name == "earlier" else p for name, p in self.named_parameters()}
        return {name: (scale * p).round().clamp(-limit, limit).numpy().astype(np.int64) for name, p in weights.items()}
