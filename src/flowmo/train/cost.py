"""Forecast of a training step's FLOPs and memory per image, on fake tensors without contents."""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flowmo.config import Config, TrainerConfig
from flowmo.data.tokens import Vocabulary
from flowmo.evaluate.speed import PEAK_TFLOPS, UNCOUNTED
from flowmo.generate.generator import Generator
from flowmo.losses.noise import Chain, Jumps, TrainingNoise
from flowmo.losses.perceptual import build_distance
from flowmo.losses.stages import Stage
from flowmo.model import transformer
from flowmo.model.quantizers import local_statistic
from flowmo.model.quantizers.infill import HUB_NAMES
from flowmo.tokenizer import FlowMo
from flowmo.train.generator import GeneratorStage
from flowmo.train.parallel import recompute
from flowmo.train.schedule import PAPER_BATCH, Schedule

IMAGENET_IMAGES = 1_281_167
KEPT_BYTES, LEARNING_BYTES = 2 * 4, 3 * 4
"""Weight and EMA per parameter; gradient and Adam's two moments per trained parameter; in float32."""
COUNTED = 2
"""Images of the counted batch. With one, products of tables would look like products of the batch."""


@dataclass(frozen=True)
class Memory:
    """Memory of training, in bytes.

    Attributes:
        state_bytes: weights, gradients, Adam's two moments and EMA, unsharded.
        activation_bytes: growth of a step's peak memory per image.
        fixed_bytes: what does not grow with the batch: the weights of a perceptual network and of a teacher, and a part
            of the peak, such as bfloat16 copies of the weights.
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
    """Return the forecast cost of a whole run; nothing is measured.

    Of stages 1B and 1C it tells the cost of an image: ``trainer.duration`` counts the stages before, too.
    """
    early, late = training_flops(config), training_flops(config, freeze_encoder=True)
    memory = training_memory(config)
    checkpointing = replace(config, trainer=replace(config.trainer, activation_checkpointing=True))
    whole: dict[str, Any] = {}
    if config.stage == "pretrain":
        images, flops = run_flops(config, IMAGENET_IMAGES)
        hours = flops / (8 * 0.4 * PEAK_TFLOPS["H100"] * 1e12) / 3600
        whole = {"training_images": images, "exaflop_of_the_run": round(flops / 1e18, 1)}
        whole["hours_on_8_h100_at_40_percent"] = round(hours, 1)
    return {
        "tflop_per_image": round(early / 1e12, 3),
        "tflop_per_image_encoder_frozen": round(late / 1e12, 3),
        "gib_of_state": round(memory.state_bytes / 2**30, 2),
        "gib_of_activations_per_image": round(memory.activation_bytes / 2**30, 3),
        "gib_with_activation_checkpointing": round(training_memory(checkpointing).activation_bytes / 2**30, 3),
        **whole,
    }


def run_flops(config: Config, dataset: int) -> tuple[int, float]:
    """Forecast the images and FLOPs of a run of stage 1A on ``dataset`` images; its encoder may freeze on the way."""
    schedule = Schedule.of(config, config.data.global_batch_size or PAPER_BATCH, dataset)
    images, frozen = schedule.duration, max(schedule.duration - schedule.freeze_encoder_after, 0)
    late = frozen * training_flops(config, freeze_encoder=True) if frozen else 0.0
    return images, (images - frozen) * training_flops(config) + late


@cache
def training_flops(config: Config, freeze_encoder: bool = False, vocabulary: Vocabulary | None = None) -> float:
    """Forecast the FLOPs of a training step per image. This takes seconds and allocates no weights.

    Matrix products and convolutions count, forward and backward. Recomputation counts for stage 1B's chain, but not for
    activation checkpointing.

    Args:
        freeze_encoder: forecast the steps in which the encoder no longer learns.
        vocabulary: of the tokens of stage 2.
    """
    config = replace(config, trainer=TrainerConfig())
    steps, extra = _chain_steps(config)

    def mean(chain: int) -> float:  # training draws each size with equal probability
        counts = []
        for size in _sizes(config):
            loss, _ = _step(config, freeze_encoder, vocabulary, COUNTED, size, chain)
            with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
                _backward(loss, bfloat16=True)
            counts.append(counter.get_total_flops() / COUNTED)
        return sum(counts) / len(counts)

    with _fake_tensors():
        flops = mean(steps)
        return flops + extra * (flops - mean(1)) if extra else flops


@cache
def training_memory(config: Config, freeze_encoder: bool = False, vocabulary: Vocabulary | None = None) -> Memory:
    """Forecast the memory of a training step. Arguments as in ``training_flops``."""
    (steps, extra), largest, peaks, state_bytes = _chain_steps(config), max(_sizes(config), key=math.prod), [], 0
    with _fake_tensors():
        for images in (COUNTED, 2 * COUNTED):
            loss, modules = _step(config, freeze_encoder, vocabulary, images, largest, steps)
            peaks.append(_peak(loss, modules, config.trainer.enable_bfloat16))
    for parameter in modules[0].parameters():
        # an encoder that freezes in the course of stage 1A keeps its moments
        learns = parameter.requires_grad or (config.stage, config.model.train) == ("pretrain", "all")
        state_bytes += (KEPT_BYTES + LEARNING_BYTES * learns) * parameter.numel()
    others = (parameter for module in modules[1:] for parameter in module.parameters())
    fixed = sum(parameter.numel() * parameter.element_size() for parameter in others)  # teacher, perceptual network
    growth = (peaks[1] - peaks[0]) / COUNTED
    stored = extra * 4 * config.model.channels * math.prod(largest)
    return Memory(state_bytes, growth + stored, peaks[0] - COUNTED * growth + fixed)


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


def _step(
    config: Config, freeze_encoder: bool, vocabulary: Vocabulary | None, count: int, size: tuple[int, int], chain: int
) -> tuple[Callable[[], Tensor], Sequence[nn.Module]]:
    """Return a function that computes the loss of ``count`` images, and the modules in use, the trained one first."""
    if vocabulary is not None:
        ids = torch.empty(count, vocabulary.ids, dtype=torch.int64)
        module = GeneratorStage(Generator(config, vocabulary))
        _checkpoint_blocks(module.networks, config.trainer)
        mask = torch.empty_like(ids, dtype=torch.bool)
        return lambda: module(ids, ids[:, 0], mask).loss, [module.generator]
    settings: dict[str, Any] = {"model.posttrain_sample_k": chain}
    if config.model.quantization_type in HUB_NAMES:  # its language model is not counted
        settings["model.quantization_type"] = "noop"
    config = config.updated(settings)
    frozen, opt = freeze_encoder or config.model.train == "decoder", config.opt
    dtype = torch.bfloat16 if opt.lpips_bfloat16 else torch.float32
    perceptual = build_distance(opt.lpips_mode, pretrained=False, dtype=dtype) if opt.lpips_weight else None
    tokenizer, teacher = FlowMo(config), None
    tokenizer.encoder.requires_grad_(config.stage == "pretrain" and not frozen)
    tokenizer.decoder.requires_grad_(config.model.train != "encoder")
    if opt.teacher:  # it samples by the paper's settings, unless the number of steps is set
        model = replace(config.model, mean_velocity=False)
        own = replace(config, eval=Config().eval, opt=replace(opt, teacher=""), model=model)
        teacher = FlowMo(own).requires_grad_(False)
    stage = Stage(tokenizer, opt, perceptual, teacher)
    _checkpoint_blocks(stage.networks, config.trainer)
    images = torch.empty(count, config.model.channels, *size)
    keep = torch.ones(count, chain, dtype=torch.bool)
    sampled = Chain(images, torch.empty(count, chain + 1), keep)
    times = torch.empty(count, opt.jumps)
    crops = [(slice(opt.lpips_crop), slice(opt.lpips_crop))] * count if opt.lpips_crop else None
    noise = TrainingNoise(torch.empty(count), images, keep[:, 0], sampled, Jumps(images, times, times), crops)
    modules = [module for module in (tokenizer, perceptual, teacher) if module is not None]
    return lambda: stage(images, noise, local_statistic, frozen).loss, modules


def _checkpoint_blocks(networks: Iterable[Any], trainer: TrainerConfig) -> None:
    for network in networks if trainer.activation_checkpointing else ():
        for block in network.blocks:
            recompute(block, trainer.checkpoint_keeps)


def _backward(loss: Callable[[], Tensor], bfloat16: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        total = loss()
    total.backward()


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
