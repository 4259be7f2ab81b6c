"""The interface of feature networks, the ResNet-50 stand-in, and reproducible batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.errors import FlowMoError
from flowmo.losses.perceptual import ResNetLogits, in_float32
from flowmo.precision import tf32

BATCH = 8


class FeatureNetworkError(FlowMoError, RuntimeError):
    """A feature network cannot be built. The message names the package or the file that it needs."""


class Features(NamedTuple):
    """Features of b images: pooled b × channels, classifier logits b × classes, spatial features of sFID b × n."""

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None

    @classmethod
    def cat(cls, parts: Iterable[Features]) -> Features:
        """Concatenate the features of several batches."""
        columns = zip(*parts, strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


class FeatureNetwork(nn.Module):
    """A frozen network: images b × 3 × h × w in [−1, 1] -> ``Features``.

    Attributes:
        name: printed with every result.
        is_fid: the Fréchet distance of these features may be called FID.
    """

    name: str
    is_fid = False


class ResNetFeatures(FeatureNetwork):
    """Pooled features of a ResNet-50, for machines without FID's Inception. Not an FID.

    Raises:
        WeightsNotFoundError: see ``flowmo.losses.perceptual.find_weights``.
    """

    def __init__(self, weights: str | Path | None = None, download: bool = True):
        super().__init__()
        self.resnet = ResNetLogits(weights, download)
        self.name = f"pooled features of {self.resnet.name}"

    @torch.no_grad()
    @in_float32
    def forward(self, images: Tensor) -> Features:
        pooled = self.resnet.features(images)
        return Features(pooled, self.resnet.network.fc(pooled))


@tf32(False)
def in_fixed_batches(network: Callable[..., Any], *images: Tensor, batch_size: int = BATCH) -> Any:
    """Run a network on images b × 3 × h × w, or on pairs of them, in batches of one size; the last is padded.

    Rounding depends on the batch size. With a fixed one, the output of an image does not depend on its batch.

    Returns:
        ``Features`` or a tensor, as the network returns.
    """
    count = len(images[0])
    outputs = []
    for chunk in zip(*(x.split(batch_size) for x in images), strict=True):
        padding = batch_size - len(chunk[0])
        outputs.append(network(*(F.pad(x, (0, 0, 0, 0, 0, 0, 0, padding)) for x in chunk)))
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)[:count]
    return Features(*(None if column is None else column[:count] for column in Features.cat(outputs)))
