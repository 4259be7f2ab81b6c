"""The tokenizers of tables 1 and 3, as candidates of an evaluation.

The weights of ViT-VQGAN and DiTo were never published; ``flowmo.evaluate.published`` has their printed numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from reproduce.peers.base import SIDE, PeerError, TokenNetwork
from reproduce.peers.continuous import HUB, ContinuousPeer
from reproduce.peers.cosmos import Cosmos
from reproduce.peers.titok import TiTok
from reproduce.peers.vqgan import LlamaGen, MaskBit, OpenMagvit2

__all__ = ["CONTINUOUS", "DISCRETE", "SIDE", "PeerError", "build_peer"]

TITOK_FILE = "model.safetensors of yucornetto/tokenizer_titok_{}_imagenet"
DISCRETE: dict[str, tuple[str, Callable[[], TokenNetwork], str]] = {
    "titok-l32": ("TiTok-L-32", partial(TiTok, "large", 32), TITOK_FILE.format("l32")),
    "titok-b64": ("TiTok-B-64", partial(TiTok, "base", 64), TITOK_FILE.format("b64")),
    "titok-s128": ("TiTok-S-128", partial(TiTok, "small", 128), TITOK_FILE.format("s128")),
    "llamagen16": ("LlamaGen-16", partial(LlamaGen, 16), "vq_ds16_c2i.pt of FoundationVision/LlamaGen"),
    "llamagen32": ("LlamaGen-32", partial(LlamaGen, 8), "vq_ds8_c2i.pt of FoundationVision/LlamaGen"),
    "maskbit": ("MaskBiT", MaskBit, "maskbit_tokenizer_14bit.bin of markweber/maskbit_tokenizer"),
    "cosmos16": ("Cosmos DI-16x16", Cosmos, "the folder nvidia/Cosmos-0.1-Tokenizer-DI16x16"),
    "cosmos8": ("Cosmos DI-8x8", Cosmos, "the folder nvidia/Cosmos-0.1-Tokenizer-DI8x8"),
    "openmagvit2": ("OpenMagViT-V2", OpenMagvit2, "imagenet_256_L.ckpt of TencentARC/Open-MAGVIT2"),
}
"""Command-line name -> (name in table 1, network, file with its weights)."""
CONTINUOUS = tuple(HUB)


def build_peer(
    name: str, weights: str | Path | None, device: torch.device | str = "cpu"
) -> TokenNetwork | ContinuousPeer:
    """Build a published tokenizer from local weights.

    Raises:
        PeerError: no tokenizer has this name, or its weights are missing or wrong.
    """
    if name in CONTINUOUS:
        return ContinuousPeer(name, weights, device)
    if name not in DISCRETE:
        raise PeerError(f"There is no tokenizer {name!r}. Choose from {', '.join((*DISCRETE, *CONTINUOUS))}.")
    title, build, file = DISCRETE[name]
    if not weights:
        raise PeerError(f"{name} needs its weights. Name them: {name}=PATH ({file}).")
    network = build()
    network.read(weights)
    network.name, network.device = title, torch.device(device)
    return network.eval().requires_grad_(False).to(device)
