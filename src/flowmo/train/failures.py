"""Events from outside that end a run: signals, exhausted memory, and data workers that die or hang."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from flowmo.data import DataError
from flowmo.data.loader import RESUME_ADVICE
from flowmo.errors import FlowMoError, one_line
from flowmo.train.schedule import BatchPlan
from flowmo.train.task import TrainingError

LOADER_FAILED = ("DataLoader worker", "DataLoader timed out")
CPU_MEMORY = ("DefaultCPUAllocator", "can't allocate memory")


@contextmanager
def plain_errors(plan: BatchPlan, max_microbatch: Callable[[], int]) -> Iterator[None]:
    """Translate torch's errors into one line that says what to do.

    Args:
        max_microbatch: returns the largest micro-batch that should fit in memory.

    Raises:
        TrainingError: a step ran out of memory.
        DataError: a data worker was killed or hangs.
    """
    try:
        yield
    except FlowMoError:
        raise
    except (RuntimeError, MemoryError) as error:
        if _is_of_memory(error):
            advice = _less_memory(plan, max_microbatch())
            images = f"{plan.microbatch} image{'s' * (plan.microbatch > 1)}"
            raise TrainingError(
                f"A micro-batch of {images} ran out of memory. Write {advice}. ({one_line(error, 120)})"
            ) from None
        if any(mark in str(error) for mark in LOADER_FAILED):
            raise DataError(f"Data loading failed: {one_line(error, 200)}. {RESUME_ADVICE}") from None
        raise


@contextmanager
def plain_evaluation_errors() -> Iterator[None]:
    """Turn torch's error into a ``TrainingError`` if held-out images need too much memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_of_memory(error):
            raise
        raise TrainingError(
            "Measuring held-out images ran out of memory. Write eval.batch_size=1 and trainer.sample_every=0, or "
            f"measure the checkpoints with flowmo evaluate. ({one_line(error, 120)})"
        ) from None


def _is_of_memory(error: Exception) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(mark in str(error) for mark in CPU_MEMORY)


def _less_memory(plan: BatchPlan, fitting: int) -> str:
    smaller = [n for n in range(1, plan.microbatch) if plan.per_rank % n == 0]
    if not smaller:
        return "trainer.activation_checkpointing=true, or a smaller data.image_size"
    value = max((n for n in smaller if n <= fitting), default=smaller[0])
    return f"data.max_microbatch={value}; the memory forecast allows up to {fitting}"


@contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` on SIGTERM and SIGINT. A second SIGINT interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: object) -> None:
        stop()
        if number == signal.SIGINT:  # not SIGTERM, which torchrun sends twice: to a process and to its group
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
