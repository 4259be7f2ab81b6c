"""The loss of each training stage as a function of a tokenizer and a batch, all randomness handed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmo import flow
from flowmo.config import Config
from flowmo.sample import picture_seed
from flowmo.tokenizer import FlowMo

NULL_CODE_SHARE = 0.1
"""Share of training pictures whose code is replaced by the null code, for classifier-free guidance."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step: timesteps b in [0, 1], noise b 3 h w, and b, False where the code is dropped."""

    t: Tensor
    noise: Tensor
    keep: Tensor

    @classmethod
    def for_step(cls, config: Config, images: Tensor, step: int) -> Draws:
        """A function of the seed and the step alone, so that a resumed run draws what an unbroken one would."""
        generator = torch.Generator().manual_seed(picture_seed(config.trainer.seed, f"step {step}"))
        b = len(images)
        t = flow.sample_timesteps(b, config.opt.schedule, generator, config.opt.anchor)
        noise = torch.randn(images.shape, generator=generator)
        keep = torch.rand(b, generator=generator) >= (NULL_CODE_SHARE if config.model.enable_cfg else 0.0)
        return cls(*(draw.to(images.device) for draw in (t, noise, keep)))


def pretrain_loss(
    tokenizer: FlowMo,
    images: Tensor,
    draws: Draws,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stage 1A, equation 9: flow, perceptual and bottleneck losses of pictures b 3 h w in [−1, 1].

    Args:
        perceptual: distance of pictures, b, applied to the one-step estimate (equation 6).

    Returns:
        The loss to minimise, and its parts and the bottleneck's statistics for the log, detached.
    """
    x, t, noise, opt = images, draws.t, draws.noise, tokenizer.config.opt
    quantized = tokenizer.quantizer(tokenizer.encoder(x))
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
    return total, {name: value.detach() for name, value in {**parts, **quantized.statistics}.items()}
