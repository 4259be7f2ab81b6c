"""Networks whose features distances between sets of pictures are taken over, and which of them can be had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.errors import FlowMoError
from flowmo.losses.perceptual import ResNetLogits, WeightsNotFoundError, in_float32

KINDS = ("auto", "inception", "inception-legacy", "resnet", "none")
AT_ONCE = 8


class FeatureNetworkError(FlowMoError, RuntimeError):
    """A feature network that cannot be had; the message says what to install, or which file to put where."""


class Features(NamedTuple):
    """What a network sees in b pictures: pooled features b × channels; where it has them, the logits of its classifier
    b × classes and the spatial features b × n of the sFID."""

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class FeatureNetwork(Protocol):
    """A frozen network; ``name`` is told with every result, and only ``is_fid`` lets a distance be called FID.

    Attributes:
        channels, classes, spatial_channels: widths of what it gives; 0 of what it does not.
    """

    @property
    def name(self) -> str: ...

    @property
    def channels(self) -> int: ...

    @property
    def classes(self) -> int: ...

    @property
    def spatial_channels(self) -> int: ...

    @property
    def is_fid(self) -> bool: ...

    def __call__(self, images: Tensor) -> Features:
        """Of pictures b 3 h w in [−1, 1]."""

    def to(self, device: torch.device) -> Self:
        """The network itself, moved there."""


class ResNetFeatures(nn.Module):
    """The 2048 pooled features of a ResNet-50, for machines where Inception cannot be had. Not an FID.

    Raises:
        WeightsNotFoundError: see ``flowmo.losses.perceptual.find_weights``.
    """

    channels, classes, spatial_channels = 2048, 1000, 0
    is_fid = False

    def __init__(self, weights: str | Path | None = None, download: bool = True):
        super().__init__()
        self.resnet = ResNetLogits(weights, download)
        self.name = f"pooled features of {self.resnet.name}"

    @torch.no_grad()
    @in_float32
    def forward(self, images: Tensor) -> Features:
        pooled = self.resnet.features(images)
        return Features(pooled, self.resnet.network.fc(pooled))


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute convolutions and matrix products of float32 in float32.

    On NVIDIA GPUs cuDNN's default is TF32, which keeps 10 bits of each factor's fraction.
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


@without_tf32()
def features_of(network: FeatureNetwork, images: Tensor, batch_size: int = AT_ONCE) -> Features:
    """A network's features of any number of images b 3 h w, computed in batches of one size."""
    kinds = zip(*(network(*chunk) for chunk in one_shape(images, batch_size=batch_size)), strict=True)
    return Features(*(None if parts[0] is None else torch.cat(parts)[: len(images)] for parts in kinds))


@without_tf32()
def in_one_shape(network: Callable[..., Tensor], *images: Tensor, batch_size: int = AT_ONCE) -> Tensor:
    """A network's output for images b 3 h w, or for pairs of them."""
    return torch.cat([network(*chunk) for chunk in one_shape(*images, batch_size=batch_size)])[: len(images[0])]


def one_shape(*images: Tensor, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
    """Images b 3 h w in batches of ``batch_size``, the last padded.

    Rounding depends on a batch's shape; with one shape a picture's figure does not depend on the batch it came in.
    """
    for chunk in zip(*(x.split(batch_size) for x in images), strict=True):
        missing = batch_size - len(chunk[0])
        yield tuple(F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)) for x in chunk)


def build_features(kind: str = "auto", weights: str | Path | None = None, download: bool = True) -> FeatureNetwork:
    """The feature network of that ``kind``.

    Args:
        kind: ``inception`` is the network of FIDs, ``inception-legacy`` the same by the release's protocol (see
            ``FIDInception``), ``resnet`` a stand-in, ``auto`` ``inception`` or else ``resnet``.
        weights: folder to look in first.

    Raises:
        FeatureNetworkError: it cannot be had; the message has the reason.
    """
    from flowmo.evaluate.metrics.inception import FIDInception

    kinds: dict[str, list[Callable[[str | Path | None, bool], FeatureNetwork]]] = {
        "inception": [FIDInception],
        "inception-legacy": [partial(FIDInception, protocol="legacy")],
        "resnet": [ResNetFeatures],
        "auto": [FIDInception, ResNetFeatures],
    }
    reasons = []
    for network in kinds[kind]:
        try:
            return network(weights, download)
        except (FlowMoError, WeightsNotFoundError) as error:
            reasons.append(str(error))
    raise FeatureNetworkError("; ".join(reasons))
