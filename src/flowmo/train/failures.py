"""What ends a run, in one line: exhausted memory, a process that was killed, a source of images that hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from flowmo.data import DataError
from flowmo.data.loader import RESUME_ADVICE
from flowmo.distributed import PEER_LOST, DistributedError
from flowmo.errors import FlowMoError
from flowmo.train.schedule import BatchPlan

LOADER = ("DataLoader worker", "DataLoader timed out")


EXHAUSTED = ("DefaultCPUAllocator", "can't allocate memory")
"""Words of torch's errors about a CPU's memory."""


class OutOfMemoryError(FlowMoError, RuntimeError):
    """A training step needs more memory than there is; the message names the setting to lower, and its value."""


def out_of_memory(plan: BatchPlan, fitting: int, error: BaseException) -> str:
    """One line about a pass over ``plan.microbatch`` images that ran out of memory."""
    smaller = [n for n in range(1, plan.microbatch) if plan.per_process % n == 0]
    within = [n for n in smaller if n <= fitting]
    if not smaller:
        advice = "write trainer.activation_checkpointing=true, or a smaller data.image_size"
    else:
        value = within[-1] if within else smaller[0]
        advice = f"write data.max_microbatch={value} (the forecast of memory takes up to {fitting})"
    images = f"{plan.microbatch} image{'s' * (plan.microbatch > 1)}"
    return f"a pass over {images} ran out of memory; {advice}: {' '.join(str(error).split())[:120]}"


@contextmanager
def within_memory(plan: BatchPlan, fitting: Callable[[], int]) -> Iterator[None]:
    """Turns torch's reports of exhausted memory into an error of ours.

    Args:
        plan: how the batch is cut now.
        fitting: gives the images per pass that the forecast of memory takes.

    Raises:
        OutOfMemoryError: a step ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(mark in str(error) for mark in EXHAUSTED):
            raise
        raise OutOfMemoryError(out_of_memory(plan, fitting(), error)) from None


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turns torch's reports of other processes' ends into errors of ours.

    Raises:
        DataError: a process that reads pictures was killed or hangs.
        DistributedError: another process of the run was.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if isinstance(error, FlowMoError):
            raise
        if any(mark in text for mark in LOADER):
            raise DataError(f"Data loading failed: {text[:200]}. {RESUME_ADVICE}") from None
        if any(mark in text for mark in PEER_LOST):
            raise DistributedError(f"Another process of the run has ended: {text[:200]}. {RESUME_ADVICE}") from None
        raise
