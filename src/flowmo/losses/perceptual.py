"""Perceptual distances ``distance(x, y) -> b`` of pictures in [−1, 1], and where their trained weights come from.

LPIPS is stage 1A's and the report's; the logits of a ResNet-50 are stage 1B's. LPIPS' network parts are those of the
``lpips`` package (v0.1 heads), defined here because that package needs torchvision, which the base install does
without. Weights are looked for, in this order, in

1. the folder given by the caller (``opt.perceptual_weights``),
2. the folder named by the environment variable ``FLOWMO_WEIGHTS``,
3. the torch hub cache, where they are downloaded to unless ``download=False``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flowmo.checkpoint.pth import PthError, read_pth
from flowmo.errors import FlowMoError
from flowmo.losses.resnet import ResNet50

Result = TypeVar("Result")

# (name, accepted file names, download address)
BACKBONES = {
    "vgg": (
        ("vgg16-397923af.pth", "vgg16_torchvision_features.pth"),
        "https://download.pytorch.org/models/vgg16-397923af.pth",
    ),
    "alex": (
        ("alexnet-owt-7be5be79.pth", "alexnet_torchvision_features.pth"),
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    ),
}
HEADS = {
    net: (
        (f"lpips_{net}_heads.pth", f"{net}.pth"),
        f"https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/{net}.pth",
    )
    for net in BACKBONES
}

RESNET = (
    ("resnet50-0676ba61.pth", "resnet50_caffe.safetensors"),
    "https://download.pytorch.org/models/resnet50-0676ba61.pth",
)
"""torchvision's ImageNet V1 weights, the paper's; the original's, as Keras ships them, stand in where those are not."""

# Convolution layers as (index in torchvision's ``features``, in, out, kernel, stride, padding); a new tap (a feature
# map that the distance compares) follows the last layer of each row, and max-pooling lies between the rows marked so.
VGG_ROWS = (
    ((0, 3, 64, 3, 1, 1), (2, 64, 64, 3, 1, 1)),
    ((5, 64, 128, 3, 1, 1), (7, 128, 128, 3, 1, 1)),
    ((10, 128, 256, 3, 1, 1), (12, 256, 256, 3, 1, 1), (14, 256, 256, 3, 1, 1)),
    ((17, 256, 512, 3, 1, 1), (19, 512, 512, 3, 1, 1), (21, 512, 512, 3, 1, 1)),
    ((24, 512, 512, 3, 1, 1), (26, 512, 512, 3, 1, 1), (28, 512, 512, 3, 1, 1)),
)
ALEX_ROWS = (
    ((0, 3, 64, 11, 4, 2),),
    ((3, 64, 192, 5, 1, 2),),
    ((6, 192, 384, 3, 1, 1),),
    ((8, 384, 256, 3, 1, 1),),
    ((10, 256, 256, 3, 1, 1),),
)
ARCHITECTURES = {  # rows, max-pool kernel, rows that a max-pool of stride 2 precedes
    "vgg": (VGG_ROWS, 2, (1, 2, 3, 4)),
    "alex": (ALEX_ROWS, 3, (1, 2)),
}
MEAN = (-0.030, -0.088, -0.188)  # LPIPS' own normalisation of pictures in [−1, 1]
STD = (0.458, 0.448, 0.450)


class WeightsNotFoundError(FlowMoError, FileNotFoundError):
    """Trained weights are in none of the places where they are looked for; the message says which file to put where."""


def build_distance(mode: str, weights: str | Path | None = None) -> LPIPS | ResNetLogits:
    """The distance that ``opt.lpips_mode`` names: ``vgg``, ``alex`` or ``resnet``."""
    return ResNetLogits(weights) if mode == "resnet" else LPIPS(mode, weights)


def blank_distance(mode: str) -> LPIPS | ResNetLogits:
    """The network of ``build_distance`` with random weights, for accounts and measurements of its cost."""
    return ResNetLogits.blank() if mode == "resnet" else LPIPS.blank(mode)


def channels_last(x: Tensor) -> Tensor:
    """b c h w with its channels adjacent in memory, as convolutions want them."""
    return x.contiguous(memory_format=torch.channels_last)


def in_float32(method: Callable[..., Result]) -> Callable[..., Result]:
    """Make a network's method compute in float32 inside autocast too.

    In bfloat16 the features of similar images round to nearly the same numbers: with noise of deviation 0.01 on 16
    photographs, single LPIPS distances were off by up to 12 %, ResNet-50 distances by up to 68 %.
    """

    @wraps(method)
    def run(self: nn.Module, *images: Tensor) -> Result:
        with torch.autocast(images[0].device.type, enabled=False):
            return method(self, *(x.float() for x in images))

    return run


def find_weights(names: tuple[str, ...], url: str, folder: str | Path | None = None, download: bool = True) -> Path:
    """The first of ``names`` found in the places that the module's docstring lists.

    Raises:
        WeightsNotFoundError: it is in none of them and could not be downloaded.
    """
    places = [Path(place) for place in (folder, os.environ.get("FLOWMO_WEIGHTS")) if place]
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for place in (*places, cache):
        for name in names:
            if (place / name).is_file():
                return place / name
    reason = "downloads are switched off"
    if download:
        cache.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(cache / names[0]), progress=False)
            return cache / names[0]
        except OSError as error:
            reason = f"the download failed ({error})"
    raise WeightsNotFoundError(
        f"no {' or '.join(names)} in {', '.join(map(str, (*places, cache)))}, and {reason}: "
        f"fetch {url} and put it into a folder named by FLOWMO_WEIGHTS"
    )


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Turns what loading another network's weights raises into one line."""
    try:
        yield
    except PthError:
        raise
    except (KeyError, RuntimeError, AttributeError, TypeError, OSError, SafetensorError) as error:
        raise PthError(f"{path}: not the weights of this network ({' '.join(str(error).split())[:150]})") from None


class LPIPS(nn.Module):
    """Learned perceptual distance between pictures (Zhang et al. 2018, version 0.1): ``distance(x, y) -> b``.

    Frozen: its parameters take no gradient, and a reference that needs none saves no activations. It computes in
    float32, inside autocast too.

    Args:
        net: ``vgg`` (the paper's training loss) or ``alex`` (the usual one to report, and a fiftieth of the cost).
        weights: folder to look in first.
        download: whether files found nowhere may be downloaded.

    Raises:
        WeightsNotFoundError: see ``find_weights``.
        PthError: a file is damaged, unsafe, or of another network.
        ValueError: an unknown ``net``.
    """

    def __init__(self, net: str = "vgg", weights: str | Path | None = None, download: bool = True):
        super().__init__()
        self._build(net)
        self._load(find_weights(*BACKBONES[net], weights, download), find_weights(*HEADS[net], weights, download))
        self.to(memory_format=torch.channels_last)

    @classmethod
    def blank(cls, net: str) -> LPIPS:
        """The network with random weights, for accounts of its cost."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._build(net)
        return self

    @property
    def name(self) -> str:
        """Which network this is, to be told with every result."""
        return f"LPIPS ({self.net})"

    def _build(self, net: str) -> None:
        if net not in ARCHITECTURES:
            raise ValueError(f"unknown LPIPS network {net!r}; use vgg or alex")
        self.net = net
        rows, self.pool, self.pooled_rows = ARCHITECTURES[net]
        self.rows = nn.ModuleList(
            nn.ModuleDict(
                {str(index): nn.Conv2d(i, o, kernel, stride, padding) for index, i, o, kernel, stride, padding in row}
            )
            for row in rows
        )
        self.heads = nn.ModuleList(nn.Conv2d(row[-1][2], 1, 1, bias=False) for row in rows)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def _load(self, backbone: Path, heads: Path) -> None:
        with _fitting(backbone):
            state = {key.removeprefix("features."): value for key, value in read_pth(backbone).items()}
            for row in self.rows:
                for index, conv in row.items():
                    conv.load_state_dict({"weight": state[f"{index}.weight"], "bias": state[f"{index}.bias"]})
        with _fitting(heads):
            state = read_pth(heads)
            for i, head in enumerate(self.heads):
                head.load_state_dict({"weight": state[f"lin{i}.model.1.weight"]})

    @in_float32
    def features(self, x: Tensor) -> list[Tensor]:
        """Unit-length feature maps of pictures b 3 h w in [−1, 1], one per row of the network, float32."""
        x = channels_last((x - self.mean) / self.std)
        maps = []
        for i, row in enumerate(self.rows):
            if i in self.pooled_rows:
                x = F.max_pool2d(x, self.pool, 2)
            for conv in row.values():
                x = F.relu(conv(x))
            # Where every channel is zero the length has no gradient; the floor makes that gradient 0, not NaN.
            length = x.square().sum(dim=1, keepdim=True).clamp_min(1e-20).sqrt()
            maps.append(x / (length + 1e-10))
        return maps

    @in_float32
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each pair of pictures, b 3 h w in [−1, 1] -> float32 b."""
        total = 0
        for a, b, head in zip(self.features(x), self.features(y), self.heads, strict=True):
            total = total + torch.einsum("bchw,c->bhw", (a - b).square(), head.weight.flatten()).mean((1, 2))
        return total


class ResNetLogits(nn.Module):
    """Mean squared difference of a ResNet-50's ImageNet logits, at 224 × 224 (section 3.3): ``distance(x, y) -> b``.

    Frozen, and in float32, as ``LPIPS``.

    Args:
        weights: folder to look in first.
        download: whether weights found nowhere may be downloaded.

    Attributes:
        name: which weights these are, to be told with every result.

    Raises:
        WeightsNotFoundError: see ``find_weights``.
        PthError: a file is damaged, unsafe, or of another network.
    """

    SIDE = 224
    IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    CAFFE_MEAN = (123.68, 116.779, 103.939)  # of 0…255; red, green, blue here, the network takes them backwards

    def __init__(self, weights: str | Path | None = None, download: bool = True):
        super().__init__()
        path = find_weights(*RESNET, weights, download)
        self._build(caffe=path.suffix == ".safetensors")
        with _fitting(path):
            state = load_file(path) if self.caffe else read_pth(path)
            state = {name: value.float() for name, value in state.items() if not name.endswith("num_batches_tracked")}
            missing, unexpected = self.network.load_state_dict(state, strict=False)
        if unexpected or [name for name in missing if not name.endswith("num_batches_tracked")]:
            raise WeightsNotFoundError(f"{path}: not the weights of a ResNet-50")
        self.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    @classmethod
    def blank(cls) -> ResNetLogits:
        """The network with random weights, for accounts of its cost."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._build(caffe=False)
        return self.eval().requires_grad_(False)

    def _build(self, caffe: bool) -> None:
        self.caffe = caffe
        self.name = "resnet50 (Keras' weights, in the place of torchvision's)" if caffe else "resnet50 (torchvision)"
        self.network = ResNet50(caffe)
        mean = torch.tensor(self.CAFFE_MEAN) / 255 if caffe else torch.tensor(self.IMAGENET_MEAN)
        std = torch.full((3,), 1 / 255) if caffe else torch.tensor(self.IMAGENET_STD)
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", std[:, None, None], persistent=False)

    @in_float32
    def features(self, x: Tensor) -> Tensor:
        """Pictures b 3 h w in [−1, 1] -> b 2048, of which the logits are a linear function."""
        x = F.interpolate(x / 2 + 0.5, (self.SIDE, self.SIDE), mode="bilinear", antialias=True, align_corners=False)
        x = (x - self.mean) / self.std
        return self.network.features(channels_last(x.flip(1) if self.caffe else x))

    @in_float32
    def logits(self, x: Tensor) -> Tensor:
        """Pictures b 3 h w in [−1, 1] -> float32 b 1000."""
        return self.network.fc(self.features(x))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each pair of pictures, b 3 h w in [−1, 1] -> float32 b."""
        return (self.logits(x) - self.logits(y)).square().mean(dim=1)
