"""ResNet-50 (He et al. 2016), whose logits stage 1B compares; torchvision's, which the base install does without."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = ((64, 3), (128, 4), (256, 6), (512, 3))
EXPANSION = 4


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolution beside a shortcut; the second strides, or with ``stride_first`` the first."""

    def __init__(self, inputs: int, planes: int, stride: int, stride_first: bool, eps: float):
        super().__init__()
        first, second = (stride, 1) if stride_first else (1, stride)
        outputs = EXPANSION * planes
        self.conv1 = nn.Conv2d(inputs, planes, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(planes, eps)
        self.conv2 = nn.Conv2d(planes, planes, 3, second, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, eps)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, eps)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs, eps)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """Pictures b 3 224 224, normalised, to 1000 logits. Its parameters have torchvision's names.

    Args:
        caffe: the original's variant, as Keras ships it: strides in the first convolution, another eps.
    """

    def __init__(self, caffe: bool = False):
        super().__init__()
        eps = 1e-3 if caffe else 1e-5
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64, eps)
        inputs = 64
        for i, (planes, count) in enumerate(LAYERS):
            blocks = []
            for j in range(count):
                blocks.append(Bottleneck(inputs, planes, 2 if i and not j else 1, caffe, eps))
                inputs = EXPANSION * planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, 1000)

    def features(self, x: Tensor) -> Tensor:
        """The 2048 pooled features b × 2048 that the logits are a linear function of."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for i in range(len(LAYERS)):
            x = getattr(self, f"layer{i + 1}")(x)
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))
