"""What a training step costs, by arithmetic: FLOPs and bytes of a picture, counted on tensors without contents."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from flowmo import transformer
from flowmo.config import Config, DataConfig, EvalConfig, OptConfig, SamplingConfig, TrainerConfig
from flowmo.data.tokens import Vocabulary
from flowmo.distributed import World
from flowmo.generate.network import MaskGiT
from flowmo.perceptual import blank_distance
from flowmo.quantize import alone
from flowmo.quantize.infill import HUB_NAMES
from flowmo.tokenizer import FlowMo
from flowmo.train.distributed import prepare, recompute
from flowmo.train.plan import PAPER_BATCH, Timetable
from flowmo.train.stages import Chain, Draws, Jumps, Stage

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
        activation_bytes: what the forward pass keeps for the backward pass, a picture.
    """

    flops: float
    state_bytes: int
    activation_bytes: float

    def most_pictures(self, memory: float, shards: int = 1) -> int:
        """Pictures of one pass that fit into ``memory`` bytes beside the state cut into ``shards``; at least 1."""
        free = 0.9 * memory - self.state_bytes / shards  # a tenth for the allocator's gaps and the libraries
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
        data=DataConfig(image_size=config.data.image_size),
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
    times = Timetable.of(config, config.data.global_batch_size or PAPER_BATCH, IMAGENET)
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
    ids = torch.empty(COUNTED, vocabulary.ids, dtype=torch.int64)

    def count(precise: Config) -> tuple[float, int, int]:
        network = MaskGiT(precise.generator, vocabulary.id_bits, vocabulary.ids, len(vocabulary.classes))
        for block in network.blocks if precise.trainer.activation_checkpointing else ():
            recompute(block, precise.trainer.checkpoint_keeps)
        arguments = (ids, torch.empty_like(ids, dtype=torch.bool), ids[:, 0])
        flops, kept = _counted(lambda: network(*arguments).float().sum(), [network], precise.trainer.enable_bfloat16)
        return flops, kept, sum(p.numel() for p in network.parameters())

    plain = replace(config, trainer=replace(config.trainer, enable_bfloat16=True, activation_checkpointing=False))
    with FakeTensorMode(allow_non_fake_inputs=True):
        flops, _, parameters = count(plain)
        _, activations, _ = count(config)
    return Cost(flops / COUNTED, 5 * 4 * parameters, activations / COUNTED)


@cache
def _training_cost(config: Config, freeze_encoder: bool, fused: bool) -> Cost:
    # The counter knows the products of plain attention; the fused one does the same products and keeps less.
    plain = replace(config, trainer=replace(config.trainer, enable_bfloat16=True, activation_checkpointing=False))
    with FakeTensorMode(allow_non_fake_inputs=True):
        flops, _ = _forward_backward(plain, freeze_encoder)
        try:
            transformer.plain_bfloat16_on_cpu = not fused
            _, activations = _forward_backward(config, freeze_encoder)
        finally:
            transformer.plain_bfloat16_on_cpu = True
            transformer.rotary_table.cache_clear()  # of tables without contents
        parameters = sum(p.numel() for p in FlowMo(config).parameters())
    return Cost(flops / COUNTED, 5 * 4 * parameters, activations / COUNTED)


def _forward_backward(config: Config, freeze_encoder: bool) -> tuple[float, int]:
    """FLOPs of a step and the bytes that its forward pass keeps."""
    perceptual, mode = None, config.opt.lpips_mode
    if config.opt.lpips_weight:
        perceptual = blank_distance(mode)
    tokenizer, teacher = FlowMo(config), None
    tokenizer.encoder.requires_grad_(config.stage == "pretrain" and not freeze_encoder)
    if config.stage == "distill":
        teacher = FlowMo(teacher_of(config)).requires_grad_(False)
    stage = prepare(Stage(tokenizer, perceptual, teacher), World(), config.trainer)
    side = config.data.image_size
    images = torch.empty(COUNTED, 3, side, side)
    flags = torch.ones(COUNTED, config.model.posttrain_sample_k, dtype=torch.bool)
    chain = Chain(images, torch.empty(COUNTED, config.model.posttrain_sample_k + 1), flags)
    times = torch.empty(COUNTED, config.opt.jumps)
    cut = [(0, 0)] * COUNTED if config.opt.lpips_crop else None
    draws = Draws(torch.empty(COUNTED), images, flags[:, 0], chain, Jumps(images, times, times), cut)
    modules = [module for module in (tokenizer, perceptual, teacher) if module is not None]
    step = partial(stage, images, draws, alone, freeze_encoder)
    return _counted(lambda: step().total, modules, config.trainer.enable_bfloat16)


def teacher_of(config: Config) -> Config:
    """A tokenizer as the student's teacher is, sampled by the paper's settings unless the steps are set."""
    sampling = SamplingConfig(sample_steps=config.opt.teacher_steps or SamplingConfig().sample_steps)
    model = replace(config.model, mean_velocity=False)
    return Config(data=config.data, model=model, eval=EvalConfig(sampling=sampling))


def _alive() -> dict[int, Tensor]:
    """Tensors that Python holds, by their storage."""
    objects = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
    return {tensor.untyped_storage()._cdata: tensor for tensor in objects if tensor.layout == torch.strided}


def _counted(loss: Callable[[], Tensor], modules: Sequence[nn.Module], bfloat16: bool) -> tuple[float, int]:
    """FLOPs of a loss and its gradients, and the bytes that it keeps for these beside the modules' parameters."""
    own = {parameter.untyped_storage()._cdata for module in modules for parameter in module.parameters()}
    before = own | _alive().keys()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
        ):
            total = loss()
        kept |= {key: tensor for key, tensor in _alive().items() if key not in before}  # what checkpointing holds
        size = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
        total.backward()
    return counter.get_total_flops(), size


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
