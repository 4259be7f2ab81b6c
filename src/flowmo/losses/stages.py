"""The loss of each training stage as a function of a tokenizer and a batch, all randomness handed in.

Stage 1A matches the distribution of pictures, 1B looks for the modes that look like the original, both as the paper
has them. Stage 1C is ours: a student whose decoder jumps along the paths that the teacher of stage 1B walks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowmo.config import Config, OptConfig
from flowmo.model import flow
from flowmo.model.quantizers import Quantized, WholeBatch, alone
from flowmo.model.sampler import euler, guided_velocity, shifted_times
from flowmo.streams import Stream, stream
from flowmo.tokenizer import FlowMo

NULL_CODE_SHARE = 0.1
"""Share of training pictures whose code is replaced by the null code, for classifier-free guidance."""

MOST_PASSES = 25
"""Passes of the decoder up to which a student of stage 1C learns to split the way."""

Distance = Callable[[Tensor, Tensor], Tensor]


class Jumps(NamedTuple):
    """Random numbers of stage 1C: the noise b 3 h w from which a teacher's path starts, and where the jumps along it
    start and end, each b × jumps in [0, 1]."""

    noise: Tensor
    starts: Tensor
    ends: Tensor


class Chain(NamedTuple):
    """Random numbers of stage 1B's samples: noise b 3 h w, times b × (n + 1) from 1 to 0, and b × n, False where a
    step's code is dropped."""

    noise: Tensor
    times: Tensor
    keep: Tensor


class TrainingNoise(NamedTuple):
    """Random numbers of some pictures: timesteps b in [0, 1], noise b 3 h w, and b, False where the code is dropped;
    in stage 1B also those of their samples, in stage 1C those of the jumps; with ``opt.lpips_jitter`` or
    ``opt.lpips_crop`` the row and column at which the perceptual loss cuts each image; with ``model.nested_dropout`` b,
    the sub-tokens that each image keeps."""

    t: Tensor
    noise: Tensor
    keep: Tensor
    chain: Chain | None = None
    jumps: Jumps | None = None
    cut: Sequence[tuple[int, int]] | None = None
    kept: Tensor | None = None

    @classmethod
    def of(cls, config: Config, images: Tensor, places: Sequence[int]) -> TrainingNoise:
        """Draws of the pictures b 3 h w that come at ``places`` of the run, counted from its start.

        They are a function of the seed and the place alone, so that neither an interruption, nor the number of
        processes, nor the cut of a batch into passes changes them. Each kind of number has a stream of its own. The
        noise is drawn on the pictures' device.
        """
        model, device, stage = config.model, images.device, config.stage
        dropped = NULL_CODE_SHARE if model.enable_cfg else 0.0
        dropped_in_chain = NULL_CODE_SHARE if model.posttrain_sample_enable_cfg else 0.0
        seed, steps = config.trainer.seed, model.posttrain_sample_k

        def normal(purpose: Stream, place: int) -> Tensor:
            return torch.randn(images.shape[1:], generator=stream(seed, purpose, place, device=device), device=device)

        def uniform(purpose: Stream, place: int, *shape: int) -> Tensor:
            return torch.rand(shape, generator=stream(seed, purpose, place))

        rows: list[list[Tensor]] = []
        cut: list[tuple[int, int]] = []
        for place in places:
            of_t = stream(seed, Stream.TIMESTEP, place)
            t = flow.sample_timesteps(1, config.opt.schedule, of_t, config.opt.anchor)[0]
            row = [t, normal(Stream.NOISE, place), uniform(Stream.CODE_DROP, place) >= dropped]
            if stage != "pretrain":
                row.append(normal(Stream.CHAIN_NOISE, place))
            if stage == "posttrain":
                times = flow.random_steps(uniform(Stream.CHAIN_TIMES, place, 1, steps))[0]
                row += [times, uniform(Stream.CHAIN_DROP, place, steps) >= dropped_in_chain]
            if stage == "distill":
                row += random_jumps(config.opt.jumps, config.eval.sampling.rho, stream(seed, Stream.JUMPS, place))
            margins = (n - m for n, m in zip(images.shape[2:], cut_size(config.opt, images), strict=True))
            of_cut = stream(seed, Stream.CUT, place)
            top, left = (int(torch.randint(0, margin + 1, (), generator=of_cut)) for margin in margins)
            cut.append((top, left))
            rows.append(row)
        t, noise, keep, *more = (to_device(torch.stack(column), device) for column in zip(*rows, strict=True))
        chain = Chain(*more) if stage == "posttrain" else None
        jumps = Jumps(*more) if stage == "distill" else None
        kept = to_device(kept_sub_tokens(config, places), device) if model.nested_dropout else None
        cuts = config.opt.lpips_jitter or config.opt.lpips_crop
        return cls(t, noise, keep, chain, jumps, cut if cuts else None, kept)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for it: a GPU copies from pinned memory while the host goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def kept_sub_tokens(config: Config, places: Sequence[int]) -> Tensor:
    """Length of the prefix of sub-tokens that each image keeps, int64 b: all, or any with equal probability."""
    model = config.model
    group = model.codebook_size_for_entropy
    if model.quantization_type == "fsq":
        group = int(group / math.log2(model.fsq_levels) + 1e-9)
    most, kept = model.context_dim // max(group, 1), []
    for place in places:
        generator = stream(config.trainer.seed, Stream.PREFIX, place)
        drop = float(torch.rand((), generator=generator)) < model.nested_dropout
        kept.append(int(torch.randint(1, most + 1, (), generator=generator)) if drop else most)
    return torch.tensor(kept)


def cut_size(opt: OptConfig, images: Tensor) -> tuple[int, int]:
    """Height and width of the part of images b 3 h w that the perceptual loss on the one-step estimate sees."""
    if opt.lpips_crop:
        return opt.lpips_crop, opt.lpips_crop
    return images.shape[2] - opt.lpips_jitter, images.shape[3] - opt.lpips_jitter


def random_jumps(count: int, rho: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where one picture's jumps start and end, each ``count``.

    They are steps of samplers of 1 to ``MOST_PASSES`` steps: the one step of the first, the last step of another, then
    any. Few steps, which go furthest, come most often: log-uniformly.
    """
    starts, ends = [1.0], [0.0]
    for jump in range(1, count):
        size, place = torch.rand(2, generator=generator).tolist()
        times = shifted_times(round(MOST_PASSES**size), rho)
        start = len(times) - 2 if jump == 1 else int(place * (len(times) - 1))
        starts.append(times[start])
        ends.append(times[start + 1])
    return torch.tensor(starts), torch.tensor(ends)


class Loss(NamedTuple):
    """The loss to minimise; its parts and the bottleneck's statistics for the log, detached; the ids that were
    used, where they are counted."""

    total: Tensor
    parts: dict[str, Tensor]
    ids: Tensor | None = None


def pretrain_loss(
    tokenizer: FlowMo,
    images: Tensor,
    draws: TrainingNoise,
    perceptual: Distance | None,
    whole_batch: WholeBatch = alone,
    freeze_encoder: bool = False,
) -> Loss:
    """Stage 1A, equation 9: flow, perceptual and bottleneck losses of pictures b 3 h w in [−1, 1].

    Args:
        perceptual: distance of pictures, b, applied to the one-step estimate (equation 6).
        whole_batch: see ``flowmo.model.quantizers.Quantizer``.
        freeze_encoder: the encoder only encodes, and the bottleneck's losses, which train nothing then, are left out.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_encoder):
        quantized = tokenizer.quantizer(tokenizer.encoder(images), whole_batch)
    if quantized.noise_level is not None:
        draws = draws._replace(t=torch.lerp(quantized.noise_level, torch.ones_like(draws.t), draws.t))
    code = quantized.code if draws.kept is None else tokenizer.keep_prefix(quantized.code, draws.kept[:, None])
    flow_loss, estimate = one_step(tokenizer, code, images, draws)
    distances = {}
    if perceptual is not None:
        x, y = images, estimate()
        if draws.cut is not None:
            x, y = (cut_out(image, draws.cut, *cut_size(tokenizer.config.opt, images)) for image in (x, y))
        distances["lpips"] = perceptual(x, y).float().mean()
    return _sum(tokenizer, {} if freeze_encoder else quantized.losses, flow_loss, distances, quantized)


def posttrain_loss(
    tokenizer: FlowMo,
    images: Tensor,
    draws: TrainingNoise,
    perceptual: Distance | None,
    whole_batch: WholeBatch = alone,
    freeze_encoder: bool = True,
) -> Loss:
    """Stage 1B, section 3.3: the flow loss, and the distance of pictures to their samples through the whole chain.

    Arguments as in ``pretrain_loss``; the encoder never learns. ``draws.chain`` holds the samples' steps and noise.
    """
    with torch.no_grad():
        quantized = tokenizer.quantizer(tokenizer.encoder(images), whole_batch)
    distances = {}
    if perceptual is not None:
        if draws.chain is None:
            raise ValueError("stage 1B needs draws of its samples, and these are another stage's")
        sample = sample_chain(tokenizer, quantized.code, draws.chain)
        distances["sample_distance"] = perceptual(images, sample).float().mean()
    # After the chain: the backward pass frees the flow loss's activations first, before it recomputes the chain's.
    flow_loss, _ = one_step(tokenizer, quantized.code, images, draws)
    return _sum(tokenizer, {}, flow_loss, distances, quantized)


def distill_loss(
    tokenizer: FlowMo,
    images: Tensor,
    draws: TrainingNoise,
    perceptual: Distance | None,
    whole_batch: WholeBatch = alone,
    freeze_encoder: bool = True,
    *,
    teacher: FlowMo,
) -> Loss:
    """Stage 1C: jumps along the teacher's paths against where they should end, one pass for each.

    The teacher walks from noise to its sample once, guidance included; the student regresses the mean velocity between
    points of that path, and its jumps to the end should look like the sample, or like the picture itself.
    Arguments as in ``pretrain_loss``; the encoder never learns, and is the teacher's.
    """
    if draws.jumps is None:
        raise ValueError("stage 1C needs draws of its jumps, and these are another stage's")
    noise, starts, ends = draws.jumps
    b, jumps = starts.shape
    with torch.no_grad():
        quantized = tokenizer.quantizer(tokenizer.encoder(images), whole_batch)
        path = teacher_path(teacher, quantized.code, noise, tokenizer.config.opt.teacher_steps)
        x_start, x_end = (path.at(times).flatten(0, 1) for times in (starts, ends))  # (b jumps) 3 h w
    starts, ends = starts.flatten(), ends.flatten()
    decoder = tokenizer.decoder
    code = decoder.embed_code(quantized.code).repeat_interleave(jumps, dim=0)
    velocity = decoder(x_start, code, decoder.modulate(starts, ends)).float()
    span = (starts - ends)[:, None, None, None]
    weighted = starts if tokenizer.config.opt.loss_space == "picture" else None
    flow_loss = flow.flow_loss(velocity, (x_start - x_end) / span, weighted)
    distances = {}
    if perceptual is not None:
        final = (x_start - span * velocity).unflatten(0, (b, jumps))[:, :2].flatten(0, 1)
        original = images if tokenizer.config.opt.distill_towards == "picture" else path.states[-1]
        distances["jump_distance"] = perceptual(original.repeat_interleave(2, dim=0), final).float().mean()
    return _sum(tokenizer, {}, flow_loss, distances, quantized)


def cut_out(images: Tensor, corners: Sequence[tuple[int, int]], h: int, w: int) -> Tensor:
    """Of each image b 3 H W the part of h × w pixels that begins at the row and column in ``corners``.

    A network's strides see every picture at the same phase, and a decoder finds the texture that pleases it there; cut
    at random, the same picture is seen at all of them (after E-LPIPS, Kettunen et al. 2019).
    """
    pairs = zip(images, corners, strict=True)
    return torch.stack([image[:, top : top + h, left : left + w] for image, (top, left) in pairs])


class Path(NamedTuple):
    """A sampler's way from noise to pictures: times n + 1 from 1 to 0, and the states there, n + 1 b 3 h w."""

    times: Tensor
    states: Tensor

    def at(self, t: Tensor) -> Tensor:
        """States at times b × k of each picture's own, b k 3 h w: Euler's path is straight between its steps."""
        after = torch.searchsorted(-self.times, -t.contiguous()).clamp(1, len(self.times) - 1)
        early, late = self.times[after - 1], self.times[after]
        share = ((early - t) / (early - late))[..., None, None, None]
        row = torch.arange(len(t), device=t.device)[:, None]
        return torch.lerp(self.states[after - 1, row], self.states[after, row], share)


@torch.no_grad()
def teacher_path(teacher: FlowMo, code: Tensor, noise: Tensor, steps: int = 0) -> Path:
    """The teacher's way from noise b 3 h w by its own settings of the sampler, or by ``steps`` of Euler's."""
    own = teacher.config.eval.sampling
    times = shifted_times(steps or own.sample_steps, own.rho)
    velocity = guided_velocity(teacher.decoder, code, times, own.guidance, own.guidance_low, own.guidance_high)
    states = [noise]
    for pair in itertools.pairwise(times):
        states.append(euler(velocity, states[-1], pair))
    return Path(to_device(torch.tensor(times), noise.device), torch.stack(states))


def one_step(tokenizer: FlowMo, code: Tensor, x: Tensor, draws: TrainingNoise) -> tuple[Tensor, Callable[[], Tensor]]:
    """The flow loss of pictures x noised to ``draws.t``, and the decoder's one-step estimate of them, b 3 h w."""
    decoder, t = tokenizer.decoder, draws.t
    x_t = flow.interpolate(x, draws.noise, t)
    velocity = decoder(x_t, decoder.embed_code(code, draws.keep), decoder.modulate(t)).float()
    weighted = t if tokenizer.config.opt.loss_space == "picture" else None
    return flow.flow_loss(velocity, draws.noise - x, weighted), lambda: flow.denoise(x_t, velocity, t)


def _sum(
    tokenizer: FlowMo,
    losses: dict[str, Tensor],
    flow_loss: Tensor,
    distances: dict[str, Tensor],
    quantized: Quantized,
) -> Loss:
    parts = {"flow": flow_loss, **losses}
    total = sum(parts.values()) + tokenizer.config.opt.lpips_weight * sum(distances.values())
    logged = {**parts, **distances, "loss": total}
    # A statistic may share its name with a weighted term, and must not replace it.
    logged |= {f"unweighted_{n}" if n in logged else n: value for n, value in quantized.statistics.items()}
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

    def __init__(self, tokenizer: FlowMo, perceptual: Distance | None, teacher: FlowMo | None = None):
        super().__init__()
        self.tokenizer = tokenizer
        self.networks = tuple(tokenizer.networks.values())
        # In a tuple and a partial function, so that they are no part of what is trained, sharded and saved.
        self.others = (perceptual,)
        losses: dict[str, Callable[..., Loss]] = {"pretrain": pretrain_loss, "posttrain": posttrain_loss}
        if teacher is not None:
            losses["distill"] = partial(distill_loss, teacher=teacher)
        self.loss = losses[tokenizer.config.stage]

    def forward(
        self, images: Tensor, draws: TrainingNoise | None, whole_batch: WholeBatch = alone, freeze_encoder: bool = False
    ) -> Loss | None:
        """The loss of some pictures; without ``draws`` only ``whole_batch`` is shown their statistics."""
        if draws is None:
            self.tokenizer.quantizer(self.tokenizer.encoder(images), whole_batch)
            return None
        return self.loss(self.tokenizer, images, draws, *self.others, whole_batch, freeze_encoder)
