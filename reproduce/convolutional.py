"""A tokenizer of the other kind (Esser et al. 2021): convolutions, and a discriminator in the place of a flow.

Encoder and decoder are those of diffusers' VAE; between them are the same bits a token as a FlowMo's, on a lattice. It
learns mean squared error, LPIPS and, from a share of the run on, to please a discriminator of patches (Isola et al.
2017) under the hinge loss, whose weight is adapted so that its gradient at the last layer is as long as the others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowmo.config import Config
from flowmo.evaluate.reconstruction import Reconstruction
from flowmo.losses.perceptual import LPIPS
from flowmo.losses.torchvision_import import before_importing
from flowmo.model.quantizers import build_quantizer
from flowmo.model.transformer import code_lattice
from flowmo.tokenizer import Codes, identity_of
from reproduce.study import StudyError

GROUPS = 4
LAYERS = 1
"""Residual blocks a resolution of the encoder; diffusers' decoder has one more."""
ADVERSARIAL_SHARE = 0.5
"""Of the run without discriminator: the autoencoder must make something before it can be judged."""
ADVERSARIAL_WEIGHT = 0.5
MOST_ADAPTED = 1e4
DISCRIMINATOR_WIDTH = 32


class ConvolutionalTokenizer(nn.Module):
    """Pictures to ids and back, of the bottleneck that ``config`` names, ``width`` channels at full resolution.

    Raises:
        StudyError: diffusers is missing, or the tokens do not lie on a lattice that halvings of a picture reach.
    """

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.config, self.width = config, width
        rows, columns = code_lattice(config.model.code_length)
        factor = config.data.image_size // rows
        if rows != columns or factor * rows != config.data.image_size or factor & (factor - 1):
            raise StudyError(f"{rows} × {columns} tokens are no lattice that halvings of a picture reach")
        vae, depth = diffusers_vae(), factor.bit_length()
        self.quantizer = build_quantizer(config.model)
        self.side = rows
        widths = [width * min(2**i, 8) for i in range(depth)]
        shape: dict[str, Any] = {"block_out_channels": tuple(widths), "norm_num_groups": GROUPS}
        shape["layers_per_block"] = LAYERS
        downs, ups = ("DownEncoderBlock2D",) * depth, ("UpDecoderBlock2D",) * depth
        self.encoder = vae.Encoder(3, self.quantizer.encoder_channels, downs, double_z=False, **shape)
        self.decoder = vae.Decoder(self.quantizer.channels, 3, ups, **shape)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def code(self, images: Tensor) -> Tensor:
        """b 3 h w -> b × tokens × channels, before the bottleneck."""
        return self.encoder(images).flatten(2).transpose(1, 2)

    def picture(self, code: Tensor) -> Tensor:
        """b × tokens × channels -> b 3 h w."""
        return self.decoder(code.transpose(1, 2).unflatten(2, (self.side, self.side)))

    # As a FlowMo does it

    @property
    def device(self) -> torch.device:
        return self.last_layer.device

    @property
    def code_length(self) -> int:
        return self.config.model.code_length

    def identity(self) -> str:
        return identity_of({**self.config.architecture(), "width": self.width}, self)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Codes:
        """Pictures b 3 h w in [−1, 1] to their ids."""
        ids = self.quantizer.quantize(self.code(images.to(self.device)))[1]
        return Codes(ids, (images.shape[-2], images.shape[-1]), self.quantizer.id_count)

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor, *, seed: int | Sequence[int] = 0) -> Tensor:
        """Codes, or bare ids, to pictures b 3 h w in [−1, 1]; the same ones whatever the seed."""
        ids = codes.ids if isinstance(codes, Codes) else codes
        assert ids is not None, "its bottleneck has ids"
        return self.picture(self.quantizer.code_from_ids(ids.to(self.device))).clamp(-1, 1)


def diffusers_vae() -> Any:
    before_importing("diffusers")
    try:
        from diffusers.models.autoencoders import vae
    except ImportError:
        raise StudyError("the peer is made of diffusers' blocks: pip install 'flowmo[peers]'") from None
    return vae


class Discriminator(nn.Sequential):
    """Whether each patch of a picture is real: b 3 h w -> logits b 1 h' w'."""

    def __init__(self, width: int = DISCRIMINATOR_WIDTH):
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for inputs in (width, 2 * width):
            layers += [nn.Conv2d(inputs, 2 * inputs, 4, 2, 1), nn.GroupNorm(GROUPS, 2 * inputs), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(4 * width, 1, 3, 1, 1))


class Adversaries(nn.Module):
    """Tokenizer, discriminator and LPIPS: the losses of one step."""

    def __init__(self, tokenizer: ConvolutionalTokenizer, perceptual: LPIPS | None):
        super().__init__()
        self.tokenizer, self.discriminator = tokenizer, Discriminator()
        self.others = (perceptual,)  # in a tuple, so that it is no part of what is trained and saved

    def losses(self, images: Tensor, adversarial: bool) -> tuple[Tensor, ...]:
        """The tokenizer's loss of pictures b 3 h w in [−1, 1] and, where ``adversarial``, the discriminator's."""
        loss, made = self.tokenizer_loss(images, adversarial)
        return (loss, self.discriminator_loss(images, made)) if adversarial else (loss,)

    def tokenizer_loss(self, images: Tensor, adversarial: bool) -> tuple[Tensor, Tensor]:
        """The tokenizer's loss, and what it makes of the pictures, without gradient."""
        (perceptual,), weight = self.others, self.tokenizer.config.opt.lpips_weight
        quantized = self.tokenizer.quantizer(self.tokenizer.code(images))
        made = self.tokenizer.picture(quantized.code).float()
        loss = F.mse_loss(made, images)
        if perceptual is not None and weight:
            loss = loss + weight * perceptual(images, made).mean()
        if adversarial:
            pleased = -self.discriminator(made).mean()
            loss = loss + ADVERSARIAL_WEIGHT * self._adapted(loss, pleased) * pleased
        return loss + sum(quantized.losses.values()), made.detach()

    def _adapted(self, loss: Tensor, pleased: Tensor) -> Tensor:
        """The weight at which both have gradients of one length at the last layer."""
        last = self.tokenizer.last_layer
        lengths = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (loss, pleased)]
        return (lengths[0] / (lengths[1] + 1e-4)).clamp(max=MOST_ADAPTED).detach()

    def discriminator_loss(self, images: Tensor, made: Tensor) -> Tensor:
        """Hinge loss of telling pictures from what the tokenizer made of them."""
        real, fake = self.discriminator(torch.cat((images, made))).chunk(2)
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def step_flops(config: Config, width: int, perceptual: LPIPS | None) -> float:
    """FLOPs of matrix products and convolutions a picture and step, forward and backward; the mean over a run, of
    whose first share the discriminator has no part."""
    images = torch.zeros(1, 3, config.data.image_size, config.data.image_size)
    both = Adversaries(ConvolutionalTokenizer(config, width), perceptual)
    found = []
    for adversarial in (False, True):
        with FlopCounterMode(display=False) as counter:
            parts: tuple[nn.Module, ...] = (both.tokenizer, both.discriminator)
            for part, loss in zip(parts, both.losses(images, adversarial), strict=False):
                loss.backward(inputs=list(part.parameters()))
        found.append(counter.get_total_flops())
    return ADVERSARIAL_SHARE * found[0] + (1 - ADVERSARIAL_SHARE) * found[1]


def fitting_width(config: Config, parameters: int) -> int:
    """The width, a multiple of ``GROUPS``, with the count of parameters nearest to ``parameters``."""

    def count(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in ConvolutionalTokenizer(config, width).parameters())

    width = GROUPS
    while count(width + GROUPS) < parameters:
        width += GROUPS
    return min((width, width + GROUPS), key=lambda w: abs(count(w) - parameters))


class ConvolutionalReconstructor:
    """A trained one as a ``flowmo.evaluate.reconstruction.Reconstructor``."""

    name = "convolutional"

    def __init__(self, tokenizer: ConvolutionalTokenizer, device: torch.device):
        self.tokenizer = tokenizer.eval().requires_grad_(False).to(device)
        self.id_count = tokenizer.quantizer.id_count

    def reconstruct(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        ids = self.tokenizer.encode(images).ids
        bits = torch.full((len(images),), float(self.tokenizer.config.bits_per_image))
        return Reconstruction(self.tokenizer.decode(ids).cpu(), bits, ids.cpu())
