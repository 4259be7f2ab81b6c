"""The feature network of the FID: Inception of 2015-12-05, ported from TensorFlow by ``torch-fidelity``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from flowmo.evaluate.features import FeatureNetworkError, Features
from flowmo.perceptual import find_weights
from flowmo.pictures import to_bytes
from flowmo.pth import PthError, read_pth
from flowmo.torchvision_import import import_torchvision

WEIGHTS = (
    ("weights-inception-2015-12-05-6726825d.pth", "inception-2015-12-05.pth"),
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
SPATIAL_CHANNELS = 7


class FIDInception(nn.Module):
    """Pictures to the 2048 features that FIDs are taken over, the 1008 logits of Inception Scores, and the 2023 spatial
    features of sFIDs (the first 7 channels of ``mixed_6/conv``, as the ADM evaluator takes them).

    Args:
        weights: folder to look in first; then ``FLOWMO_WEIGHTS``, the torch hub cache, a download.
        download: whether weights found nowhere may be downloaded.

    Attributes:
        name: to be told with every result.
        channels: 2048.
        has_logits: whether the weights came with their classifier; some copies of the network lack it.

    Raises:
        TorchvisionError: torchvision is missing.
        FeatureNetworkError: ``torch-fidelity`` is missing, or the file is not this network's.
        WeightsNotFoundError: the weights are nowhere.
    """

    name = "Inception 2015-12-05 (TensorFlow's, ported by torch-fidelity)"
    channels, spatial_channels = 2048, 2023
    is_fid = True

    def __init__(self, weights: str | Path | None = None, download: bool = True):
        super().__init__()
        import_torchvision()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
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
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].flatten(1)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """images: b 3 h w in [−1, 1], seen rounded to 8 bits as files are; features in float32."""
        with torch.autocast(images.device.type, enabled=False):
            pooled, logits = self.network(to_bytes(images))
        return Features(pooled, logits if self.has_logits else None, self._spatial)
