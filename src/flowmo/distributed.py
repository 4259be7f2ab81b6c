"""Several processes as one: who they are, what they agree on and how they add up.

Processes are started by ``torchrun``; without it there is one. gloo connects CPUs, nccl GPUs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flowmo.errors import FlowMoError

MEET = timedelta(minutes=5)
"""How long one process waits for the others to come at all. One that was killed by then is never heard of; the end of
one that came is noticed at once, by its connections."""

TIMEOUT = timedelta(minutes=30)
"""How long one process waits for others that came, the longest checkpoint included."""

SETTLE = 0.1
"""Seconds at the end in which gloo's threads let go of the last results."""

FELLOW = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
"""Words of torch's errors about another process that has ended."""


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
        DistributedError: more processes on a machine than it has GPUs, they cannot meet, or one has ended before
            the others.
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
    try:
        store = dist.HashStore()
        if "MASTER_ADDR" in os.environ:
            met, _, _ = next(dist.rendezvous("env://", rank, size, timeout=MEET))
            met.set_timeout(TIMEOUT)
            store = dist.PrefixStore("flowmo", met)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (ValueError, RuntimeError, OSError) as error:
        raise DistributedError(
            f"process {rank} of {size} cannot meet the others ({_one_line(error)}); start it with torchrun"
        ) from None
    try:
        yield world
    except RuntimeError as error:
        if isinstance(error, FlowMoError) or not any(mark in str(error) for mark in FELLOW):
            raise
        raise DistributedError(f"another process of the run has ended: {_one_line(error)}") from None
    finally:
        dist.destroy_process_group()
        # FSDP2 caches its mesh for good, and with it gloo's threads. One that still holds a tensor needs the
        # interpreter's lock to drop it; an interpreter that is ending refuses, and the process would abort.
        time.sleep(SETTLE)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:150]
