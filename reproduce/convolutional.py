"""A convolutional, adversarially trained tokenizer (Esser et al. 2021), as a peer of FlowMo with equal bits.

Encoder and decoder are those of diffusers' VAE, and the bottleneck is FlowMo's, on a square lattice of tokens. The loss
is MSE, LPIPS and, for the second half of the run, the hinge loss of a patch discriminator (Isola et al. 2017). Its
weight is adapted so that its gradient at the last layer is as long as that of the other losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowmo.config import Config
from flowmo.evaluate.reconstruction import Reconstruction
from flowmo.evaluate.speed import UNCOUNTED
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.perceptual import LPIPS
from flowmo.losses.stages import pretrain_loss
from flowmo.model.quantizers import build_quantizer
from flowmo.model.torchvision_import import before_importing
from flowmo.model.transformer import code_lattice
from flowmo.precision import computing, resolve
from flowmo.tokenizer import Codes, FlowMo, identity_of
from reproduce import StudyError

GROUPS = 4
ENCODER_BLOCKS = 1
"""Residual blocks per resolution of the encoder; diffusers' decoder has one more."""
ADVERSARIAL_START = 0.5
"""Share of the run before the discriminator joins."""
ADVERSARIAL_WEIGHT = 0.5
MAX_ADAPTED_WEIGHT = 1e4
DISCRIMINATOR_WIDTH = 32


class ConvolutionalTokenizer(nn.Module):
    """Images to ids and back, with the bottleneck of ``config`` and ``width`` channels at full resolution.

    Raises:
        StudyError: diffusers is missing, or the tokens form no square lattice that halvings of an image reach.
    """

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.config, self.width = config, width
        rows, columns = code_lattice(config.model.code_length)
        factor = config.data.image_size // rows
        if rows != columns or factor * rows != config.data.image_size or factor & (factor - 1):
            raise StudyError(f"Halvings of an image do not reach {rows} × {columns} tokens. Change model.code_length.")
        vae, depth = diffusers_vae(), factor.bit_length()
        self.quantizer = build_quantizer(config.model)
        self.side = rows
        widths = tuple(width * min(2**i, 8) for i in range(depth))
        shape = {"block_out_channels": widths, "norm_num_groups": GROUPS, "layers_per_block": ENCODER_BLOCKS}
        downs, ups = ("DownEncoderBlock2D",) * depth, ("UpDecoderBlock2D",) * depth
        self.encoder = vae.Encoder(3, self.quantizer.encoder_channels, downs, double_z=False, **shape)
        self.decoder = vae.Decoder(self.quantizer.channels, 3, ups, **shape)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def encode_continuous(self, images: Tensor) -> Tensor:
        return self.encoder(images).flatten(2).transpose(1, 2)  # b 3 h w -> b tokens channels, before the bottleneck

    def decode_continuous(self, code: Tensor) -> Tensor:
        return self.decoder(code.transpose(1, 2).unflatten(2, (self.side, self.side)))  # b tokens channels -> b 3 h w

    # What flowmo.generate.tokenize.tokenize needs

    @property
    def device(self) -> torch.device:
        return self.last_layer.device

    @property
    def code_length(self) -> int:
        return self.config.model.code_length

    def identity(self) -> str:
        return identity_of({**self.config.architecture(), "width": self.width}, self.state_dict())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Codes:
        """Encode images (b 3 h w in [−1, 1]), in the precision that a FlowMo of a study has on this device."""
        with self.computing():
            code = self.encode_continuous(images.to(self.device)).float()
        ids = self.quantizer.quantize(code)[1]
        return Codes(ids, (images.shape[-2], images.shape[-1]), self.quantizer.id_count)

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor, *, seed: int | Sequence[int] = 0) -> Tensor:
        """Decode codes or bare ids to images (b 3 h w in [−1, 1]). The seed has no effect."""
        ids = codes.ids if isinstance(codes, Codes) else codes
        assert ids is not None, "its bottleneck has ids"
        with self.computing():
            images = self.decode_continuous(self.quantizer.code_from_ids(ids.to(self.device)))
        return images.float().clamp(-1, 1)

    def computing(self) -> AbstractContextManager[None]:
        return computing(resolve("auto", self.device), self.device)


def diffusers_vae() -> Any:
    before_importing("diffusers")
    try:
        from diffusers.models.autoencoders import vae
    except ImportError:
        raise StudyError("The convolutional peer needs diffusers. Run: pip install 'flowmo[peers]'.") from None
    return vae


class Discriminator(nn.Sequential):
    """Patch discriminator: images (b 3 h w) to logits (b 1 h' w') that each patch is real."""

    def __init__(self, width: int = DISCRIMINATOR_WIDTH):
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for inputs in (width, 2 * width):
            layers += [nn.Conv2d(inputs, 2 * inputs, 4, 2, 1), nn.GroupNorm(GROUPS, 2 * inputs), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(4 * width, 1, 3, 1, 1))


class AdversarialModel(nn.Module):
    """Tokenizer and discriminator, with the losses of one step.

    The tokenizer is the convolutional one or a FlowMo, whose discriminator sees the one-step estimates of stage 1A.
    """

    def __init__(self, tokenizer: ConvolutionalTokenizer | FlowMo, perceptual: LPIPS | None):
        super().__init__()
        self.tokenizer, self.discriminator = tokenizer, Discriminator()
        self.frozen = (perceptual,)  # a tuple hides it from parameters() and state_dict()

    def losses(self, images: Tensor, adversarial: bool, noise: TrainingNoise | None = None) -> tuple[Tensor, ...]:
        """Loss of the tokenizer on images (b 3 h w in [−1, 1]) and, if ``adversarial``, of the discriminator.

        Args:
            noise: random numbers of a FlowMo's step.
        """
        if isinstance(self.tokenizer, FlowMo):
            loss, output = self._flowmo_loss(self.tokenizer, images, noise)
        else:
            loss, output = self._convolutional_loss(self.tokenizer, images)
        if not adversarial:
            return (loss,)
        generator_loss = -self.discriminator(output).mean()
        loss = loss + ADVERSARIAL_WEIGHT * self._adapted_weight(loss, generator_loss) * generator_loss
        return loss, self._discriminator_loss(images, output.detach())

    def _flowmo_loss(self, tokenizer: FlowMo, images: Tensor, noise: TrainingNoise | None) -> tuple[Tensor, Tensor]:
        assert noise is not None, "a FlowMo's step is random"
        loss = pretrain_loss(tokenizer, images, noise, tokenizer.config.opt, self.frozen[0])
        assert loss.images is not None
        return loss.loss, loss.images

    def _convolutional_loss(self, tokenizer: ConvolutionalTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
        (perceptual,), weight = self.frozen, tokenizer.config.opt.lpips_weight
        quantized = tokenizer.quantizer(tokenizer.encode_continuous(images))
        output = tokenizer.decode_continuous(quantized.code).float()
        loss = F.mse_loss(output, images) + sum(quantized.losses.values())
        if perceptual is not None and weight:
            loss = loss + weight * perceptual(images, output).mean()
        return loss, output

    @property
    def last_layer(self) -> Tensor:
        """The weights that write the image."""
        flowmo = isinstance(self.tokenizer, FlowMo)
        return self.tokenizer.decoder.picture_out.weight if flowmo else self.tokenizer.last_layer

    def _adapted_weight(self, loss: Tensor, generator_loss: Tensor) -> Tensor:
        """The weight that gives both losses equal gradient norms at the last layer."""
        last = self.last_layer
        norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (loss, generator_loss)]
        return (norms[0] / (norms[1] + 1e-4)).clamp(max=MAX_ADAPTED_WEIGHT).detach()

    def _discriminator_loss(self, images: Tensor, output: Tensor) -> Tensor:
        real, fake = self.discriminator(torch.cat((images, output))).chunk(2)
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2  # hinge


def step_flops(tokenizer: ConvolutionalTokenizer | FlowMo, perceptual: LPIPS | None, adversarial: bool = True) -> float:
    """FLOPs per image and step, forward and backward, averaged over a run with its discriminator-free part."""
    config = tokenizer.config
    images = torch.zeros(1, 3, config.data.image_size, config.data.image_size)
    model, found = AdversarialModel(tokenizer, perceptual), []
    for joined in (False, adversarial):
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            parts: tuple[nn.Module, ...] = (model.tokenizer, model.discriminator)
            losses = model.losses(images, joined, TrainingNoise.of(config, images, [0]))
            for part, loss in zip(parts, losses, strict=False):
                loss.backward(inputs=[p for p in part.parameters() if p.requires_grad], retain_graph=True)
        found.append(counter.get_total_flops())
    return ADVERSARIAL_START * found[0] + (1 - ADVERSARIAL_START) * found[1]


def fitting_width(config: Config, parameters: int) -> int:
    """The width, a multiple of ``GROUPS``, whose parameter count is nearest to ``parameters``."""

    def count(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in ConvolutionalTokenizer(config, width).parameters())

    width = GROUPS
    while count(width + GROUPS) < parameters:
        width += GROUPS
    return min((width, width + GROUPS), key=lambda w: abs(count(w) - parameters))


class ConvolutionalReconstructor:
    """A trained peer as a ``flowmo.evaluate.reconstruction.Reconstructor``."""

    name = "convolutional"

    def __init__(self, tokenizer: ConvolutionalTokenizer, device: torch.device):
        self.tokenizer = tokenizer.eval().requires_grad_(False).to(device)
        self.id_count = tokenizer.quantizer.id_count

    def reconstruct(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        ids = self.tokenizer.encode(images).ids
        bits = torch.full((len(images),), float(self.tokenizer.config.bits_per_image))
        return Reconstruction(self.tokenizer.decode(ids).cpu(), bits, ids.cpu())
