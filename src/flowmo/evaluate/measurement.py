"""The measurements of an evaluation: one row per image, enough for every metric, and kept in files.

Metrics and features of single images are stored, and averaged at the end in the order of the images. So neither
batches, nor their order, nor ranks, nor an interruption change a metric.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from flowmo.checkpoint import CheckpointError
from flowmo.checkpoint.files import write_whole
from flowmo.checkpoint.pth import read_pth
from flowmo.data import DataError
from flowmo.errors import one_line

SAVE_SECONDS = 60


class EvaluationError(DataError):
    """The evaluation would be meaningless; the message says why."""


@dataclass
class Measurement:
    """Measurements of n images and their reconstructions.

    Attributes:
        rows: named columns, in the order of ``index``, int64 n, the indices in the dataset. Metrics are float64 n;
            metrics of each channel n × channels; ``originals`` and ``results`` are features, float32 n × d. A metric
            that was not requested has no column.
        usage: int64, how often each id occurs; empty for continuous codes.
        unreadable: number of images that have no row.
    """

    rows: dict[str, Tensor]
    usage: Tensor
    unreadable: int = 0

    @classmethod
    def join(cls, parts: Sequence[Mapping[str, Tensor]], usage: Tensor) -> Measurement:
        """Join the rows of different images, at least one, with the usage of ids by all of them."""
        order = torch.cat([part["index"] for part in parts]).argsort()
        return cls({name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}, usage)

    def without_features(self) -> Measurement:
        """Leave out ``originals`` and ``results``, gigabytes that only distances of image sets need."""
        rows = {name: column for name, column in self.rows.items() if name not in ("originals", "results")}
        return Measurement(rows, self.usage, self.unreadable)


def in_parts(batches: Iterable[Measurement]) -> Iterator[Measurement]:
    """Join the batches of about ``SAVE_SECONDS`` each."""
    rows: list[dict[str, Tensor]] = []
    usage, begun = torch.tensor(0), time.monotonic()
    for batch in batches:
        rows.append(batch.rows)
        usage = usage + batch.usage  # one sum, because a large vocabulary's histograms would fill the memory
        if time.monotonic() - begun > SAVE_SECONDS:
            yield Measurement.join(rows, usage)
            rows, usage, begun = [], torch.tensor(0), time.monotonic()
    if rows:
        yield Measurement.join(rows, usage)


def write_part(folder: Path, identity: str, part: Measurement) -> None:
    """Write a part of a measurement. ``identity`` is what the measurement depends on."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"identity": identity, "rows": part.rows, "usage": part.usage}
    write_whole(folder / f"{uuid4().hex}.pt", lambda temporary: torch.save(content, temporary))


def read_parts(folder: Path, identity: str) -> Iterator[Measurement]:
    """Yield the parts in a folder.

    Two processes that overlap may measure the same image. A part with an image that an earlier one has is left out.

    Raises:
        EvaluationError: the folder holds something else.
    """
    seen: set[int] = set()
    for path in sorted(folder.glob("*.pt")):
        try:
            content = read_pth(path)
            if content["identity"] != identity:
                raise EvaluationError(f"{folder} holds another evaluation. Name an empty folder, or remove it.")
            part = Measurement(content["rows"], content["usage"])
        except (CheckpointError, KeyError) as error:
            raise EvaluationError(f"{path} is not part of an evaluation ({one_line(error, 100)}).") from None
        if seen.isdisjoint(indices := part.rows["index"].tolist()):
            seen.update(indices)
            yield part
