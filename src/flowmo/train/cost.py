"""Forecast of a training step's FLOPs and memory per image, on fake tensors without contents."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flowmo.config import Config, DataConfig, EvalConfig, OptConfig, SamplingConfig, TrainerConfig
from flowmo.data.tokens import Vocabulary
from flowmo.distributed import World
from flowmo.evaluate.speed import PEAK_TFLOPS, UNCOUNTED
from flowmo.generate.network import build_network
from flowmo.losses.noise import Chain, Jumps, TrainingNoise
from flowmo.losses.perceptual import build_distance
from flowmo.losses.stages import Stage
from flowmo.model import transformer
from flowmo.model.quantizers import local_statistic
from flowmo.model.quantizers.infill import HUB_NAMES
from flowmo.tokenizer import FlowMo
from flowmo.train.parallel import prepare, recompute
from flowmo.train.schedule import PAPER_BATCH, Schedule

IMAGENET_IMAGES = 1_281_167
KEPT_BYTES, LEARNING_BYTES = 2 * 4, 3 * 4
"""Weight and EMA per parameter; gradient and Adam's two moments per trained parameter; in float32."""
COUNTED = 2
"""Images of the counted batch. With one, products of tables would look like products of the batch."""

Step = tuple[Callable[[], Tensor], Sequence[nn.Module]]
"""Function that computes a loss, and the modules whose parameters it uses."""


@dataclass(frozen=True)
class Memory:
    """Memory of training, in bytes.

    Attributes:
        state_bytes: weights, gradients, Adam's two moments and EMA, unsharded.
        activation_bytes: growth of a step's peak memory per image.
        fixed_bytes: part of the peak that does not grow with the batch, such as bfloat16 copies of the weights.
    """

    state_bytes: int
    activation_bytes: float
    fixed_bytes: float = 0.0

    def peak_bytes(self, images: int, shards: int = 1) -> float:
        """Return the peak memory of a micro-batch of ``images``, with the state in ``shards``."""
        return self.state_bytes / shards + self.fixed_bytes + images * self.activation_bytes

    def max_images(self, memory: float, shards: int = 1) -> int:
        """Return the largest micro-batch, at least 1, that fits in ``memory`` bytes."""
        free = 0.9 * memory - self.peak_bytes(0, shards)  # 10 % for fragmentation and libraries
        return max(int(free / self.activation_bytes), 1)


def describe_training(config: Config) -> dict[str, Any]:
    """Return the forecast cost of a whole run; nothing is measured."""
    schedule = Schedule.of(config, config.data.global_batch_size or PAPER_BATCH, IMAGENET_IMAGES)
    images = schedule.duration
    learning = min(schedule.freeze_encoder_after, images)
    early, late = training_flops(config), training_flops(config, freeze_encoder=True)
    memory = training_memory(config)
    checkpointing = replace(config, trainer=replace(config.trainer, activation_checkpointing=True))
    flops = learning * early + (images - learning) * late
    return {
        "training_images": images,
        "tflop_per_image": round(early / 1e12, 3),
        "tflop_per_image_encoder_frozen": round(late / 1e12, 3),
        "exaflop_of_the_run": round(flops / 1e18, 1),
        "gib_of_state": round(memory.state_bytes / 2**30, 2),
        "gib_of_activations_per_image": round(memory.activation_bytes / 2**30, 3),
        "gib_with_activation_checkpointing": round(training_memory(checkpointing).activation_bytes / 2**30, 3),
        "hours_on_8_h100_at_40_percent": round(flops / (8 * 0.4 * PEAK_TFLOPS["H100"] * 1e12) / 3600, 1),
    }


def training_flops(config: Config, freeze_encoder: bool = False) -> float:
    """Forecast the FLOPs of stage 1A, 1B or 1C per image. This takes seconds and allocates no weights.

    Matrix products and convolutions count, forward and backward. Recomputation counts for stage 1B's chain, but not for
    activation checkpointing.

    Args:
        freeze_encoder: forecast the steps in which the encoder no longer learns.
    """
    return _training_flops(_relevant(config), freeze_encoder or config.model.train == "decoder")


def training_memory(config: Config, freeze_encoder: bool = False) -> Memory:
    """Forecast the memory of stage 1A, 1B or 1C. Arguments as in ``training_flops``."""
    return _training_memory(_relevant(config), freeze_encoder or config.model.train == "decoder")


def _relevant(config: Config) -> Config:
    """Keep only what matters for the cost, so that more calls find their result in the cache."""
    model, opt = config.model, config.opt
    if model.quantization_type in HUB_NAMES:  # its language model is not counted
        model = replace(model, quantization_type="noop")
    return Config(
        data=DataConfig(image_size=config.data.image_size, crop_sizes=config.data.crop_sizes),
        model=model,
        opt=OptConfig(
            lpips_weight=opt.lpips_weight,
            lpips_mode=opt.lpips_mode,
            lpips_crop=opt.lpips_crop,
            teacher="teacher" if opt.teacher else "",
            teacher_steps=opt.teacher_steps,
            jumps=opt.jumps,
        ),
        eval=EvalConfig(sampling=SamplingConfig(guidance=1.0)),
        trainer=_memory_settings(config.trainer),
    )


def _memory_settings(trainer: TrainerConfig, plain: bool = False) -> TrainerConfig:
    """Keep the settings that change memory; ``plain`` replaces them for FLOP counts."""
    return TrainerConfig(
        enable_bfloat16=plain or trainer.enable_bfloat16,
        activation_checkpointing=trainer.activation_checkpointing and not plain,
        checkpoint_keeps=trainer.checkpoint_keeps,
    )


@contextmanager
def _fake_tensors() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            yield
        finally:
            transformer.rotary_angles.cache_clear()  # drop tables without contents


def _chain_steps(config: Config) -> tuple[int, int]:
    """Return how many steps of stage 1B's chain to run, and how many more to extrapolate.

    Beyond two steps, each adds the same FLOPs and one stored state.
    """
    steps = config.model.posttrain_sample_k
    run = min(steps, 2) if config.stage == "posttrain" else steps
    return run, steps - run


def _sizes(config: Config) -> Sequence[tuple[int, int]]:
    return config.data.crops or [(config.data.image_size, config.data.image_size)]


@cache
def _training_flops(config: Config, freeze_encoder: bool) -> float:
    config = replace(config, trainer=_memory_settings(config.trainer, plain=True))
    steps, extra = _chain_steps(config)

    def mean(chain: int) -> float:  # training draws each size with equal probability
        counts = [_flops(_tokenizer_step(config, freeze_encoder, COUNTED, size, chain)) for size in _sizes(config)]
        return sum(counts) / len(counts)

    with _fake_tensors():
        flops = mean(steps)
        if extra:
            flops += extra * (flops - mean(1))
    return flops / COUNTED


@cache
def _training_memory(config: Config, freeze_encoder: bool) -> Memory:
    steps, extra = _chain_steps(config)
    largest = max(_sizes(config), key=math.prod)
    with _fake_tensors():
        step = partial(_tokenizer_step, config, freeze_encoder, size=largest, chain=steps)
        per_image, fixed = _memory(step, config.trainer.enable_bfloat16)
        state_bytes = 0
        for name, parameter in FlowMo(config).named_parameters():
            learns = config.model.train in ("all", name.partition(".")[0])
            state_bytes += (KEPT_BYTES + LEARNING_BYTES * learns) * parameter.numel()
    return Memory(state_bytes, per_image + extra * 4 * config.model.channels * math.prod(largest), fixed)


@cache
def generator_flops(config: Config, vocabulary: Vocabulary) -> float:
    """Forecast the FLOPs of stage 2 per image."""
    plain = replace(config, trainer=_memory_settings(config.trainer, plain=True))
    with _fake_tensors():
        return _flops(_generator_step(plain, vocabulary, COUNTED)) / COUNTED


@cache
def generator_memory(config: Config, vocabulary: Vocabulary) -> Memory:
    """Forecast the memory of stage 2."""
    with _fake_tensors():
        per_image, fixed = _memory(partial(_generator_step, config, vocabulary), config.trainer.enable_bfloat16)
        _, (network,) = _generator_step(config, vocabulary, COUNTED)
        state_bytes = (KEPT_BYTES + LEARNING_BYTES) * sum(p.numel() for p in network.parameters())
        return Memory(state_bytes, per_image, fixed)


def _generator_step(config: Config, vocabulary: Vocabulary, count: int) -> Step:
    ids = torch.empty(count, vocabulary.ids, dtype=torch.int64)
    network = build_network(config.generator, vocabulary.id_bits, vocabulary.ids, len(vocabulary.classes))
    for block in network.blocks if config.trainer.activation_checkpointing else ():
        recompute(block, config.trainer.checkpoint_keeps)
    mask = torch.empty_like(ids, dtype=torch.bool)
    return lambda: network(ids, mask, ids[:, 0]).float().sum(), [network]


def _tokenizer_step(config: Config, freeze_encoder: bool, count: int, size: tuple[int, int], chain: int) -> Step:
    config = replace(config, model=replace(config.model, posttrain_sample_k=chain))
    channels = config.perceptual_channels
    perceptual = build_distance(config.opt.lpips_mode, None, False, channels) if config.opt.lpips_weight else None
    tokenizer, teacher = FlowMo(config), None
    tokenizer.encoder.requires_grad_(config.stage == "pretrain" and not freeze_encoder)
    tokenizer.decoder.requires_grad_(config.model.train != "encoder")
    if config.stage == "distill":
        # it samples by the paper's settings, unless the number of steps is set
        sampling = SamplingConfig(sample_steps=config.opt.teacher_steps or SamplingConfig().sample_steps)
        model = replace(config.model, mean_velocity=False)
        teacher_config = Config(data=config.data, model=model, eval=EvalConfig(sampling=sampling))
        teacher = FlowMo(teacher_config).requires_grad_(False)
    stage = prepare(Stage(tokenizer, config.opt, perceptual, teacher), World(), config.trainer)
    images = torch.empty(count, config.model.channels, *size)
    keep = torch.ones(count, chain, dtype=torch.bool)
    sampled = Chain(images, torch.empty(count, chain + 1), keep)
    times = torch.empty(count, config.opt.jumps)
    corners = [(0, 0)] * count if config.opt.lpips_crop else None
    noise = TrainingNoise(torch.empty(count), images, keep[:, 0], sampled, Jumps(images, times, times), corners)
    modules = [module for module in (tokenizer, perceptual, teacher) if module is not None]
    return lambda: stage(images, noise, local_statistic, freeze_encoder).total, modules


def _backward(loss: Callable[[], Tensor], bfloat16: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        total = loss()
    total.backward()


def _flops(step: Step) -> float:
    """Count the FLOPs of a loss and its gradients."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        _backward(step[0], bfloat16=True)
    return counter.get_total_flops()


def _memory(step: Callable[[int], Step], bfloat16: bool) -> tuple[float, float]:
    """Return the growth per image and the fixed part of the peak memory beside the state."""
    few, many = (_peak(*step(images), bfloat16) for images in (COUNTED, 2 * COUNTED))
    growth = (many - few) / COUNTED
    return growth, few - COUNTED * growth


def _peak(loss: Callable[[], Tensor], modules: Sequence[nn.Module], bfloat16: bool) -> float:
    memory = PeakMemory()
    for parameter in (p for module in modules for p in module.parameters()):
        memory.ignore(parameter)
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)  # counted as state
            memory.ignore(parameter.grad)
    with memory:  # apart from the FLOP counter, whose hooks keep activations that checkpointing would free
        _backward(loss, bfloat16)
    return memory.peak


class PeakMemory(TorchDispatchMode):
    """Tracks the bytes of live tensors that operators create: now, and at the peak.

    Works on fake tensors too. Workspace inside an operator is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        out = function(*arguments, **(options or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return out

    def ignore(self, tensor: Tensor) -> None:
        """Do not count an existing tensor."""
        self._known.add(tensor.untyped_storage()._cdata)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
