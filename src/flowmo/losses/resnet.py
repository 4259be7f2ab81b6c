"""ResNet-50 (He et al. 2016) with torchvision's parameter names; the base install does without torchvision."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = ((64, 3), (128, 4), (256, 6), (512, 3))  # (width, blocks)
EXPANSION = 4


class Bottleneck(nn.Module):
    """Residual block of 1 × 1, 3 × 3 and 1 × 1 convolutions. ``stride_first`` strides the first, else the second."""

    def __init__(self, inputs: int, width: int, stride: int, stride_first: bool, eps: float):
        super().__init__()
        strides = (stride, 1) if stride_first else (1, stride)
        outputs = EXPANSION * width
        self.conv1 = nn.Conv2d(inputs, width, 1, strides[0], bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps)
        self.conv2 = nn.Conv2d(width, width, 3, strides[1], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, eps)
        shortcut = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs, eps))
        self.downsample = nn.Sequential(*shortcut) if stride != 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet50(nn.Module):
    """ImageNet classifier: normalised images b × 3 × 224 × 224 -> logits b × 1000.

    Args:
        caffe: the original variant, as Keras ships it, which strides in the first convolution and has another eps.
    """

    def __init__(self, caffe: bool = False):
        super().__init__()
        eps, inputs = 1e-3 if caffe else 1e-5, 64
        self.conv1 = nn.Conv2d(3, inputs, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs, eps)
        for i, (width, count) in enumerate(LAYERS):
            strides = [2 if i else 1] + [1] * (count - 1)
            widths = [inputs] + [EXPANSION * width] * (count - 1)
            blocks = [Bottleneck(w, width, stride, caffe, eps) for w, stride in zip(widths, strides, strict=True)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            inputs = EXPANSION * width
        self.fc = nn.Linear(inputs, 1000)

    def features(self, x: Tensor) -> Tensor:
        """Return the pooled features, b × 2048."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for i in range(len(LAYERS)):
            x = getattr(self, f"layer{i + 1}")(x)
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))
