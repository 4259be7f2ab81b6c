"""Several processes as one: who they are, how they share a model's work, and what they agree on.

Processes are started by ``torchrun``; without it there is one. DDP gives every process the whole model and averages
gradients; FSDP2 shards weights, gradients and optimizer state between them. gloo connects CPUs, nccl GPUs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from flowmo.config import TrainerConfig
from flowmo.errors import FlowMoError

TIMEOUT = timedelta(minutes=30)
"""How long one process waits for the others, the longest checkpoint included."""


class DistributedError(FlowMoError, RuntimeError):
    """Processes that cannot work together as asked."""


@dataclass(frozen=True)
class World:
    """This process among the others of its run."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    local_size: int = 1
    """Processes on this machine."""

    @property
    def main(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is up in any process."""
        if self.size == 1:
            return list(flags)
        ups = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(ups, op=dist.ReduceOp.MAX)
        return [bool(up) for up in ups]

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.size

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, as a new tensor."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def agree(self, value: Any) -> Any:
        """The main process's value, in every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            self.any(False)


@contextmanager
def join(device: str = "cpu", group: bool = False) -> Iterator[World]:
    """The ``World`` that torchrun's environment describes; its connections last as long as the context.

    Args:
        device: ``cpu`` or ``cuda``; the processes of a machine take its GPUs in turn.
        group: connect even a process that is alone, which FSDP2 needs.

    Raises:
        DistributedError: more processes on a machine than it has GPUs, or they cannot meet.
    """
    size, rank, place = (
        int(os.environ.get(name, n)) for name, n in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        if place >= torch.cuda.device_count():
            raise DistributedError(
                f"process {place} of this machine has no GPU of its own, there are {torch.cuda.device_count()}; "
                "start fewer with --nproc-per-node, or train with --device cpu"
            )
        where = torch.device("cuda", place)
        torch.cuda.set_device(where)
    world = World(rank, size, where, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if (size == 1 and not group) or dist.is_initialized():
        yield world
        return
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    start = {} if "MASTER_ADDR" in os.environ else {"store": dist.HashStore(), "rank": rank, "world_size": size}
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, **start)
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:150]
        raise DistributedError(
            f"process {rank} of {size} cannot meet the others ({reason}); start it with torchrun"
        ) from None
    try:
        yield world
    finally:
        dist.destroy_process_group()


def prepare(stage: nn.Module, world: World, trainer: TrainerConfig) -> nn.Module:
    """Make a stage's networks checkpoint activations, compile and shard as the settings ask, in place.

    ``stage.tokenizer`` holds the networks. To be called before an optimizer is built: FSDP2 replaces the parameters.
    """
    networks = (stage.tokenizer.encoder, stage.tokenizer.decoder)
    for block in (block for network in networks for block in network.blocks):
        if trainer.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if trainer.compile:
            block.compile()
    if trainer.parallel == "fsdp":
        # A block hands on the stream that nobody reads as it came; nothing here changes a block's output in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in (block for network in networks for block in network.blocks):
            # Modulations are read by ``Decoder.modulate``, before and outside their block's forward pass.
            for stream in (block.code, block.picture):
                if stream.modulation is not None:
                    fully_shard(stream.modulation, mesh=mesh)
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
