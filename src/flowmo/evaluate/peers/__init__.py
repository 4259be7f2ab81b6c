"""The tokenizers of Tables 1 and 3 as candidates of an evaluation.

ViT-VQGAN and DiTo were never published as weights; their figures are in ``flowmo.evaluate.published``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from flowmo.evaluate.peers.base import SIDE, Peer, PeerError, TokenNetwork
from flowmo.evaluate.peers.continuous import HUB, ContinuousPeer
from flowmo.evaluate.peers.cosmos import Cosmos
from flowmo.evaluate.peers.llamagen import LlamaGen
from flowmo.evaluate.peers.magvit2 import OpenMagvit2
from flowmo.evaluate.peers.maskgit import MaskBit
from flowmo.evaluate.peers.titok import TiTok

__all__ = ["CONTINUOUS", "DISCRETE", "SIDE", "Peer", "PeerError", "build_peer"]

TITOK = "model.safetensors of yucornetto/tokenizer_titok_{}_imagenet"
DISCRETE: dict[str, tuple[str, Callable[[], TokenNetwork], str]] = {
    "titok-l32": (
        "TiTok-L-32",
        lambda: TiTok("large", 32),
        TITOK.format("l32"),
    ),
    "titok-b64": (
        "TiTok-B-64",
        lambda: TiTok("base", 64),
        TITOK.format("b64"),
    ),
    "titok-s128": (
        "TiTok-S-128",
        lambda: TiTok("small", 128),
        TITOK.format("s128"),
    ),
    "llamagen16": ("LlamaGen-16", lambda: LlamaGen(16), "vq_ds16_c2i.pt of FoundationVision/LlamaGen"),
    "llamagen32": ("LlamaGen-32", lambda: LlamaGen(8), "vq_ds8_c2i.pt of FoundationVision/LlamaGen"),
    "maskbit": ("MaskBiT", MaskBit, "maskbit_tokenizer_14bit.bin of markweber/maskbit_tokenizer"),
    "cosmos16": ("Cosmos DI-16x16", Cosmos, "the folder nvidia/Cosmos-0.1-Tokenizer-DI16x16"),
    "cosmos8": ("Cosmos DI-8x8", Cosmos, "the folder nvidia/Cosmos-0.1-Tokenizer-DI8x8"),
    "openmagvit2": (
        "OpenMagViT-V2",
        OpenMagvit2,
        "imagenet_256_L.ckpt of TencentARC/Open-MAGVIT2",
    ),
}
"""By the name to ask for: the name in Table 1, the network, and which file is its weights."""
CONTINUOUS = tuple(HUB)


def build_peer(name: str, weights: str | Path | None, device: torch.device | str = "cpu") -> Peer | ContinuousPeer:
    """The tokenizer of that name with its published weights from a local path.

    Raises:
        PeerError: no such tokenizer, no weights named, or they are not its own.
    """
    if name in CONTINUOUS:
        return ContinuousPeer(name, weights, device)
    if name not in DISCRETE:
        raise PeerError(f"no tokenizer {name!r}; there are {', '.join((*DISCRETE, *CONTINUOUS))}")
    title, build, file = DISCRETE[name]
    if not weights:
        raise PeerError(f"{name} needs its weights: {name}=PATH, {file}")
    network = build()
    network.read(weights)
    return Peer(title, network, device)
