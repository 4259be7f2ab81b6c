"""Random numbers of a training step, drawn before the loss so that the losses are deterministic functions."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from flowmo.config import Config, ModelConfig, OptConfig
from flowmo.model import flow
from flowmo.model.sampler import shifted_times
from flowmo.streams import Stream, stream

NULL_CODE_SHARE = 0.1
"""Probability that the null code replaces an image's code, for classifier-free guidance."""

MAX_STUDENT_STEPS = 25
"""Largest number of sampling steps that a student of stage 1C learns."""


class Jumps(NamedTuple):
    """Stage 1C: noise b × c × h × w, where the teacher's path starts; start and end times of jumps, b × jumps."""

    noise: Tensor
    starts: Tensor
    ends: Tensor


class Chain(NamedTuple):
    """Stage 1B: initial noise b × c × h × w, times b × (steps + 1) from 1 to 0, b × steps, False for a null code."""

    noise: Tensor
    times: Tensor
    keep: Tensor


class TrainingNoise(NamedTuple):
    """Random numbers of a micro-batch.

    Attributes:
        t: timesteps, b in [0, 1].
        noise: b × c × h × w.
        keep: bool b, False where the null code replaces the code.
        chain: stage 1B only.
        jumps: stage 1C only.
        crop_corners: (top, left) of each crop that the perceptual loss sees, with ``opt.lpips_jitter``, ``lpips_crop``.
        kept: int64 b, sub-tokens that each image keeps, with ``model.nested_dropout``.
    """

    t: Tensor
    noise: Tensor
    keep: Tensor
    chain: Chain | None = None
    jumps: Jumps | None = None
    crop_corners: Sequence[tuple[int, int]] | None = None
    kept: Tensor | None = None

    @classmethod
    def of(cls, config: Config, images: Tensor, indices: Sequence[int], seed: int | None = None) -> Self:
        """Draw the numbers of ``images`` b × c × h × w, whose positions in the run are ``indices``.

        They depend on the seed and the index alone, so they survive interruption and any split of a batch.

        Args:
            seed: ``None`` is ``trainer.seed``.
        """
        model, opt, device = config.model, config.opt, images.device
        seed = config.trainer.seed if seed is None else seed

        def normal(purpose: Stream) -> Tensor:
            generators = (stream(seed, purpose, i, device=device) for i in indices)
            return torch.stack([torch.randn(images.shape[1:], generator=g, device=device) for g in generators])

        def uniform(purpose: Stream, *shape: int) -> Tensor:
            return torch.stack([torch.rand(shape, generator=stream(seed, purpose, i)) for i in indices])

        def keep(purpose: Stream, guided: bool, *shape: int) -> Tensor:
            return to_device(uniform(purpose, *shape) >= (NULL_CODE_SHARE if guided else 0.0), device)

        t = [flow.sample_timesteps(1, opt.schedule, stream(seed, Stream.TIMESTEP, i), opt.anchor) for i in indices]
        chain = jumps = corners = kept = None
        if config.stage == "posttrain":
            steps = model.posttrain_sample_k
            times = flow.random_steps(uniform(Stream.CHAIN_TIMES, steps))
            keeps = keep(Stream.CHAIN_DROP, model.posttrain_sample_enable_cfg, steps)
            chain = Chain(normal(Stream.CHAIN_NOISE), to_device(times, device), keeps)
        if config.stage == "distill":
            rho = config.eval.sampling.rho
            drawn = [random_jumps(opt.jumps, rho, stream(seed, Stream.JUMPS, i)) for i in indices]
            starts, ends = (to_device(torch.stack(times), device) for times in zip(*drawn, strict=True))
            jumps = Jumps(normal(Stream.CHAIN_NOISE), starts, ends)
        if opt.lpips_jitter or opt.lpips_crop:
            margins = [max(size - crop, 0) for size, crop in zip(images.shape[2:], crop_size(opt, images), strict=True)]
            corners = [random_corner(margins, stream(seed, Stream.LPIPS_CROP, i)) for i in indices]
        if model.nested_dropout:
            kept = to_device(kept_sub_tokens(model, seed, indices), device)
        code_keep = keep(Stream.CODE_DROP, model.enable_cfg)
        return cls(to_device(torch.cat(t), device), normal(Stream.NOISE), code_keep, chain, jumps, corners, kept)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without blocking the host: a GPU copies asynchronously from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def crop_size(opt: OptConfig, images: Tensor) -> tuple[int, int]:
    """Return height and width of the crop of ``images`` b × c × h × w that the perceptual loss sees."""
    if opt.lpips_crop:
        return opt.lpips_crop, opt.lpips_crop
    return images.shape[2] - opt.lpips_jitter, images.shape[3] - opt.lpips_jitter


def random_corner(margins: Sequence[int], generator: torch.Generator) -> tuple[int, int]:
    top, left = (int(torch.randint(0, margin + 1, (), generator=generator)) for margin in margins)
    return top, left


def kept_sub_tokens(model: ModelConfig, seed: int, indices: Sequence[int]) -> Tensor:
    """Draw the length of the sub-token prefix that each image keeps, int64 b: all, or uniform over all lengths."""
    if model.ids_per_token is None:
        raise ValueError("Nested dropout needs the sub-tokens of fsq or lfq.")
    count, kept = model.ids_per_token[0], []
    for index in indices:
        generator = stream(seed, Stream.PREFIX, index)
        drop = float(torch.rand((), generator=generator)) < model.nested_dropout
        kept.append(int(torch.randint(1, count + 1, (), generator=generator)) if drop else count)
    return torch.tensor(kept)


def random_jumps(count: int, rho: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw start and end times of one image's jumps, ``count`` each.

    Each jump is one step of a sampler of 1 to ``MAX_STUDENT_STEPS`` steps: first the whole path in one step, then the
    last step of a sampler, then any step. The number of steps is log-uniform, so that long jumps are frequent.
    """
    starts, ends = [1.0], [0.0]
    for jump in range(1, count):
        exponent, position = torch.rand(2, generator=generator).tolist()
        times = shifted_times(round(MAX_STUDENT_STEPS**exponent), rho)
        start = len(times) - 2 if jump == 1 else int(position * (len(times) - 1))
        starts.append(times[start])
        ends.append(times[start + 1])
    return torch.tensor(starts), torch.tensor(ends)
