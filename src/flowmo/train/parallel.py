"""How the processes of a training run share a model's work.

DDP gives every process the whole model and averages gradients; FSDP2 shards weights, gradients and optimizer state
between them.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flowmo.config import TrainerConfig
from flowmo.distributed import World

ATTENTION = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default
    for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
)
KEPT = {
    "inputs": (),
    "attention": ATTENTION,
    "products": (*ATTENTION, torch.ops.aten.mm.default, torch.ops.aten.addmm.default),
}
"""Operators whose results activation checkpointing keeps, by ``trainer.checkpoint_keeps``."""


def recompute(block: nn.Module, keeps: str = "inputs") -> None:
    """Have a block's backward pass compute anew, in place, all but what it keeps."""
    kept = list(KEPT[keeps])
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, kept)} if kept else {}
    selective = partial(checkpoint, block.forward, use_reentrant=False, **contexts)

    def forward(*arguments: Any) -> Any:  # a function of ours, for torch.compile leaves checkpoint itself alone
        if not kept:
            return selective(*arguments)
        # A block that is called twice would find its weights cast to bfloat16 by the first call. Computed again it
        # casts them itself, and selective checkpointing wants the same operators both times.
        if torch.compiler.is_compiling():
            return selective(*arguments)
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return selective(*arguments)
        finally:
            torch.set_autocast_cache_enabled(cached)

    block.forward = forward


COMPILED_KINDS = 64
"""Kinds of blocks and shapes that one class of block may be compiled for; a run has about twenty."""


def prepare(stage: nn.Module, world: World, trainer: TrainerConfig) -> nn.Module:
    """Make a stage's networks checkpoint activations, compile and shard as the settings ask, in place.

    ``stage.networks`` are modules with ``blocks``. To be called before an optimizer is built: FSDP2 replaces the
    parameters.
    """
    blocks = [block for network in stage.networks for block in network.blocks]
    if trainer.compile:
        # All blocks share the code of one forward method, which torch compiles anew for each kind of block (network,
        # last or not), frozen or not, and each kind of shape. Beyond the limit it would run in eager mode for good.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_KINDS)
    for block in blocks:
        if trainer.activation_checkpointing:
            recompute(block, trainer.checkpoint_keeps)
        if trainer.compile:
            block.compile()
    if trainer.parallel == "fsdp":
        # A block hands on the stream that nobody reads as it came; nothing here changes a block's output in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in blocks:
            for module in getattr(block, "used_outside", ()):
                fully_shard(module, mesh=mesh)
            fully_shard(block, mesh=mesh)
        fully_shard(stage, mesh=mesh)
    return stage


def synchronise(stage: nn.Module, world: World) -> nn.Module:
    """The module to call in a stage's place, whose backward pass averages gradients over the processes.

    To be called again when parameters have been frozen.
    """
    if world.size == 1 or isinstance(stage, FSDPModule):
        return stage
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(stage, device_ids=devices, gradient_as_bucket_view=True)


def accumulating(module: nn.Module, last: bool) -> Any:
    """Context of one of several passes of a step: only the last one's backward pass averages over the processes."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()
