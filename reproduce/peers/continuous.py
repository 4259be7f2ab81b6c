"""The continuous autoencoders of SDXL and FLUX, through diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowmo.errors import one_line
from flowmo.evaluate.reconstruction import Reconstruction
from flowmo.model.torchvision_import import before_importing
from reproduce.peers.base import SIDE, PeerError

HUB = {"sdxl": ("stabilityai/sdxl-vae", ""), "flux": ("black-forest-labs/FLUX.1-schnell", "vae")}
BITS = 16
"""Bits per number: codes are stored in half precision."""


class ContinuousPeer:
    """An autoencoder whose code is the mean of the encoder's Gaussian, which reconstructs best.

    Args:
        kind: ``sdxl`` or ``flux``.
        weights: a folder in diffusers' layout; by default the Hub's.

    Raises:
        PeerError: diffusers or the weights are missing.
    """

    id_count, side = None, SIDE

    def __init__(self, kind: str, weights: str | Path | None = None, device: torch.device | str = "cpu"):
        before_importing("diffusers")
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise PeerError(f"{kind} needs diffusers. Install it: pip install 'flowmo[peers]'.") from None
        name, subfolder = HUB[kind]
        try:
            if weights is None:
                vae = AutoencoderKL.from_pretrained(name, subfolder=subfolder or None)
            else:
                vae = AutoencoderKL.from_pretrained(weights, local_files_only=True)
        except (OSError, ValueError) as error:
            raise PeerError(
                f"{weights or name} is not an autoencoder ({one_line(error)}). Name a folder: {kind}=FOLDER."
            ) from None
        self.name = f"{kind.upper()}, continuous"
        self.device = torch.device(device)
        self.vae = vae.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        code = self.vae.encode(images.to(self.device)).latent_dist.mode()
        decoded = self.vae.decode(code).sample.float().clamp(-1, 1)
        return Reconstruction(decoded.cpu(), torch.full((len(images),), float(code[0].numel() * BITS)))
