"""The common interface of published tokenizers, and the reading of their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flowmo.checkpoint import CheckpointError
from flowmo.checkpoint.pth import read_pth
from flowmo.errors import FlowMoError, one_line
from flowmo.evaluate.reconstruction import Reconstruction

SIDE = 256
"""Image size of table 1."""


class PeerError(FlowMoError, RuntimeError):
    """A tokenizer cannot be built. The message names the package or the file that it needs."""


class TokenNetwork(nn.Module):
    """A tokenizer with a vocabulary, as a ``flowmo.evaluate.reconstruction.Reconstructor``.

    Attributes:
        side: size of its square images.
        id_count: vocabulary size; ids run from 0 to ``id_count`` − 1.
        low: pixel value of black; white is 1.
    """

    name: str = ""
    side = SIDE
    id_count: int
    low: float = -1.0
    device = torch.device("cpu")

    def encode(self, x: Tensor) -> Tensor:
        """Encode images b × 3 × h × w in [``low``, 1] as int64 ids, b × any shape."""
        raise NotImplementedError

    def decode(self, ids: Tensor) -> Tensor:
        """Decode the ids of ``encode`` to images b × 3 × h × w in [``low``, 1]."""
        raise NotImplementedError

    def read(self, path: str | Path) -> None:
        """Load the published weights. Raises ``PeerError`` if the file does not fit."""
        raise NotImplementedError

    @torch.no_grad()
    def reconstruct(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        ids = self.encode((images.to(self.device) + 1) / 2 * (1 - self.low) + self.low)
        y = (self.decode(ids).float() - self.low) / (1 - self.low) * 2 - 1
        flat = ids.flatten(1).cpu()
        bits = torch.full((len(images),), flat.shape[1] * math.log2(self.id_count))
        return Reconstruction(y.clamp(-1, 1).cpu(), bits, flat)


def read_weights(path: str | Path, *keys: str) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` or pickled file without running code from it.

    Args:
        keys: names of nested dicts that may hold the weights; the first that exists is taken.

    Raises:
        PeerError: the file is missing, damaged, or holds no named tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: object = read_pth(path)
    except (OSError, CheckpointError, SafetensorError) as error:
        raise PeerError(f"{path} cannot be read ({one_line(error)}).") from None
    for key in keys:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise PeerError(f"{path} holds no named weights.")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def load_exactly(
    network: nn.Module, weights: Mapping[str, Tensor], path: str | Path, keep: Callable[[str], bool] = lambda name: True
) -> None:
    """Load ``weights`` into a network, except names that ``keep`` rejects. Dots and underscores in names are ignored.

    Raises:
        PeerError: a tensor is missing, unknown, or of another shape.
    """

    def key(name: str) -> str:
        return name.replace(".", "").replace("_", "")

    ours = {key(name): (name, value.shape) for name, value in network.state_dict().items()}
    theirs = {key(name): value for name, value in weights.items() if keep(name)}
    wrong = ours.keys() ^ theirs.keys()
    wrong |= {name for name in ours.keys() & theirs.keys() if ours[name][1] != theirs[name].shape}
    if wrong:
        raise PeerError(
            f"{path} does not hold the weights of this tokenizer: {len(wrong)} tensors differ, such as {min(wrong)}."
        )
    network.load_state_dict({name: theirs[key(name)] for name, _ in ours.values()})
