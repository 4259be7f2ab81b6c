"""The loss of each training stage as a function of a tokenizer and a batch, all randomness handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowmo import flow
from flowmo.config import Config
from flowmo.quantize import WholeBatch, alone
from flowmo.sample import picture_seed
from flowmo.tokenizer import FlowMo

NULL_CODE_SHARE = 0.1
"""Share of training pictures whose code is replaced by the null code, for classifier-free guidance."""

Distance = Callable[[Tensor, Tensor], Tensor]


class Draws(NamedTuple):
    """Random numbers of some pictures: timesteps b in [0, 1], noise b 3 h w, and b, False where the code is dropped."""

    t: Tensor
    noise: Tensor
    keep: Tensor

    @classmethod
    def of(cls, config: Config, images: Tensor, places: Sequence[int]) -> Draws:
        """Draws of the pictures b 3 h w that come at ``places`` of the run, counted from its start.

        They are a function of the seed and the place alone, so that neither an interruption, nor the number of
        processes, nor the cut of a batch into passes changes them. The noise is drawn where the pictures are.
        """
        seeds = [picture_seed(config.trainer.seed, f"draws {place}") for place in places]
        dropped = NULL_CODE_SHARE if config.model.enable_cfg else 0.0
        t, noise, keep = [], [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            t.append(flow.sample_timesteps(1, config.opt.schedule, generator, config.opt.anchor))
            keep.append(torch.rand(1, generator=generator) >= dropped)
            on_device = torch.Generator(images.device).manual_seed(seed)
            noise.append(torch.randn(images.shape[1:], generator=on_device, device=images.device))
        return cls(torch.cat(t).to(images.device), torch.stack(noise), torch.cat(keep).to(images.device))


class Loss(NamedTuple):
    """The loss to minimise; its parts and the bottleneck's statistics for the log, detached; the ids that were used."""

    total: Tensor
    parts: dict[str, Tensor]
    ids: Tensor | None


def pretrain_loss(
    tokenizer: FlowMo,
    images: Tensor,
    draws: Draws,
    perceptual: Distance | None,
    whole_batch: WholeBatch = alone,
    freeze_encoder: bool = False,
) -> Loss:
    """Stage 1A, equation 9: flow, perceptual and bottleneck losses of pictures b 3 h w in [−1, 1].

    Args:
        perceptual: distance of pictures, b, applied to the one-step estimate (equation 6).
        whole_batch: see ``flowmo.quantize.Quantizer``.
        freeze_encoder: the encoder only encodes; it and the bottleneck get no gradient.
    """
    x, t, noise, opt = images, draws.t, draws.noise, tokenizer.config.opt
    with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_encoder):
        quantized = tokenizer.quantizer(tokenizer.encoder(x), whole_batch)
    x_t = flow.interpolate(x, noise, t)
    decoder = tokenizer.decoder
    velocity = decoder(x_t, decoder.embed_code(quantized.code, draws.keep), decoder.modulate(t)).float()
    parts = {
        "flow": flow.flow_loss(velocity, x, noise, t if opt.loss_space == "picture" else None),
        **quantized.losses,
    }
    total = sum(parts.values())
    if perceptual is not None:
        parts["lpips"] = perceptual(x, flow.denoise(x_t, velocity, t)).mean()
        total = total + opt.lpips_weight * parts["lpips"]
    parts["loss"] = total
    logged = {name: value.detach() for name, value in {**parts, **quantized.statistics}.items()}
    return Loss(total, logged, quantized.ids)


class PretrainStage(nn.Module):
    """``pretrain_loss`` as a module, which is what DDP, FSDP2 and ``torch.compile`` wrap."""

    def __init__(self, tokenizer: FlowMo, perceptual: Distance | None):
        super().__init__()
        self.tokenizer = tokenizer
        self.others = (perceptual,)  # in a tuple, so that it is no part of what is trained, sharded and saved

    def forward(
        self, images: Tensor, draws: Draws | None, whole_batch: WholeBatch = alone, freeze_encoder: bool = False
    ) -> Loss | None:
        """The loss of some pictures; without ``draws`` only ``whole_batch`` is shown their statistics."""
        if draws is None:
            self.tokenizer.quantizer(self.tokenizer.encoder(images), whole_batch)
            return None
        return pretrain_loss(self.tokenizer, images, draws, *self.others, whole_batch, freeze_encoder)
