"""Batches whose order depends only on the seed and the position in the run, so that a resumed run continues exactly.

The position of an item in the run is the number of items before it, over all ranks and epochs.
"""

import itertools
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from flowmo.data.sources.base import DataError
from flowmo.data.transforms import ATTEMPTS
from flowmo.errors import one_line
from flowmo.streams import Stream, stream, stream_seed

RESUME_ADVICE = "Run the same command again to resume from the last checkpoint."
SIGNAL_DELAY = 0.1
"""Seconds within which the signal of a dead worker arrives."""


class IndexedDataset(Protocol):
    """A dataset with a fixed order, identical in every process."""

    def __len__(self) -> int: ...

    def load(self, index: int, seed: int) -> tuple[Tensor, dict[str, str]]:
        """Load item ``index`` with augmentation seed ``seed``. If it cannot be read, load a substitute.

        Returns the item and a dict of {name: error} for every item that failed. Raises ``DataError`` if too many fail.
        """


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Return the permutation of ``count`` images that one epoch follows."""
    return torch.randperm(count, generator=stream(seed, Stream.ORDER, epoch)).tolist()


class ResumableSampler(Sampler):
    """Yields (dataset index, item seed) for one rank, from position ``start`` in the run.

    Each global batch is split evenly: this rank takes ``per_rank`` consecutive positions of every ``global_batch``.
    """

    def __init__(self, dataset_size: int, seed: int, start: int, per_rank: int, global_batch: int):
        self.dataset_size, self.seed, self.start = dataset_size, seed, start
        self.per_rank, self.global_batch = per_rank, global_batch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = -1, []
        for start in itertools.count(self.start, self.global_batch):
            for position in range(start, start + self.per_rank):
                if position // self.dataset_size != epoch:
                    epoch = position // self.dataset_size
                    order = epoch_order(self.dataset_size, self.seed, epoch)
                yield order[position % self.dataset_size], stream_seed(self.seed, Stream.ITEM, position)


def _ignore_signals(_: int) -> None:
    """Ignore SIGINT and SIGTERM, which reach all processes: the main one needs its workers for one more step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _ErrorsAsValues(Dataset):
    """Load a batch as (items, {name: error}, failure). A DataLoader would wrap an exception in its own traceback."""

    def __init__(self, dataset: IndexedDataset):
        self.dataset = dataset

    def __getitem__(self, batch: list[tuple[int, int]]) -> tuple[Tensor | None, dict[str, str], str]:
        try:
            items, errors = zip(*[self.dataset.load(index, seed) for index, seed in batch], strict=True)
        except DataError as error:
            return None, {}, str(error)
        return torch.stack(items), {name: error for some in errors for name, error in some.items()}, ""


def batches(
    dataset: IndexedDataset,
    batch_size: int,
    seed: int,
    start: int,
    workers: int,
    on_unreadable: Callable[[dict[str, str]], None] = lambda errors: None,
    *,
    global_batch: int | None = None,
    pin_memory: bool = False,
    timeout: float = 0,
) -> Generator[Tensor]:
    """Yield stacked items without end, from position ``start`` in the run: images b × c × side × side, or rows of ids.

    Args:
        batch_size: items per batch on this rank.
        on_unreadable: callback with {name: error} for the unreadable images of a batch. They were replaced.
        global_batch: items per batch over all ranks; ``batch_size`` by default.
        timeout: seconds per item before the data source counts as hung; 0 disables. The DataLoader itself gives up
            after ``timeout`` × (batch size + retries).

    Raises:
        DataError: too many images in a row cannot be read, or a worker died while it sent a batch.
        RuntimeError: PyTorch's, if a worker died at another time or gives no batch within ``timeout``.
    """
    sampler = ResumableSampler(len(dataset), seed, start, batch_size, global_batch or batch_size)
    loader = DataLoader(
        _ErrorsAsValues(dataset),
        batch_size=None,  # the sampler yields batches
        sampler=BatchSampler(sampler, batch_size, drop_last=True),
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        pin_memory=pin_memory,
        timeout=timeout * (batch_size + ATTEMPTS) if workers else 0,
    )
    iterator = iter(loader)
    try:
        while True:
            try:
                images, unreadable, failure = next(iterator)
            except (OSError, EOFError) as error:  # worker killed mid-transfer
                with suppress(RuntimeError):  # torch raises this when the worker's signal arrives
                    time.sleep(SIGNAL_DELAY)
                raise DataError(f"Data loading failed: {one_line(error)}. {RESUME_ADVICE}") from None
            if failure:
                raise DataError(failure)
            if unreadable:
                on_unreadable(unreadable)
            yield images
    finally:
        iterator = None  # drop the iterator so that its workers exit, even if a traceback holds this frame
