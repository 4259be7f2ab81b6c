"""DDP, FSDP2, activation checkpointing and compilation of a training module.

DDP replicates the model and averages gradients; FSDP2 shards weights, gradients and optimizer state.
"""

import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
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

RECOMPILE_LIMIT = 64
"""Variants of blocks and shapes that torch may compile; a run has about twenty."""


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, sharing its memory, or any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def recompute(block: nn.Module, keeps: str = "inputs") -> None:
    """Checkpoint a block's activations in place, except the outputs of the operators in ``KEPT[keeps]``."""
    kept = list(KEPT[keeps])
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, kept)} if kept else {}
    checkpointed = partial(checkpoint, block.forward, use_reentrant=False, **contexts)

    def forward(*arguments: Any) -> Any:  # torch.compile does not trace a bare checkpoint
        if not kept or torch.compiler.is_compiling():
            return checkpointed(*arguments)
        # Selective checkpointing needs the same operators in both passes, and cached bfloat16 weights would skip casts.
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return checkpointed(*arguments)
        finally:
            torch.set_autocast_cache_enabled(cached)

    block.forward = forward


def prepare(module: nn.Module, world: World, trainer: TrainerConfig) -> nn.Module:
    """Checkpoint, compile and shard the blocks of ``module.networks`` in place, as the settings say.

    Call it before building an optimizer, because FSDP2 replaces the parameters.
    """
    blocks = [block for network in module.networks for block in network.blocks]
    if trainer.compile:
        # all blocks share one forward; beyond the limit torch would run it in eager mode for good
        name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # of 2.6
        setattr(torch._dynamo.config, name, max(getattr(torch._dynamo.config, name), RECOMPILE_LIMIT))
    for block in blocks:
        if trainer.activation_checkpointing:
            recompute(block, trainer.checkpoint_keeps)
        if trainer.compile:
            block.compile()
    if trainer.parallel == "fsdp":
        # harmless: nothing changes a block's output in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    return module


def wrap_ddp(module: nn.Module, world: World) -> nn.Module:
    """Wrap the module in DDP where ranks must average gradients. Call it again after freezing parameters."""
    if world.size == 1 or isinstance(module, FSDPModule):
        return module
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)


def accumulating(module: nn.Module, last: bool) -> Any:
    """Return a context for one micro-batch of a step; only the last one's backward pass synchronises gradients."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()
