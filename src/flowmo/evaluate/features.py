"""Networks whose features distances between sets of pictures are taken over, and which of them can be had."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from flowmo.errors import FlowMoError
from flowmo.perceptual import ResNetLogits, WeightsNotFoundError

KINDS = ("auto", "inception", "resnet", "none")


class FeatureNetworkError(FlowMoError, RuntimeError):
    """A feature network that cannot be had; the message says what to install, or which file to put where."""


class Features(NamedTuple):
    """What a network sees in b pictures: pooled features b × channels; where it has them, the logits of its classifier
    b × classes and the spatial features b × n of the sFID."""

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class FeatureNetwork(Protocol):
    """A frozen network; ``name`` is told with every result, and only ``is_fid`` lets a distance be called FID."""

    name: str
    channels: int
    is_fid: bool

    def __call__(self, images: Tensor) -> Features:
        """Of pictures b 3 h w in [−1, 1]."""


class ResNetFeatures(nn.Module):
    """The 2048 pooled features of a ResNet-50, for machines where Inception cannot be had. Not an FID.

    Raises:
        WeightsNotFoundError: see ``flowmo.perceptual.find_weights``.
    """

    channels = 2048
    is_fid = False

    def __init__(self, weights: str | Path | None = None, download: bool = True):
        super().__init__()
        self.resnet = ResNetLogits(weights, download)
        self.name = f"pooled features of {self.resnet.name}"

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        with torch.autocast(images.device.type, enabled=False):
            pooled = self.resnet.features(images)
            return Features(pooled, self.resnet.network.fc(pooled))


def build_features(kind: str = "auto", weights: str | Path | None = None, download: bool = True) -> FeatureNetwork:
    """The feature network of that ``kind``.

    Args:
        kind: ``inception`` is that of FIDs; ``resnet`` a stand-in; ``auto`` the first of them that can be had.
        weights: folder to look in first.

    Raises:
        FeatureNetworkError: it cannot be had; the message has the reason.
    """
    from flowmo.evaluate.inception import FIDInception

    kinds = {"inception": [FIDInception], "resnet": [ResNetFeatures], "auto": [FIDInception, ResNetFeatures]}
    reasons = []
    for network in kinds[kind]:
        try:
            return network(weights, download)
        except (FlowMoError, WeightsNotFoundError) as error:
            reasons.append(str(error))
    raise FeatureNetworkError("; ".join(reasons))
