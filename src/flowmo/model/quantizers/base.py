"""What every bottleneck promises: ``quantizer(code) -> Quantized``, and ids <-> code without a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

WholeBatch = Callable[[Tensor], Tensor]
"""From a statistic of some pictures to its mean over the whole batch that they are part of, without gradient."""


def alone(statistic: Tensor) -> Tensor:
    """The ``WholeBatch`` of pictures that are a batch of their own."""
    return statistic


@dataclass(frozen=True)
class Quantized:
    """What a bottleneck makes of the encoder's output.

    Attributes:
        code: b × tokens × channels, what the decoder is conditioned on; gradients flow to the encoder.
        ids: int64 b × tokens × sub-tokens, or ``None`` for a continuous bottleneck.
        losses: named scalar terms, already weighted, to be added to the training loss.
        statistics: named scalars for the log, without gradient or weight.
        noise_level: b in [0, 1], how much of the code is noise; the decoder is then trained from that timestep on.
    """

    code: Tensor
    ids: Tensor | None
    losses: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    noise_level: Tensor | None = None


class Quantizer(Protocol):
    """A bottleneck. ``channels`` is the width of ``Quantized.code``, ``encoder_channels`` what the encoder emits."""

    @property
    def channels(self) -> int: ...

    @property
    def encoder_channels(self) -> int: ...

    @property
    def sub_tokens(self) -> int | None:
        """Ids a token, or ``None`` where the bottleneck is continuous."""

    @property
    def id_count(self) -> int | None:
        """Ids run from 0 to ``id_count`` − 1; ``None`` where the bottleneck is continuous."""

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a loss depends on a mean over the batch otherwise than linearly, and so calls ``whole_batch``."""

    def __call__(self, code: Tensor, whole_batch: WholeBatch = alone) -> Quantized:
        """Training: code b × tokens × encoder_channels, with losses.

        The mean over the parts of a batch of their losses' gradients is the gradient of the whole batch's loss, when
        ``whole_batch`` gives each part the same means over all of it.
        """

    def quantize(self, code: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inference: the code that the decoder sees, without losses or randomness, and its ids."""

    def code_from_ids(self, ids: Tensor) -> Tensor:
        """int64 b × tokens × sub_tokens -> float32 b × tokens × channels."""


@runtime_checkable
class Learner(Protocol):
    """A bottleneck that learns otherwise than by gradients."""

    def buffers(self) -> Iterator[Tensor]:
        """All that ``learn`` changes."""

    def learn(self, step: int = 0) -> None:
        """Learn from the batch that was last seen in training; called once a step, in every process, by the same
        means over the whole batch. ``step`` is the run's, for random numbers that all processes share."""


def check_ids(ids: Tensor, code_length: int, sub_tokens: int, id_count: int, prefix: bool = False) -> Tensor:
    """``ids`` as int64 b × tokens × sub_tokens.

    Args:
        prefix: whether fewer sub-tokens are allowed, at least one.

    Raises:
        TypeError: not an integer tensor.
        ValueError: another count of tokens or sub-tokens, or an id outside 0 … id_count − 1.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        kind = f"{ids.dtype} tensor" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be an integer tensor, not a {kind}")
    allowed = range(1 if prefix else sub_tokens, sub_tokens + 1)
    if ids.ndim != 3 or ids.shape[1] != code_length or ids.shape[2] not in allowed:
        needed = f"1 to {sub_tokens}" if prefix else sub_tokens
        raise ValueError(f"ids have shape {tuple(ids.shape)}; this tokenizer needs (batch, {code_length}, {needed})")
    if ids.numel() and (ids.min() < 0 or ids.max() >= id_count):
        raise ValueError(f"ids run from {ids.min()} to {ids.max()}; this tokenizer's run from 0 to {id_count - 1}")
    return ids.long()
