"""What a training step costs, by arithmetic: FLOPs and bytes of a picture, counted on tensors without contents."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
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
from flowmo.generate.network import build_network
from flowmo.losses.noise import Chain, Jumps, TrainingNoise
from flowmo.losses.perceptual import build_distance
from flowmo.losses.stages import Stage
from flowmo.model import transformer
from flowmo.model.quantizers import alone
from flowmo.model.quantizers.infill import HUB_NAMES
from flowmo.tokenizer import FlowMo
from flowmo.train.parallel import prepare, recompute
from flowmo.train.schedule import PAPER_BATCH, Schedule

PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 FLOPs a second with float32 sums, from the makers' data sheets; the first name that matches counts."""

IMAGENET = 1_281_167
"""Training pictures of ImageNet-1K, for lengths in epochs."""

COUNTED = 2
"""Pictures of the batch that is counted: with one, a product of tables could look like a product of the batch."""


@dataclass(frozen=True)
class Cost:
    """Cost of training.

    Attributes:
        flops: floating-point operations of matrix products and convolutions a picture, forward and backward. What
            activation checkpointing computes again is not among them, what stage 1B's chain does is.
        state_bytes: weights, gradients, Adam's two moments and the averaged weights, whole.
        activation_bytes: growth of the step's peak memory per image: what the forward pass keeps, and what the
            backward pass computes again and holds at once.
        fixed_bytes: part of the peak that no image adds to, such as copies of the weights in bfloat16.
    """

    flops: float
    state_bytes: int
    activation_bytes: float
    fixed_bytes: float = 0.0

    def peak_bytes(self, images: int, shards: int = 1) -> float:
        """Peak memory of a step over a micro-batch of ``images``, with the state cut into ``shards``."""
        return self.state_bytes / shards + self.fixed_bytes + images * self.activation_bytes

    def max_images(self, memory: float, shards: int = 1) -> int:
        """Pictures of one pass that fit into ``memory`` bytes beside the state cut into ``shards``; at least 1."""
        free = 0.9 * memory - self.peak_bytes(0, shards)  # a tenth for the allocator's gaps and the libraries
        return max(int(free / self.activation_bytes), 1)


def training_cost(config: Config, freeze_encoder: bool = False, fused: bool = True) -> Cost:
    """Cost of the stage that the settings name. Takes a few seconds and no memory to speak of.

    Args:
        freeze_encoder: of the time when the encoder no longer learns.
        fused: with attention in one kernel, as on a GPU; CPUs keep the tables of attention in bfloat16.
    """
    model = config.model
    if model.quantization_type in HUB_NAMES:  # its language model is not counted
        model = replace(model, quantization_type="noop")
    relevant = Config(
        data=DataConfig(image_size=config.data.image_size, crop_sizes=config.data.crop_sizes),
        model=model,
        opt=OptConfig(
            lpips_weight=config.opt.lpips_weight,
            lpips_mode=config.opt.lpips_mode,
            lpips_crop=config.opt.lpips_crop,
            teacher="teacher" if config.opt.teacher else "",
            teacher_steps=config.opt.teacher_steps,
            jumps=config.opt.jumps,
        ),
        eval=EvalConfig(sampling=SamplingConfig(guidance=1.0)),
        trainer=TrainerConfig(
            enable_bfloat16=config.trainer.enable_bfloat16,
            activation_checkpointing=config.trainer.activation_checkpointing,
            checkpoint_keeps=config.trainer.checkpoint_keeps,
        ),
    )
    return _training_cost(relevant, freeze_encoder, fused)


def describe_training(config: Config) -> dict[str, Any]:
    """What the run of ``config`` costs, by arithmetic: nothing here is measured."""
    times = Schedule.of(config, config.data.global_batch_size or PAPER_BATCH, IMAGENET)
    images = times.duration
    thawed = min(times.freeze_encoder_after, images)
    early, late = training_cost(config), training_cost(config, freeze_encoder=True)
    recomputing = replace(config, trainer=replace(config.trainer, activation_checkpointing=True))
    flops = thawed * early.flops + (images - thawed) * late.flops
    return {
        "training_images": images,
        "tflop_per_image": round(early.flops / 1e12, 3),
        "tflop_per_image_encoder_frozen": round(late.flops / 1e12, 3),
        "exaflop_of_the_run": round(flops / 1e18, 1),
        "gib_of_state": round(early.state_bytes / 2**30, 2),
        "gib_of_activations_per_image": round(early.activation_bytes / 2**30, 3),
        "gib_with_activation_checkpointing": round(training_cost(recomputing).activation_bytes / 2**30, 3),
        "hours_on_8_h100_at_40_percent": round(flops / (8 * 0.4 * PEAKS["H100"]) / 3600, 1),
    }


@cache
def generator_cost(config: Config, vocabulary: Vocabulary, fused: bool = True) -> Cost:
    """Cost of stage 2, as ``training_cost`` gives that of the others."""

    def build(precise: Config, images: int) -> tuple[Callable[[], Tensor], nn.Module]:
        ids = torch.empty(images, vocabulary.ids, dtype=torch.int64)
        network = build_network(precise.generator, vocabulary.id_bits, vocabulary.ids, len(vocabulary.classes))
        for block in network.blocks if precise.trainer.activation_checkpointing else ():
            recompute(block, precise.trainer.checkpoint_keeps)
        arguments = (ids, torch.empty_like(ids, dtype=torch.bool), ids[:, 0])
        return lambda: network(*arguments).float().sum(), network

    plain = replace(config, trainer=replace(config.trainer, enable_bfloat16=True, activation_checkpointing=False))
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss, network = build(plain, COUNTED)
        flops, parameters = _flops(loss, bfloat16=True), sum(p.numel() for p in network.parameters())
        bfloat16, peaks = config.trainer.enable_bfloat16, []
        for images in (COUNTED, 2 * COUNTED):
            loss, network = build(config, images)
            peaks.append(_peak(loss, [network], bfloat16))
    few, many = peaks
    return Cost(flops / COUNTED, 5 * 4 * parameters, *_per_image(few, many))


def _per_image(few: float, many: float) -> tuple[float, float]:
    """Growth per image and fixed part of the peaks of ``COUNTED`` and twice as many images."""
    growth = (many - few) / COUNTED
    return growth, few - COUNTED * growth


@cache
def _training_cost(config: Config, freeze_encoder: bool, fused: bool) -> Cost:
    # The counter knows the products of plain attention; the fused one does the same products and keeps less.
    # A step of stage 1B's chain beyond the second adds its FLOPs and the state that it starts from, and no more.
    beyond = max(config.model.posttrain_sample_k - 2, 0) if config.stage == "posttrain" else 0

    def shorter(config: Config, steps: int) -> Config:
        return replace(config, model=replace(config.model, posttrain_sample_k=steps))

    short = shorter(config, 2) if beyond else config
    plain = replace(short, trainer=replace(config.trainer, enable_bfloat16=True, activation_checkpointing=False))
    sizes = config.data.crops or [(config.data.image_size, config.data.image_size)]
    largest = max(sizes, key=math.prod)
    states = beyond * 4 * 3 * math.prod(largest)
    with FakeTensorMode(allow_non_fake_inputs=True):
        flops = _mean_flops(plain, freeze_encoder, sizes)
        if beyond:
            flops += beyond * (flops - _mean_flops(shorter(plain, 1), freeze_encoder, sizes))
        try:
            transformer.plain_bfloat16_on_cpu = not fused
            steps = [_step(short, freeze_encoder, n, largest) for n in (COUNTED, 2 * COUNTED)]
            few, many = (_peak(step, modules, config.trainer.enable_bfloat16) for step, modules in steps)
        finally:
            transformer.plain_bfloat16_on_cpu = True
            transformer.rotary_table.cache_clear()  # of tables without contents
        parameters = sum(p.numel() for p in FlowMo(config).parameters())
    per_image, fixed = _per_image(few, many)
    return Cost(flops / COUNTED, 5 * 4 * parameters, per_image + states, fixed)


def _mean_flops(config: Config, freeze_encoder: bool, sizes: Sequence[tuple[int, int]]) -> float:
    """FLOPs of a step over ``COUNTED`` images, mean over the sizes that training draws with equal chance."""
    return sum(_flops(_step(config, freeze_encoder, COUNTED, size)[0], bfloat16=True) for size in sizes) / len(sizes)


def _step(
    config: Config, freeze_encoder: bool, count: int, size: tuple[int, int]
) -> tuple[Callable[[], Tensor], list[nn.Module]]:
    """The loss of a step over ``count`` images of one height and width, and the modules that it holds."""
    perceptual, mode = None, config.opt.lpips_mode
    if config.opt.lpips_weight:
        perceptual = build_distance(mode, pretrained=False)
    tokenizer, teacher = FlowMo(config), None
    tokenizer.encoder.requires_grad_(config.stage == "pretrain" and not freeze_encoder)
    if config.stage == "distill":
        teacher = FlowMo(teacher_of(config)).requires_grad_(False)
    stage = prepare(Stage(tokenizer, tokenizer.config.opt, perceptual, teacher), World(), config.trainer)
    images = torch.empty(count, 3, *size)
    flags = torch.ones(count, config.model.posttrain_sample_k, dtype=torch.bool)
    chain = Chain(images, torch.empty(count, config.model.posttrain_sample_k + 1), flags)
    times = torch.empty(count, config.opt.jumps)
    cut = [(0, 0)] * count if config.opt.lpips_crop else None
    draws = TrainingNoise(torch.empty(count), images, flags[:, 0], chain, Jumps(images, times, times), cut)
    modules = [module for module in (tokenizer, perceptual, teacher) if module is not None]
    step = partial(stage, images, draws, alone, freeze_encoder)
    return lambda: step().total, modules


def teacher_of(config: Config) -> Config:
    """A tokenizer as the student's teacher is, sampled by the paper's settings unless the steps are set."""
    sampling = SamplingConfig(sample_steps=config.opt.teacher_steps or SamplingConfig().sample_steps)
    model = replace(config.model, mean_velocity=False)
    return Config(data=config.data, model=model, eval=EvalConfig(sampling=sampling))


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that operators make and that are alive at once: now, and at most.

    Works on tensors with and without contents. Memory that a kernel uses inside one operator is not seen.
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
        """Leave out a tensor that was there before."""
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


def _flops(loss: Callable[[], Tensor], bfloat16: bool) -> float:
    """FLOPs of a loss and its gradients."""
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            total = loss()
        total.backward()
    return counter.get_total_flops()


def _peak(loss: Callable[[], Tensor], modules: Sequence[nn.Module], bfloat16: bool) -> float:
    """Peak of the memory that a loss and its gradients take beside weights and their gradients."""
    memory = PeakMemory()
    for parameter in (p for module in modules for p in module.parameters()):
        memory.ignore(parameter)
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)  # counted as state
            memory.ignore(parameter.grad)
    # Not under the FLOP counter too: its hooks on modules keep the activations that checkpointing would free.
    with memory:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            total = loss()
        total.backward()
    return memory.peak


@cache
def peak_flops(device: torch.device, bfloat16: bool) -> tuple[float, str]:
    """FLOPs a second that utilisation is measured against, and where the figure is from.

    The data sheet's for a GPU of ``PEAKS`` in bfloat16; for any other device the best of some matrix products.
    """
    if device.type == "cuda" and bfloat16:
        name = torch.cuda.get_device_name(device)
        sheet = next((flops for part, flops in PEAKS.items() if part in name), None)
        if sheet:
            return sheet, "data sheet"
    return matrix_rate(device, bfloat16), "measured"


def matrix_rate(device: torch.device, bfloat16: bool) -> float:
    """FLOPs a second that the device reaches now, at best, in products of large square matrices."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
