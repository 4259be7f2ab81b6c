"""Perceptual distances of images in [−1, 1], ``distance(x, y) -> b``, and the search for their trained weights.

LPIPS is stage 1A's distance and a metric; the logits of a ResNet-50 are stage 1B's. Both networks are
defined here because the ``lpips`` package needs torchvision, which the base install does without.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flowmo.checkpoint import CheckpointError
from flowmo.checkpoint.pth import read_pth
from flowmo.errors import FlowMoError, check_side, one_line
from flowmo.losses.resnet import ResNet50

Result = TypeVar("Result")

TORCH_HUB = "https://download.pytorch.org/models"
LPIPS_HUB = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
# network: (accepted file names, download address)
BACKBONES = {
    "vgg": (("vgg16-397923af.pth", "vgg16_torchvision_features.pth"), f"{TORCH_HUB}/vgg16-397923af.pth"),
    "alex": (("alexnet-owt-7be5be79.pth", "alexnet_torchvision_features.pth"), f"{TORCH_HUB}/alexnet-owt-7be5be79.pth"),
}
HEADS = {net: ((f"lpips_{net}_heads.pth", f"{net}.pth"), f"{LPIPS_HUB}/{net}.pth") for net in BACKBONES}
RESNET = (("resnet50-0676ba61.pth", "resnet50_caffe.safetensors"), f"{TORCH_HUB}/resnet50-0676ba61.pth")
"""torchvision's ImageNet V1 weights, as in the release. The original weights, as Keras ships them, can replace them."""

# Layers of torchvision's ``features``: a convolution with a ReLU as (channels, kernel, stride, padding), or a max-pool
# of stride 2 as its kernel. LPIPS compares the maps after the ReLUs at the indices of ``MAPS``.
LAYERS: dict[str, tuple[Any, ...]] = {
    "vgg": (
        *(*[(64, 3, 1, 1)] * 2, 2, *[(128, 3, 1, 1)] * 2, 2, *[(256, 3, 1, 1)] * 3, 2),
        *(*[(512, 3, 1, 1)] * 3, 2, *[(512, 3, 1, 1)] * 3),
    ),
    "alex": ((64, 11, 4, 2), 3, (192, 5, 1, 2), 3, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)),
}
MAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
SMALLEST_SIDE = {"vgg": 16, "alex": 31}
"""Smallest side of an image, in pixels, for which the last layer's map is not empty."""


class WeightsNotFoundError(FlowMoError, FileNotFoundError):
    """Trained weights were found nowhere."""


def find_weights(names: tuple[str, ...], url: str, folder: str | Path | None = None, download: bool = True) -> Path:
    """Return the first of ``names`` found in ``folder``, in ``$FLOWMO_WEIGHTS`` or in the torch hub cache.

    If there is none, download ``url`` into the cache.

    Raises:
        WeightsNotFoundError: the file is nowhere and cannot be downloaded.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    folders = [*(Path(named) for named in (folder, os.environ.get("FLOWMO_WEIGHTS")) if named), cache]
    for path in (parent / name for parent in folders for name in names):
        if path.is_file():
            return path
    reason = "downloads are switched off"
    if download:
        cache.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(cache / names[0]), progress=False)
            return cache / names[0]
        except OSError as error:
            reason = f"the download failed ({error})"
    raise WeightsNotFoundError(
        f"There is no {' or '.join(names)} in {', '.join(map(str, folders))}, and {reason}. "
        f"Fetch {url} and put it into a folder named by FLOWMO_WEIGHTS."
    )


def in_float32(method: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate a network's method to compute in float32, inside autocast too. Training on a GPU may use TF32 for it.

    In bfloat16, features of similar images round to the same numbers: for noise of deviation 0.01 on 16 photographs,
    LPIPS was off by up to 12 %, ResNet-50 distances by up to 68 %.
    """

    @wraps(method)
    def run(self: nn.Module, *images: Tensor, **named: Tensor) -> Result:
        floats, named_floats = [x.float() for x in images], {name: x.float() for name, x in named.items()}
        device = next(itertools.chain(floats, named_floats.values())).device
        with torch.autocast(device.type, enabled=False):
            return method(self, *floats, **named_floats)

    return run


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Raise ``CheckpointError`` if the file holds another network's weights."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, RuntimeError, AttributeError, TypeError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not the weights of this network ({one_line(error)}).") from None


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, version 0.1) of images b × c × h × w in [−1, 1]: float32 b.

    Frozen, and in float32 inside autocast too.

    Args:
        net: ``vgg``, the training loss of the paper and the release, or ``alex``, 50 times cheaper.
        weights: folder to search first.
        download: allow downloads of missing files.
        pretrained: load trained weights; False leaves random ones, for measurements of cost.
        dtype: of the convolutions. bfloat16 is for training: it is off by 1 % for images that differ by noise of
            deviation 0.05, and by 14 % for 0.01.

    Raises:
        WeightsNotFoundError: see ``find_weights``.
        CheckpointError: a file is damaged, unsafe, or of another network.
        SmallImageError: images have less than 31 (alex) or 16 (vgg) pixels a side.
        ValueError: ``net`` is unknown.
    """

    def __init__(
        self,
        net: str = "vgg",
        weights: str | Path | None = None,
        download: bool = True,
        pretrained: bool = True,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if net not in LAYERS:
            raise ValueError(f"There is no LPIPS network {net!r}. Use vgg or alex.")
        self.dtype, self.maps, self.smallest_side = dtype, MAPS[net], SMALLEST_SIDE[net]
        self.name = f"LPIPS ({net})" if dtype == torch.float32 else f"LPIPS ({net}, {str(dtype).split('.')[-1]})"
        layers: list[nn.Module] = []
        channels = 3
        for layer in LAYERS[net]:
            if isinstance(layer, int):
                layers.append(nn.MaxPool2d(layer, 2))
            else:
                layers += [nn.Conv2d(channels, *layer, dtype=dtype), nn.ReLU()]
                channels = layer[0]
        self.network = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Conv2d(layers[i - 1].out_channels, 1, 1, bias=False) for i in self.maps)
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.eval().requires_grad_(False)
        if pretrained:
            backbone, heads = (find_weights(*files[net], weights, download) for files in (BACKBONES, HEADS))
            self._load(backbone, heads)
            self.to(memory_format=torch.channels_last)

    def _load(self, backbone: Path, heads: Path) -> None:
        with _loading(backbone):
            state = {name.removeprefix("features."): value for name, value in read_pth(backbone).items()}
            self.network.load_state_dict({name: state[name] for name in self.network.state_dict()})
        with _loading(heads):
            state = read_pth(heads)
            for i, head in enumerate(self.heads):
                head.load_state_dict({"weight": state[f"lin{i}.model.1.weight"]})

    @in_float32
    def features(self, x: Tensor) -> list[Tensor]:
        """Return unit-length float32 feature maps of images b × c × h × w in [−1, 1], one per index of ``MAPS``."""
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        x = x.to(self.dtype)
        maps = []
        for index, layer in enumerate(self.network):
            x = layer(x)
            if index in self.maps:
                values = x.float()
                # without the floor, all-zero channels would have a NaN gradient
                length = values.square().sum(dim=1, keepdim=True).clamp_min(1e-20).sqrt()
                maps.append(values / (length + 1e-10))
        return maps

    @in_float32
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        check_side(self.name, x.shape, self.smallest_side)
        total = 0
        for a, b, head in zip(self.features(x), self.features(y), self.heads, strict=True):
            total = total + torch.einsum("bchw,c->bhw", (a - b).square(), head.weight.flatten()).mean((1, 2))
        return total


class MeanLPIPS(nn.Module):
    """Mean of the LPIPS of several networks: a decoder that is trained with one gains little in the other."""

    def __init__(self, distances: Sequence[nn.Module]):
        super().__init__()
        self.distances = nn.ModuleList(distances)
        self.name = f"mean of {' and '.join(distance.name for distance in distances)}"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([distance(x, y) for distance in self.distances]).mean(0)


class ResNetLogits(nn.Module):
    """Mean squared difference of ResNet-50's ImageNet logits of images b × c × h × w in [−1, 1] (section 3.3): b.

    Frozen and always in float32. Arguments and errors as for ``LPIPS``. ``name`` says which weights are in use.
    """

    SIDE = 224

    def __init__(self, weights: str | Path | None = None, download: bool = True, pretrained: bool = True):
        super().__init__()
        path = find_weights(*RESNET, weights, download) if pretrained else None
        self.caffe = path is not None and path.suffix == ".safetensors"
        self.network = ResNet50(self.caffe)
        if self.caffe:
            self.name = "resnet50 (Keras' weights, in the place of torchvision's)"
            mean, std = torch.tensor([123.68, 116.779, 103.939]) / 255, torch.full((3,), 1 / 255)
        else:
            self.name = "resnet50 (torchvision)"
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", std[:, None, None], persistent=False)
        if path is not None:
            with _loading(path):
                counters = {n: b for n, b in self.network.named_buffers() if n.endswith("num_batches_tracked")}
                state = load_file(path) if self.caffe else read_pth(path)
                self.network.load_state_dict({**counters, **{name: value.float() for name, value in state.items()}})
            self.to(memory_format=torch.channels_last)
        self.eval().requires_grad_(False)

    @in_float32
    def features(self, x: Tensor) -> Tensor:
        """Return the pooled features b × 2048 of images b × c × h × w in [−1, 1]."""
        x = F.interpolate(x / 2 + 0.5, (self.SIDE, self.SIDE), mode="bilinear", antialias=True, align_corners=False)
        x = (x - self.mean) / self.std
        x = x.flip(1) if self.caffe else x  # Caffe's channels are B, G, R
        return self.network.features(x.contiguous(memory_format=torch.channels_last))

    @in_float32
    def logits(self, x: Tensor) -> Tensor:
        """Return float32 logits b × 1000 of images b × c × h × w in [−1, 1]."""
        return self.network.fc(self.features(x))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.logits(x) - self.logits(y)).square().mean(dim=1)


def build_distance(
    mode: str, weights: str | Path | None = None, pretrained: bool = True, dtype: torch.dtype = torch.float32
) -> LPIPS | MeanLPIPS | ResNetLogits:
    """Build the distance that ``opt.lpips_mode`` names: ``vgg``, ``alex``, their mean ``vgg+alex``, or ``resnet``.

    Args:
        dtype: of LPIPS' convolutions. In bfloat16 they are three times as fast on a CPU with matrix units. ``resnet``
            is always in float32, which its distances need.
    """
    if mode == "resnet":
        return ResNetLogits(weights, pretrained=pretrained)
    networks = [LPIPS(net, weights, pretrained=pretrained, dtype=dtype) for net in mode.split("+")]
    return networks[0] if len(networks) == 1 else MeanLPIPS(networks)
