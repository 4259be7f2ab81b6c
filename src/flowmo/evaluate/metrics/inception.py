"""The feature network of the FID: Inception of 2015-12-05, ported from TensorFlow by ``torch-fidelity``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.checkpoint.pth import PthError, read_pth
from flowmo.evaluate.metrics.features import FeatureNetworkError, Features
from flowmo.images import to_bytes
from flowmo.losses.perceptual import find_weights, in_float32
from flowmo.losses.torchvision_import import import_torchvision

WEIGHTS = (
    ("weights-inception-2015-12-05-6726825d.pth", "inception-2015-12-05.pth"),
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
SPATIAL_CHANNELS = 7
SIDE = 299
PROTOCOLS = {
    "default": "Inception 2015-12-05 (TensorFlow's, ported by torch-fidelity)",
    "legacy": "Inception 2015-12-05, as the release: float images, resized by F.interpolate",
}


class FIDInception(nn.Module):
    """Pictures to the 2048 features that FIDs are taken over, the 1008 logits of Inception Scores, and the 2023 spatial
    features of sFIDs: the first 7 channels of ``mixed_6/conv`` in the ADM evaluator's order row, column, channel.

    Args:
        weights: folder to look in first; then ``FLOWMO_WEIGHTS``, the torch hub cache, a download.
        download: whether weights found nowhere may be downloaded.
        protocol: ``default`` sees 8-bit images and resizes them as TensorFlow 1 did, like torch-fidelity and ADM.
            ``legacy`` sees float images and resizes them by ``F.interpolate``, like the release's copy of pytorch-fid;
            the paper's rFID is of this protocol.

    Attributes:
        name: to be told with every result; it names the protocol.
        channels: 2048.
        has_logits: whether the weights came with their classifier; some copies of the network lack it.

    Raises:
        TorchvisionError: torchvision is missing.
        FeatureNetworkError: ``torch-fidelity`` is missing, or the file is not this network's.
        WeightsNotFoundError: the weights are nowhere.
    """

    channels, spatial_channels = 2048, 2023
    is_fid = True

    def __init__(self, weights: str | Path | None = None, download: bool = True, protocol: str = "default"):
        super().__init__()
        self.protocol, self.name = protocol, PROTOCOLS[protocol]
        import_torchvision()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
            from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
        except ImportError:
            raise FeatureNetworkError("this needs torch-fidelity: pip install 'flowmo[evaluate]'") from None
        path = find_weights(*WEIGHTS, weights, download)
        try:
            read_pth(path)  # torch-fidelity would run code from the file
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except (PthError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:150]
            raise FeatureNetworkError(f"{path}: not the weights of FID's Inception ({reason})") from None
        self.has_logits = bool(self.network.fc.weight.any())
        self.classes = 1008 if self.has_logits else 0
        self._resize_as_tensorflow: Callable[..., Tensor] = interpolate_bilinear_2d_like_tensorflow1x
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def _input(self, images: Tensor) -> Tensor:
        """What the first convolution sees, b 3 299 299 in about [−1, 1]."""
        if self.protocol == "legacy":
            return F.interpolate(images.clamp(-1, 1), (SIDE, SIDE), mode="bilinear", align_corners=False)
        return (self._resize_as_tensorflow(to_bytes(images).float(), (SIDE, SIDE), align_corners=False) - 128) / 128

    @torch.no_grad()
    @in_float32
    def forward(self, images: Tensor) -> Features:
        """images: b 3 h w in [−1, 1]; features in float32."""
        *layers, classifier = self.network.children()  # in the order of its own forward, which takes bytes only
        pooled = self._input(images)
        for layer in layers:
            pooled = layer(pooled)
        pooled = pooled.flatten(1)
        return Features(pooled, pooled @ classifier.weight.T if self.has_logits else None, self._spatial)
