"""An independent ImageNet classifier (MobileNet V2, torchvision's weights): do generated images show their class?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.checkpoint.pth import read_pth
from flowmo.generate.classes import imagenet_names
from flowmo.losses.perceptual import find_weights
from flowmo.model.torchvision_import import import_torchvision

NAME = "mobilenet_v2-b0353104.pth"
URL = f"https://download.pytorch.org/models/{NAME}"
SIDE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Classifier:
    """Predicts which of ``classes`` (WordNet ids) an image shows.

    Raises:
        WeightsNotFoundError: the weights cannot be found.
        TorchvisionError: torchvision is missing.
        ValueError: ImageNet-1K does not have a class.
    """

    def __init__(self, classes: Sequence[str]):
        numbers = {name: number for number, name in enumerate(imagenet_names())}
        unknown = [name for name in classes if name not in numbers]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a WordNet id of ImageNet-1K.")
        self.columns = torch.tensor([numbers[name] for name in classes])
        self.network = import_torchvision().models.mobilenet_v2()
        self.network.load_state_dict(read_pth(find_weights((NAME,), URL)))
        self.network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (b 3 h w in [−1, 1]) to indices of the likeliest classes (int64 b)."""
        x = F.interpolate(images / 2 + 0.5, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
        return self.network((x.clamp(0, 1) - mean) / deviation)[:, self.columns].argmax(dim=1)
