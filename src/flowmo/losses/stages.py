"""Training losses of stages 1A, 1B and 1C as functions of a tokenizer, images and their random numbers.

Stage 1A (mode matching) and stage 1B (mode seeking) are the paper's sections 3.2 and 3.3. Stage 1C is not in the
paper: it distils a tokenizer into a student whose decoder samples in one or a few steps.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowmo.config import OptConfig
from flowmo.images import select_channels
from flowmo.losses.noise import Chain, Crop, TrainingNoise, to_device
from flowmo.model import flow
from flowmo.model.autoencoder import Autoencoder
from flowmo.model.quantizers import Quantized, WholeBatch, local_statistic
from flowmo.model.sampler import euler, guided_velocity, shifted_times

Distance = Callable[[Tensor, Tensor], Tensor]
"""Perceptual distance of two batches of images b × c × h × w in [−1, 1]: b."""


class Loss(NamedTuple):
    """Loss of a micro-batch.

    Attributes:
        loss: scalar to minimise, with gradient.
        images: b × c × h × w with gradient, stage 1A's one-step estimates (equation 6); ``None`` in other stages.
        ids: int64 b × tokens × sub-tokens, or ``None`` for a continuous bottleneck.
        parts: for a log, detached float32 scalars: terms of the loss, perceptual ones before their weights, and
            statistics of the bottleneck.
    """

    loss: Tensor
    images: Tensor | None
    ids: Tensor | None
    parts: dict[str, Tensor]


def pretrain_loss(
    tokenizer: Autoencoder,
    images: Tensor,
    noise: TrainingNoise,
    opt: OptConfig,
    perceptual: Distance | None,
    whole_batch: WholeBatch = local_statistic,
    freeze_encoder: bool = False,
) -> Loss:
    """Stage 1A, equation 9: flow, perceptual and bottleneck losses of images b × c × h × w in [−1, 1].

    Args:
        perceptual: distance between the images and their one-step estimates (equation 6); ``None`` omits it.
        whole_batch: maps a statistic of the micro-batch to its mean over the global batch.
        freeze_encoder: run the encoder without gradient, and omit the bottleneck losses, which train only the encoder.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_encoder):
        quantized = tokenizer.quantizer(tokenizer.encoder(images), whole_batch)
    if quantized.noise_level is not None:
        noise = noise._replace(t=torch.lerp(quantized.noise_level, torch.ones_like(noise.t), noise.t))
    code = kept_code(tokenizer, quantized, noise)
    flow_loss, x_t, velocity = one_step(tokenizer, code, images, noise, opt)
    estimate = flow.denoise(x_t, velocity, noise.t)
    distances = {}
    if perceptual is not None:
        distances["lpips"] = perceptual_loss(perceptual, tokenizer, images, estimate, noise.crops)
    loss = _sum({"flow": flow_loss, **({} if freeze_encoder else quantized.losses)}, distances, opt, quantized)
    return loss._replace(images=estimate)


def posttrain_loss(
    tokenizer: Autoencoder, images: Tensor, noise: TrainingNoise, opt: OptConfig, perceptual: Distance | None
) -> Loss:
    """Stage 1B, equation 12: flow loss, and perceptual distance between images and samples through the whole chain.

    The encoder is frozen. Arguments as in ``pretrain_loss``; ``noise.chain`` must be set.
    """
    quantized = frozen_code(tokenizer, images)
    code = kept_code(tokenizer, quantized, noise)
    distances = {}
    if perceptual is not None:
        if noise.chain is None:
            raise ValueError("Stage 1B needs noise.chain, and this noise was drawn for another stage.")
        sample = sample_chain(tokenizer, code, noise.chain)
        distances["sample_distance"] = perceptual_loss(perceptual, tokenizer, images, sample, noise.crops)
    # after the chain, so that backward frees these activations before it recomputes the chain's
    flow_loss = one_step(tokenizer, code, images, noise, opt)[0]
    return _sum({"flow": flow_loss}, distances, opt, quantized)


def distill_loss(
    tokenizer: Autoencoder,
    images: Tensor,
    noise: TrainingNoise,
    opt: OptConfig,
    perceptual: Distance | None,
    *,
    teacher: Autoencoder,
) -> Loss:
    """Stage 1C: regress the mean velocity between two points of the teacher's sampling path, one pass per jump.

    The first two jumps of each image end at t = 0; the perceptual loss compares them with the teacher's sample or the
    image. The encoder is frozen. Arguments as in ``pretrain_loss``; ``noise.jumps`` must be set.
    """
    if noise.jumps is None:
        raise ValueError("Stage 1C needs noise.jumps, and this noise was drawn for another stage.")
    start_noise, starts, ends = noise.jumps
    b, num_jumps = starts.shape
    quantized = frozen_code(tokenizer, images)
    with torch.no_grad():
        path = teacher_path(teacher, quantized.code, start_noise, opt.teacher_steps)
        x_start, x_end = (path.interpolate(times).flatten(0, 1) for times in (starts, ends))  # (b num_jumps) c h w
    starts, ends = starts.flatten(), ends.flatten()
    decoder = tokenizer.decoder
    code = decoder.embed_code(quantized.code).repeat_interleave(num_jumps, dim=0)
    velocity = decoder(x_start, code, starts, ends).float()
    span = (starts - ends)[:, None, None, None]
    flow_loss = flow.flow_loss(velocity, (x_start - x_end) / span, _error_weight(tokenizer, opt, starts))
    distances = {}
    if perceptual is not None:
        final = (x_start - span * velocity).unflatten(0, (b, num_jumps))[:, :2].flatten(0, 1)
        target = images if opt.distill_towards == "image" else path.states[-1]
        crops = None if noise.crops is None else [crop for crop in noise.crops for _ in range(2)]
        target = target.repeat_interleave(2, dim=0)
        distances["jump_distance"] = perceptual_loss(perceptual, tokenizer, target, final, crops)
    return _sum({"flow": flow_loss}, distances, opt, quantized)


@torch.no_grad()
def frozen_code(tokenizer: Autoencoder, images: Tensor) -> Quantized:
    """Encode with a frozen encoder. A continuous bottleneck's code is inference's, without the noise of stage 1A."""
    features, quantizer = tokenizer.encoder(images), tokenizer.quantizer
    return quantizer(features) if quantizer.id_count else Quantized(*quantizer.quantize(features))


def kept_code(tokenizer: Autoencoder, quantized: Quantized, noise: TrainingNoise) -> Tensor:
    """Remove the sub-tokens that nested dropout drops: a code b × tokens × channels, unchanged without it."""
    if noise.num_sub_tokens is None:
        return quantized.code
    return tokenizer.quantizer.keep_prefix(quantized.code, noise.num_sub_tokens[:, None, None])


def one_step(
    tokenizer: Autoencoder, code: Tensor, x: Tensor, noise: TrainingNoise, opt: OptConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the flow loss (equation 5) of images x b × c × h × w, and the noised images and velocity behind it."""
    decoder, t = tokenizer.decoder, noise.t
    x_t = flow.interpolate(x, noise.noise, t)
    velocity = decoder(x_t, decoder.embed_code(code, noise.cfg_keep), t).float()
    return flow.flow_loss(velocity, noise.noise - x, _error_weight(tokenizer, opt, t)), x_t, velocity


def sample_chain(tokenizer: Autoencoder, code: Tensor, chain: Chain) -> Tensor:
    """Sample images b × c × h × w differentiably from pure noise, one Euler step per pair of times (equation 10).

    Only the state before each step is kept. The backward pass recomputes the step.

    Args:
        code: quantized, b × tokens × channels.
    """
    decoder = tokenizer.decoder

    def step(z: Tensor, code: Tensor, t: Tensor, t_next: Tensor, keep: Tensor) -> Tensor:
        velocity = decoder(z, decoder.embed_code(code, keep), t).float()
        return z - (t - t_next)[:, None, None, None] * velocity

    z = chain.noise
    for i in range(chain.times.shape[1] - 1):
        arguments = (z, code, chain.times[:, i], chain.times[:, i + 1], chain.cfg_keep[:, i])
        z = checkpoint(step, *arguments, use_reentrant=False)
    return z


class Trajectory(NamedTuple):
    """Sampling path: n + 1 times from 1 to 0, and the states there, (n + 1) × b × c × h × w."""

    times: Tensor
    states: Tensor

    def interpolate(self, t: Tensor) -> Tensor:
        """Interpolate the states at times b × k: b × k × c × h × w. Euler's path is piecewise linear."""
        after = torch.searchsorted(-self.times, -t.contiguous()).clamp(1, len(self.times) - 1)
        early, late = self.times[after - 1], self.times[after]
        share = ((early - t) / (early - late))[..., None, None, None]
        image = torch.arange(len(t), device=t.device)[:, None]
        return torch.lerp(self.states[after - 1, image], self.states[after, image], share)


@torch.no_grad()
def teacher_path(teacher: Autoencoder, code: Tensor, noise: Tensor, steps: int = 0) -> Trajectory:
    """Sample from noise b × c × h × w in ``steps`` Euler steps, by default the teacher's number; keep every state.

    Shift and guidance are the teacher's.
    """
    sampling = teacher.config.eval.sampling
    times = shifted_times(steps or sampling.sample_steps, sampling.rho)
    guidance = sampling.guidance, sampling.guidance_low, sampling.guidance_high
    velocity = guided_velocity(teacher.decoder, code, *guidance)
    states = [noise]
    for pair in itertools.pairwise(times):
        states.append(euler(velocity, states[-1], pair))
    return Trajectory(to_device(torch.tensor(times), noise.device), torch.stack(states))


def perceptual_loss(
    perceptual: Distance, tokenizer: Autoencoder, x: Tensor, y: Tensor, crops: Sequence[Crop] | None = None
) -> Tensor:
    """Mean distance of two batches of images on the selected channels and crops."""
    channels = tokenizer.config.perceptual_channels
    seen = (select_channels(crop_images(images, crops), channels) for images in (x, y))
    return perceptual(*seen).float().mean()


def crop_images(images: Tensor, crops: Sequence[Crop] | None) -> Tensor:
    """Cut one part of the same size from each of b × c × h × w images. ``None`` keeps them whole.

    Random crops shift the perceptual network's strides over the image, so the decoder cannot learn textures that
    fit one stride alignment only (after E-LPIPS, Kettunen et al. 2019).
    """
    if crops is None:
        return images
    return torch.stack([image[:, rows, columns] for image, (rows, columns) in zip(images, crops, strict=True)])


def _error_weight(tokenizer: Autoencoder, opt: OptConfig, t: Tensor) -> Tensor | None:
    return flow.error_weight(t, opt.loss_space, tokenizer.decoder.config.prediction)


def _sum(terms: dict[str, Tensor], distances: dict[str, Tensor], opt: OptConfig, quantized: Quantized) -> Loss:
    total = sum(terms.values()) + opt.lpips_weight * sum(distances.values())
    logged = {**terms, **distances, "loss": total}
    # a statistic must not replace the weighted term of the same name, nor take its name when the encoder freezes
    logged |= {f"unweighted_{n}" if n in quantized.losses else n: v for n, v in quantized.statistics.items()}
    # float32, because a bfloat16 sum over a hundred steps stops growing
    return Loss(total, None, quantized.ids, {name: value.detach().float() for name, value in logged.items()})


class Stage(nn.Module):
    """Loss of a stage as a module, for DDP, FSDP2 and ``torch.compile`` to wrap.

    A ``teacher`` makes it stage 1C, ``model.posttrain_sample`` stage 1B, neither stage 1A.
    """

    def __init__(
        self,
        tokenizer: Autoencoder,
        opt: OptConfig,
        perceptual: Distance | None = None,
        teacher: Autoencoder | None = None,
    ):
        super().__init__()
        self.tokenizer, self.opt = tokenizer, opt
        self.networks = tuple(tokenizer.networks.values())
        self.frozen = (perceptual, teacher)  # a tuple keeps them out of parameters(), sharding and checkpoints

    def forward(
        self,
        images: Tensor,
        noise: TrainingNoise | None,
        whole_batch: WholeBatch = local_statistic,
        freeze_encoder: bool = False,
    ) -> Loss | None:
        """Return the loss. Without ``noise``, only report the bottleneck's statistics to ``whole_batch``."""
        tokenizer, (perceptual, teacher) = self.tokenizer, self.frozen
        if noise is None:
            tokenizer.quantizer(tokenizer.encoder(images), whole_batch)
            return None
        if teacher is not None:
            return distill_loss(tokenizer, images, noise, self.opt, perceptual, teacher=teacher)
        if tokenizer.config.model.posttrain_sample:
            return posttrain_loss(tokenizer, images, noise, self.opt, perceptual)
        return pretrain_loss(tokenizer, images, noise, self.opt, perceptual, whole_batch, freeze_encoder)
