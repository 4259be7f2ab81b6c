"""Another tokenizer as a candidate of an evaluation: one interface, whatever is behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flowmo.checkpoint.pth import PthError, read_pth
from flowmo.errors import FlowMoError
from flowmo.evaluate.reconstruction import Reconstruction

SIDE = 256
"""All of Table 1 is measured at 256 × 256."""


class PeerError(FlowMoError, RuntimeError):
    """A tokenizer that cannot be had; the message says what to install, or which file to name."""


class TokenNetwork(nn.Module):
    """A network with a vocabulary.

    Attributes:
        id_count: ids run from 0 to ``id_count`` − 1.
        low: what the network calls black; white is 1.
    """

    id_count: int
    low: float = -1.0

    def encode(self, x: Tensor) -> Tensor:
        """Pictures b 3 h w from ``low`` to 1 -> ids, int64 b × tokens in any shape."""
        raise NotImplementedError

    def decode(self, ids: Tensor) -> Tensor:
        """What ``encode`` returned -> pictures b 3 h w from ``low`` to 1."""
        raise NotImplementedError


class Peer:
    """A token network as a ``flowmo.evaluate.reconstruction.Reconstructor``."""

    def __init__(self, name: str, network: TokenNetwork, device: torch.device | str = "cpu"):
        self.name, self.id_count = name, network.id_count
        self.network = network.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        low = self.network.low
        x = (images.to(self.device) + 1) / 2 * (1 - low) + low
        ids = self.network.encode(x)
        y = (self.network.decode(ids).float() - low) / (1 - low) * 2 - 1
        flat = ids.flatten(1).cpu()
        bits = torch.full((len(images),), flat.shape[1] * math.log2(self.id_count))
        return Reconstruction(y.clamp(-1, 1).cpu(), bits, flat)


def read_weights(path: str | Path, *within: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or pickled file, without running code from it.

    Args:
        within: keys under one of which they may lie.

    Raises:
        PeerError: no such file, or no tensors in it.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Mapping = read_pth(path)
    except (OSError, PthError, SafetensorError) as error:
        raise PeerError(f"{path}: cannot be read ({' '.join(str(error).split())[:150]})") from None
    for key in within:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise PeerError(f"{path}: holds no weights by name")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def fill(network: nn.Module, weights: Mapping[str, Tensor], path: str | Path, wanted: Callable[[str], bool]) -> None:
    """Put ``weights`` into a network; those that ``wanted`` is false of belong to training only.

    Raises:
        PeerError: one is missing or of another shape, or there is one that the network does not have.
    """
    ours = network.state_dict()
    theirs = {name: value for name, value in weights.items() if wanted(name)}
    wrong = list(ours.keys() ^ theirs.keys())
    wrong += [name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape]
    if wrong:
        raise PeerError(f"{path}: not its weights; {len(wrong)} tensors differ, such as {min(wrong)}")
    network.load_state_dict(theirs)
