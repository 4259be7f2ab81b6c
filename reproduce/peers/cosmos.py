"""Cosmos DI (NVIDIA 2025): one id of 64 000 (FSQ levels 8·8·8·5·5·5) per 8 × 8 or 16 × 16 pixels.

NVIDIA publishes the networks as TorchScript, and its own package runs them as such.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from flowmo.errors import one_line
from reproduce.peers.base import PeerError, TokenNetwork

LEVELS = (8, 8, 8, 5, 5, 5)
FILES = ("encoder.jit", "decoder.jit")


class Cosmos(TokenNetwork):
    """``encoder.jit`` and ``decoder.jit`` of a folder. TorchScript is a program: name only folders that you trust."""

    id_count = math.prod(LEVELS)

    def read(self, path: str | Path) -> None:
        for name, file in zip(("encoder", "decoder"), FILES, strict=True):
            try:
                setattr(self, name, torch.jit.load(str(Path(path) / file), map_location="cpu").float())
            except (RuntimeError, ValueError, OSError) as error:
                reason = one_line(error, 100)
                raise PeerError(f"{Path(path) / file} is not TorchScript of a Cosmos tokenizer ({reason}).") from None

    def encode(self, x: Tensor) -> Tensor:
        out = self.encoder(x)
        return (out[0] if isinstance(out, tuple) else out).long()

    def decode(self, ids: Tensor) -> Tensor:
        return self.decoder(ids)
