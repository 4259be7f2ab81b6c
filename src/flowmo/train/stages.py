"""The loss of each training stage as a function of a tokenizer and a batch, all randomness handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowmo import flow
from flowmo.config import Config
from flowmo.quantize import Quantized, WholeBatch, alone
from flowmo.sample import picture_seed
from flowmo.tokenizer import FlowMo

NULL_CODE_SHARE = 0.1
"""Share of training pictures whose code is replaced by the null code, for classifier-free guidance."""

Distance = Callable[[Tensor, Tensor], Tensor]


class Chain(NamedTuple):
    """Random numbers of stage 1B's samples: noise b 3 h w, times b × (n + 1) from 1 to 0, and b × n, False where a
    step's code is dropped."""

    noise: Tensor
    times: Tensor
    keep: Tensor


class Draws(NamedTuple):
    """Random numbers of some pictures: timesteps b in [0, 1], noise b 3 h w, and b, False where the code is dropped;
    in stage 1B also those of their samples."""

    t: Tensor
    noise: Tensor
    keep: Tensor
    chain: Chain | None = None

    @classmethod
    def of(cls, config: Config, images: Tensor, places: Sequence[int]) -> Draws:
        """Draws of the pictures b 3 h w that come at ``places`` of the run, counted from its start.

        They are a function of the seed and the place alone, so that neither an interruption, nor the number of
        processes, nor the cut of a batch into passes changes them. The noise is drawn where the pictures are.
        """
        model, device = config.model, images.device
        steps = model.posttrain_sample_k if model.posttrain_sample else 0
        dropped = NULL_CODE_SHARE if model.enable_cfg else 0.0
        dropped_in_chain = NULL_CODE_SHARE if model.posttrain_sample_enable_cfg else 0.0
        rows = []
        for place in places:
            seed = picture_seed(config.trainer.seed, f"draws {place}")
            generator = torch.Generator().manual_seed(seed)
            t = flow.sample_timesteps(1, config.opt.schedule, generator, config.opt.anchor)[0]
            keep = torch.rand((), generator=generator) >= dropped
            on_device = torch.Generator(device).manual_seed(seed)
            noise = torch.randn(images.shape[1:], generator=on_device, device=device)
            row = [t, noise, keep]
            if steps:
                start = torch.randn(images.shape[1:], generator=on_device, device=device)
                times = flow.random_steps(torch.rand((1, steps), generator=generator))[0]
                row += [start, times, torch.rand(steps, generator=generator) >= dropped_in_chain]
            rows.append(row)
        t, noise, keep, *chain = (torch.stack(column).to(device) for column in zip(*rows, strict=True))
        return cls(t, noise, keep, Chain(*chain) if chain else None)


class Loss(NamedTuple):
    """The loss to minimise; its parts and the bottleneck's statistics for the log, detached; the ids that were
    used, where they are counted."""

    total: Tensor
    parts: dict[str, Tensor]
    ids: Tensor | None = None


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
        freeze_encoder: the encoder only encodes, and the bottleneck's losses, which train nothing then, are left out.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_encoder):
        quantized = tokenizer.quantizer(tokenizer.encoder(images), whole_batch)
    flow_loss, estimate = one_step(tokenizer, quantized.code, images, draws)
    distances = {} if perceptual is None else {"lpips": perceptual(images, estimate()).float().mean()}
    return _sum(tokenizer, {} if freeze_encoder else quantized.losses, flow_loss, distances, quantized)


def posttrain_loss(
    tokenizer: FlowMo,
    images: Tensor,
    draws: Draws,
    perceptual: Distance | None,
    whole_batch: WholeBatch = alone,
    freeze_encoder: bool = True,
) -> Loss:
    """Stage 1B, section 3.3: the flow loss, and the distance of pictures to their samples through the whole chain.

    Arguments as in ``pretrain_loss``; the encoder never learns. ``draws.chain`` holds the samples' steps and noise.
    """
    with torch.no_grad():
        quantized = tokenizer.quantizer(tokenizer.encoder(images), whole_batch)
    flow_loss, _ = one_step(tokenizer, quantized.code, images, draws)
    distances = {}
    if perceptual is not None:
        sample = sample_chain(tokenizer, quantized.code, draws.chain)
        distances["sample_distance"] = perceptual(images, sample).float().mean()
    return _sum(tokenizer, {}, flow_loss, distances, quantized)


def one_step(tokenizer: FlowMo, code: Tensor, x: Tensor, draws: Draws) -> tuple[Tensor, Callable[[], Tensor]]:
    """The flow loss of pictures x noised to ``draws.t``, and the decoder's one-step estimate of them, b 3 h w."""
    decoder, t = tokenizer.decoder, draws.t
    x_t = flow.interpolate(x, draws.noise, t)
    velocity = decoder(x_t, decoder.embed_code(code, draws.keep), decoder.modulate(t)).float()
    weighted = t if tokenizer.config.opt.loss_space == "picture" else None
    return flow.flow_loss(velocity, x, draws.noise, weighted), lambda: flow.denoise(x_t, velocity, t)


def _sum(
    tokenizer: FlowMo,
    losses: dict[str, Tensor],
    flow_loss: Tensor,
    distances: dict[str, Tensor],
    quantized: Quantized,
) -> Loss:
    parts = {"flow": flow_loss, **losses}
    total = sum(parts.values()) + tokenizer.config.opt.lpips_weight * sum(distances.values())
    logged = {**parts, **distances, "loss": total, **quantized.statistics}
    # In float32, or the log's sum over a hundred steps would stand still at bfloat16's eight bits.
    return Loss(total, {name: value.detach().float() for name, value in logged.items()}, quantized.ids)


def sample_chain(tokenizer: FlowMo, code: Tensor, chain: Chain, recompute: bool = True) -> Tensor:
    """Pictures b 3 h w drawn from pure noise by one Euler step for each pair of ``chain.times``, differentiably.

    Args:
        code: quantized, b × tokens × channels.
        recompute: keep only the state before each step, and run the step again in the backward pass; the memory of
            the chain is then that of one step and ``n`` states.
    """
    decoder = tokenizer.decoder

    def step(z: Tensor, code: Tensor, t: Tensor, t_next: Tensor, keep: Tensor) -> Tensor:
        velocity = decoder(z, decoder.embed_code(code, keep), decoder.modulate(t)).float()
        return z - (t - t_next)[:, None, None, None] * velocity

    z = chain.noise
    for i in range(chain.times.shape[1] - 1):
        arguments = (z, code, chain.times[:, i], chain.times[:, i + 1], chain.keep[:, i])
        z = checkpoint(step, *arguments, use_reentrant=False) if recompute else step(*arguments)
    return z


class Stage(nn.Module):
    """The loss of the stage that the settings name, as a module: what DDP, FSDP2 and ``torch.compile`` wrap."""

    def __init__(self, tokenizer: FlowMo, perceptual: Distance | None):
        super().__init__()
        self.tokenizer = tokenizer
        self.networks = tuple(tokenizer.networks.values())
        self.others = (perceptual,)  # in a tuple, so that it is no part of what is trained, sharded and saved
        self.loss = posttrain_loss if tokenizer.config.model.posttrain_sample else pretrain_loss

    def forward(
        self, images: Tensor, draws: Draws | None, whole_batch: WholeBatch = alone, freeze_encoder: bool = False
    ) -> Loss | None:
        """The loss of some pictures; without ``draws`` only ``whole_batch`` is shown their statistics."""
        if draws is None:
            self.tokenizer.quantizer(self.tokenizer.encoder(images), whole_batch)
            return None
        return self.loss(self.tokenizer, images, draws, *self.others, whole_batch, freeze_encoder)
