"""Process group of a run: rank, device and the few collectives that the package needs.

``torchrun`` starts the processes; without it there is one. CPUs communicate by gloo, GPUs by nccl.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flowmo.errors import FlowMoError, one_line

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
"""Timeout for process-group start-up. A rank that died before is reported only by this timeout."""

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Timeout for one collective of tensors, in which all ranks take part at the same time."""

WAIT_TIMEOUT = timedelta(days=2)
"""Timeout for objects and barriers, where ranks wait for one rank: evaluation, a checkpoint, a shard of tokens."""

SETTLE_SECONDS = 0.1

PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""Substrings of torch's errors about a rank that has ended."""

TIMED_OUT = ("Timed out waiting", "Watchdog caught collective operation timeout", "Socket Timeout")
"""Substrings of gloo's, NCCL's and the store's errors about a rank that does not answer."""


class DistributedError(FlowMoError, RuntimeError):
    """The process group cannot start, or a rank has ended."""


@dataclass(frozen=True)
class World:
    """This process within its run: rank, world size and device."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    local_size: int = 1
    """Processes on this machine."""
    waiting: dist.ProcessGroup | None = None
    """Group of the same ranks with ``WAIT_TIMEOUT``; ``None`` is the default group."""

    @property
    def main(self) -> bool:
        """True for rank 0, the only rank that logs and writes."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether any rank set the flag."""
        return bool(self.sum(torch.tensor(int(flag))))

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.size

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, out of place."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.waiting)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value on rank 0, in the order of the ranks, and an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.main else []
        dist.gather_object(value, values or None, group=self.waiting)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(self.waiting)


@contextmanager
def join(device: str = "cpu", group: bool = False) -> Iterator[World]:
    """Yield the ``World`` that torchrun's environment describes, with a process group for the context's lifetime.

    Args:
        device: ``cpu`` or ``cuda``. With ``cuda``, local rank n uses GPU n.
        group: make a process group even for a single process, as FSDP2 needs.

    Raises:
        DistributedError: a rank has no GPU, several ranks would share one, the ranks do not find each other, or
            another rank has ended.
    """
    size, rank, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    chosen = torch.device(device)
    if chosen.index is not None and local_size > 1:
        raise DistributedError(
            f"--device {device} names one device for {local_size} processes. Write --device {chosen.type}."
        )
    if chosen.type == "cuda" and chosen.index is None:
        if local_rank >= torch.cuda.device_count():
            raise DistributedError(
                f"Process {local_rank} of this machine has no GPU of its own; there are {torch.cuda.device_count()}. "
                "Start fewer processes with --nproc-per-node, or train with --device cpu."
            )
        chosen = torch.device("cuda", local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    world = World(rank, size, chosen, local_size)
    if (size == 1 and not group) or dist.is_initialized():
        yield world
        return
    world = _init_process_group(world)
    try:
        yield world
    except RuntimeError as error:
        if isinstance(error, FlowMoError):
            raise
        if any(text in str(error) for text in PEER_LOST):
            raise DistributedError(f"Another process of the run has ended: {one_line(error)}.") from None
        if any(text in str(error) for text in TIMED_OUT):
            raise DistributedError(f"Another process of the run does not answer: {one_line(error)}.") from None
        raise
    finally:
        dist.destroy_process_group()
        # gloo threads that FSDP2's mesh keeps abort the process if they free a tensor during interpreter exit
        time.sleep(SETTLE_SECONDS)


def _init_process_group(world: World) -> World:
    try:
        store = dist.HashStore()
        if world.size > 1 or "MASTER_ADDR" in os.environ:
            rendezvous = dist.rendezvous("env://", world.rank, world.size, timeout=RENDEZVOUS_TIMEOUT)
            shared, _, _ = next(rendezvous)
            shared.set_timeout(COLLECTIVE_TIMEOUT)
            store = dist.PrefixStore("flowmo", shared)
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=COLLECTIVE_TIMEOUT
        )
        return replace(world, waiting=dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT))
    except (ValueError, RuntimeError, OSError) as error:
        raise DistributedError(
            f"Process {world.rank} of {world.size} cannot reach the others ({one_line(error)}). Start it with torchrun."
        ) from None
