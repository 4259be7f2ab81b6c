"""What ends a run from outside, in one line: a process that was killed, a source of pictures that hangs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flowmo.data import DataError
from flowmo.data.loader import GO_ON
from flowmo.distributed import FELLOW, DistributedError
from flowmo.errors import FlowMoError

LOADER = ("DataLoader worker", "DataLoader timed out")


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
            raise DataError(f"reading pictures failed: {text[:200]}; {GO_ON}") from None
        if any(mark in text for mark in FELLOW):
            raise DistributedError(f"another process of the run has ended: {text[:200]}; {GO_ON}") from None
        raise
