"""Batches in an order that is a function of the seed and the position alone, so that a run resumes where it stopped."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from flowmo.data.sources.base import DataError
from flowmo.data.transforms import ATTEMPTS
from flowmo.streams import Stream, stream, stream_seed

GO_ON = "the same command goes on from the last checkpoint"
SIGNAL_ARRIVES = 0.1
"""Seconds after a reader's last word within which the signal of its end has come."""


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of ``count`` pictures: every picture once an epoch, in another order each time."""
    return torch.randperm(count, generator=stream(seed, Stream.ORDER, epoch)).tolist()


class Items(Protocol):
    """What a run learns from: items in a fixed order, the same in every process."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call item ``index``."""

    def readable(self, index: int, seed: int) -> tuple[Tensor, dict[str, str]]:
        """Item ``index``, what is random in it decided by ``seed``, or another where it cannot be read; and the error
        message of each that could not, by its name. Raises ``DataError`` where too many cannot."""


class EndlessOrder(Sampler):
    """(index, seed) of the pictures of one process, whose places are counted since the run's start.

    From ``place`` on it takes the first ``take`` of every ``stride``: with one process all, with several each its own
    slice of every batch.
    """

    def __init__(self, count: int, seed: int, place: int, take: int, stride: int):
        self.count, self.seed, self.place, self.take, self.stride = count, seed, place, take, stride

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = -1, []
        for start in itertools.count(self.place, self.stride):
            for place in range(start, start + self.take):
                if place // self.count != epoch:
                    epoch = place // self.count
                    order = epoch_order(self.count, self.seed, epoch)
                yield order[place % self.count], stream_seed(self.seed, Stream.ITEM, place)


def _leave_signals_to_the_run(_: int) -> None:
    """A scheduler signals a whole process group; a worker that ended first would break the run's last step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Readable(Dataset):
    """Items whose errors come back as values: an exception would leave a worker wrapped in its traceback."""

    def __init__(self, items: Items):
        self.items = items

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor | None, dict[str, str], str]:
        try:
            return *self.items.readable(*item), ""
        except DataError as error:
            return None, {}, str(error)


def _collate(items: list[tuple[Tensor | None, dict[str, str], str]]) -> tuple[Tensor | None, dict[str, str], str]:
    failure = next((failure for *_, failure in items if failure), "")
    bad = {name: message for _, some, _ in items for name, message in some.items()}
    return None if failure else torch.stack([item for item, *_ in items]), bad, failure


def batches(
    source: Items,
    batch_size: int,
    seed: int,
    place: int,
    workers: int,
    on_bad: Callable[[dict[str, str]], None] = lambda bad: None,
    *,
    stride: int | None = None,
    pin_memory: bool = False,
    timeout: float = 0,
) -> Generator[Tensor]:
    """Endless batches of stacked items, pictures b × 3 × side × side, starting with the item at ``place`` of the run.

    Args:
        stride: places from one batch to the next; more than ``batch_size`` where other processes take the rest.
        on_bad: called with the pictures of a batch that could not be read and were replaced, name to message.
        timeout: seconds that an item may take before its source is taken to hang; workers that hang where no signal
            reaches them are given up when a whole batch could have taken so long. 0 waits for ever.

    Raises:
        DataError: a picture cannot be read, nor can those drawn in its place.
    """
    loader = DataLoader(
        _Readable(source),
        batch_size=batch_size,
        sampler=EndlessOrder(len(source), seed, place, batch_size, stride or batch_size),
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_run,
        pin_memory=pin_memory,
        timeout=timeout * (batch_size + ATTEMPTS) if workers else 0,
    )
    stream = iter(loader)
    try:
        while True:
            try:
                images, bad, failure = next(stream)
            except (OSError, EOFError) as error:  # a worker that is killed while it hands over what it read
                with suppress(RuntimeError):  # torch's, when the signal of that end arrives, wherever we are by then
                    time.sleep(SIGNAL_ARRIVES)
                reason = " ".join(str(error).split()) or type(error).__name__
                raise DataError(f"reading pictures failed: {reason}; {GO_ON}") from None
            if failure:
                raise DataError(failure)
            if bad:
                on_bad(bad)
            yield images
    finally:
        stream = None  # its workers end with it, and must, even where an error's traceback keeps this frame
