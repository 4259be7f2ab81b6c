"""The interface of every bottleneck: ``quantizer(code) -> Quantized`` in training, ids <-> code in inference."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flowmo.config.sections import ModelConfig

WholeBatch = Callable[[Tensor], Tensor]
"""Maps a statistic of a micro-batch to its mean over the global batch, without gradient."""


def local_statistic(statistic: Tensor) -> Tensor:
    """Return a statistic as it is: the ``WholeBatch`` of a global batch that is a single micro-batch."""
    return statistic


@dataclass(frozen=True)
class Quantized:
    """Output of a bottleneck in training.

    Attributes:
        code: b × tokens × channels, input of the decoder; gradients flow to the encoder.
        ids: int64 b × tokens × sub-tokens, or ``None`` for a continuous bottleneck.
        losses: named scalar terms, already weighted.
        statistics: named scalars for the log, unweighted.
        noise_level: b in [0, 1], share of noise in the code; the decoder trains on timesteps from there on.
    """

    code: Tensor
    ids: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    noise_level: Tensor | None = None


def straight_through(quantized: Tensor, code: Tensor) -> Tensor:
    """Return ``quantized`` exactly, with the gradient of ``code``."""
    return quantized + (code - code.detach())


class Quantizer(nn.Module):
    """Base class of bottlenecks. Used directly, it is the identity (``noop`` in the release).

    The mean of the gradients of all micro-batches is the gradient of the global batch's loss, if ``whole_batch``
    returns the same means to each micro-batch.

    Attributes:
        channels: channels of ``Quantized.code`` per token.
        encoder_channels: channels of the encoder's output per token.
        sub_tokens: ids per token; ``None`` if continuous.
        id_count: ids run from 0 to ``id_count`` − 1; ``None`` if continuous.
        needs_whole_batch: True if a loss depends nonlinearly on a mean over the batch, and so calls ``whole_batch``.
    """

    needs_whole_batch = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.channels = self.encoder_channels = config.context_dim
        self.sub_tokens: int | None
        self.id_count: int | None
        self.sub_tokens, self.id_count = config.ids_per_token or (None, None)

    def forward(self, code: Tensor, whole_batch: WholeBatch = local_statistic) -> Quantized:
        """Quantize with losses and noise. code: b × tokens × encoder_channels."""
        return Quantized(*self.quantize(code))

    def quantize(self, code: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the decoder's code, with a gradient to ``code``, and its ids."""
        return code.float(), None

    def code_from_ids(self, ids: Tensor) -> Tensor:
        """int64 b × tokens × sub_tokens -> float32 b × tokens × channels."""
        raise TypeError("This tokenizer's code is continuous and has no ids. Keep the Codes that encode returned.")

    def sub_token_of(self, channel: Tensor) -> Tensor:
        """Index of the sub-token that each channel belongs to, for nested dropout."""
        raise TypeError("Nested dropout needs the sub-tokens of fsq or lfq.")

    def keep_prefix(self, code: Tensor, kept: Tensor | int) -> Tensor:
        """Nested dropout: set the channels of all but the first sub-tokens to 0, which means "not sent".

        Args:
            code: quantized, b × tokens × channels.
            kept: sub-tokens to keep, from 1: a number, or int64 that broadcasts to b × tokens × 1.
        """
        channel = torch.arange(code.shape[-1], device=code.device)
        return code * (self.sub_token_of(channel) < kept).to(code.dtype)

    def learn(self, step: int = 0) -> None:
        """Change buffers, without gradients, by the last training batch: once per step and alike on every rank.

        ``step`` seeds the noise.
        """
