"""Random numbers of a training step, drawn before the loss so that the losses are deterministic functions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

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


Crop = tuple[slice, slice]
"""Rows and columns of a part of an image."""


class Jumps(NamedTuple):
    """Stage 1C: noise b × c × h × w, where the teacher's path starts; start and end times of jumps, b × jumps."""

    noise: Tensor
    starts: Tensor
    ends: Tensor


class Chain(NamedTuple):
    """Stage 1B: noise b × c × h × w, times b × (steps + 1) from 1 to 0, bool b × steps, False for the null code."""

    noise: Tensor
    times: Tensor
    cfg_keep: Tensor


class TrainingNoise(NamedTuple):
    """Random numbers of a micro-batch.

    Attributes:
        t: timesteps, b in [0, 1].
        noise: b × c × h × w.
        cfg_keep: bool b, False where the null code replaces the code.
        chain: stage 1B only.
        jumps: stage 1C only.
        crops: part of each image that the perceptual loss sees, with ``opt.lpips_jitter`` or ``opt.lpips_crop``.
        num_sub_tokens: int64 b, sub-tokens that each image keeps, with ``model.nested_dropout``.
    """

    t: Tensor
    noise: Tensor
    cfg_keep: Tensor
    chain: Chain | None = None
    jumps: Jumps | None = None
    crops: Sequence[Crop] | None = None
    num_sub_tokens: Tensor | None = None

    @classmethod
    def of(cls, config: Config, images: Tensor, indices: Sequence[int], seed: int | None = None) -> Self:
        """Draw the numbers of ``images`` b × c × h × w, whose positions in the run are ``indices``.

        They depend on the seed and the index alone, so they survive interruption and any split of a batch.

        Args:
            seed: ``None`` is ``trainer.seed``.
        """
        model, opt, device = config.model, config.opt, images.device
        seed = config.trainer.seed if seed is None else seed

        def per_image(purpose: Stream, draw: Callable[[torch.Generator], Any]) -> list[Any]:
            return [draw(stream(seed, purpose, i)) for i in indices]

        def normal(purpose: Stream) -> Tensor:
            generators = (stream(seed, purpose, i, device=device) for i in indices)
            return torch.stack([torch.randn(images.shape[1:], generator=g, device=device) for g in generators])

        def uniform(purpose: Stream, *shape: int) -> Tensor:
            return torch.stack(per_image(purpose, lambda g: torch.rand(shape, generator=g)))

        def keep(purpose: Stream, guided: bool, *shape: int) -> Tensor:
            return to_device(uniform(purpose, *shape) >= (NULL_CODE_SHARE if guided else 0.0), device)

        t = per_image(Stream.TIMESTEP, lambda g: flow.sample_timesteps(1, opt.schedule, g, opt.anchor))
        chain = jumps = crops = num_sub_tokens = None
        if config.stage == "posttrain":
            steps = model.posttrain_sample_k
            times = flow.random_steps(uniform(Stream.CHAIN_TIMES, steps))
            keeps = keep(Stream.CHAIN_DROP, model.posttrain_sample_enable_cfg, steps)
            chain = Chain(normal(Stream.CHAIN_NOISE), to_device(times, device), keeps)
        if config.stage == "distill":
            rho = config.eval.sampling.rho
            drawn = per_image(Stream.JUMPS, lambda g: random_jumps(opt.jumps, rho, g))
            starts, ends = (to_device(torch.stack(times), device) for times in zip(*drawn, strict=True))
            jumps = Jumps(normal(Stream.CHAIN_NOISE), starts, ends)
        if opt.lpips_jitter or opt.lpips_crop:
            crops = per_image(Stream.LPIPS_CROP, lambda g: random_crop(opt, images, g))
        if model.nested_dropout:
            prefixes = per_image(Stream.PREFIX, lambda g: prefix_length(model, g))
            num_sub_tokens = to_device(torch.tensor(prefixes), device)
        cfg_keep = keep(Stream.CODE_DROP, model.enable_cfg)
        t, noise = to_device(torch.cat(t), device), normal(Stream.NOISE)
        return cls(t, noise, cfg_keep, chain, jumps, crops, num_sub_tokens)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without blocking the host: a GPU copies asynchronously from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def random_crop(opt: OptConfig, images: Tensor, generator: torch.Generator) -> Crop:
    """Draw rows and columns of the crop of an image of b × c × h × w that the perceptual loss sees."""
    crop = []
    for size in images.shape[2:]:
        length = opt.lpips_crop or size - opt.lpips_jitter
        start = int(torch.randint(0, max(size - length, 0) + 1, (), generator=generator))
        crop.append(slice(start, start + length))
    return crop[0], crop[1]


def prefix_length(model: ModelConfig, generator: torch.Generator) -> int:
    """Draw the length of the sub-token prefix that an image keeps: all, or uniform over all lengths."""
    assert model.ids_per_token  # nested dropout needs ids
    count = model.ids_per_token[0]
    if float(torch.rand((), generator=generator)) >= model.nested_dropout:
        return count
    return int(torch.randint(1, count + 1, (), generator=generator))


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
