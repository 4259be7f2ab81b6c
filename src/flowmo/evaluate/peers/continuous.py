"""The continuous autoencoders of SDXL and FLUX, through diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmo.evaluate.peers.base import PeerError
from flowmo.evaluate.reconstruction import Reconstruction
from flowmo.losses.torchvision_import import before_importing

HUB = {"sdxl": ("stabilityai/sdxl-vae", ""), "flux": ("black-forest-labs/FLUX.1-schnell", "vae")}
BITS = 16
"""Their codes are kept in half precision."""


class ContinuousPeer:
    """Codes are the mean of the encoder's Gaussian, which is the best that it can do.

    Args:
        kind: ``sdxl`` or ``flux``.
        weights: folder as diffusers saves it; the Hub's where none is named.

    Raises:
        PeerError: diffusers is missing, or the weights are.
    """

    id_count = None

    def __init__(self, kind: str, weights: str | Path | None = None, device: torch.device | str = "cpu"):
        before_importing("diffusers")
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise PeerError(f"{kind} needs diffusers: pip install diffusers") from None
        name, subfolder = HUB[kind]
        try:
            if weights is None:
                vae = AutoencoderKL.from_pretrained(name, subfolder=subfolder or None)
            else:
                vae = AutoencoderKL.from_pretrained(weights, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise PeerError(f"{weights or name}: no autoencoder ({reason}); name a folder, {kind}=FOLDER") from None
        self._take(kind, vae, device)

    @classmethod
    def of(cls, kind: str, vae: Any, device: torch.device | str = "cpu") -> ContinuousPeer:
        """With an ``AutoencoderKL`` that is there already."""
        self = cls.__new__(cls)
        self._take(kind, vae, device)
        return self

    def _take(self, kind: str, vae: Any, device: torch.device | str) -> None:
        self.name = {"sdxl": "SDXL", "flux": "FLUX"}[kind] + ", continuous"
        self.vae = vae.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        code = self.vae.encode(images.to(self.device)).latent_dist.mode()
        pictures = self.vae.decode(code).sample.float().clamp(-1, 1)
        return Reconstruction(pictures.cpu(), torch.full((len(images),), float(code[0].numel() * BITS)))
