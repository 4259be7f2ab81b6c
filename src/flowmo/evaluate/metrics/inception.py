"""FID's feature network: Inception of 2015-12-05, ported from TensorFlow by ``torch-fidelity``."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.checkpoint import CheckpointError
from flowmo.checkpoint.pth import read_pth
from flowmo.errors import one_line
from flowmo.evaluate.metrics.features import FeatureNetwork, FeatureNetworkError, Features
from flowmo.images import to_bytes
from flowmo.losses.perceptual import find_weights, in_float32
from flowmo.model.torchvision_import import import_torchvision

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


class FIDInception(FeatureNetwork):
    """Images to the 2048 features of FID, the 1008 logits of the Inception Score and the 2023 spatial features of sFID.

    Spatial features are the first 7 channels of ``mixed_6/conv``, in the ADM evaluator's order row, column, channel.

    Args:
        weights: folder to search first; then come ``FLOWMO_WEIGHTS``, the torch hub cache and a download.
        download: allow the download.
        protocol: ``default`` rounds images to 8 bits and resizes them as TensorFlow 1 did, like torch-fidelity and ADM.
            ``legacy`` resizes float images by ``F.interpolate``, like the release's copy of pytorch-fid. The
            paper's rFID has probably the legacy protocol.

    Raises:
        TorchvisionError: torchvision is missing.
        FeatureNetworkError: ``torch-fidelity`` is missing, or the file does not fit.
        WeightsNotFoundError: no weights were found.
    """

    is_fid = True

    def __init__(self, weights: str | Path | None = None, download: bool = True, protocol: str = "default"):
        super().__init__()
        self.protocol, self.name = protocol, PROTOCOLS[protocol]
        import_torchvision()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
            from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
        except ImportError:
            raise FeatureNetworkError("FID needs torch-fidelity. Install it: pip install 'flowmo[evaluate]'.") from None
        path = find_weights(*WEIGHTS, weights, download)
        try:
            read_pth(path)  # torch-fidelity would run code from the file
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except (CheckpointError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
            reason = one_line(error)
            raise FeatureNetworkError(f"{path} does not hold the weights of FID's Inception ({reason}).") from None
        self.has_classifier = bool(self.network.fc.weight.any())  # some copies of the weights lack the classifier
        self._resize_as_tensorflow = interpolate_bilinear_2d_like_tensorflow1x
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def _input(self, images: Tensor) -> Tensor:
        """Input of the first convolution, b × 3 × 299 × 299 in about [−1, 1]."""
        if self.protocol == "legacy":
            return F.interpolate(images.clamp(-1, 1), (SIDE, SIDE), mode="bilinear", align_corners=False)
        return (self._resize_as_tensorflow(to_bytes(images).float(), (SIDE, SIDE), align_corners=False) - 128) / 128

    @torch.no_grad()
    @in_float32
    def forward(self, images: Tensor) -> Features:
        *layers, classifier = self.network.children()  # its own forward takes 8-bit images only
        pooled = self._input(images)
        for layer in layers:
            pooled = layer(pooled)
        pooled = pooled.flatten(1)
        return Features(pooled, pooled @ classifier.weight.T if self.has_classifier else None, self._spatial)
