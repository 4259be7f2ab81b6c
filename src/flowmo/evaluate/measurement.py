"""The measurements of an evaluation: one row per image, enough for every metric, and kept in files.

Metrics and features of single images are stored, and averaged at the end in the order of the images. So neither
batches, nor their order, nor ranks, nor an interruption change a metric.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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


class MeasurementParts:
    """The parts of a measurement that this process reads and makes.

    With a folder, a file is written every ``SAVE_SECONDS``. Two processes that overlap may measure the same image; a
    file with an image that an earlier one has is left out.

    Args:
        identity: what the measurement depends on. A folder of another identity is refused.
        features: keep the features of earlier parts.

    Raises:
        EvaluationError: the folder holds something else.
    """

    def __init__(self, folder: Path | None, identity: str, features: bool = True):
        self.folder, self.identity = folder, identity
        self.earlier: list[Measurement] = []
        seen = torch.empty(0, dtype=torch.int64)
        for part in map(self._read, sorted(folder.glob("*.pt")) if folder else ()):
            if not torch.isin(part.rows["index"], seen).any():
                self.earlier.append(part if features else part.without_features())
                seen = torch.cat((seen, part.rows["index"]))
        self.mine: list[Measurement] = []
        self._unsaved: list[dict[str, Tensor]] = []
        self._usage = torch.tensor(0)  # one sum, because a large vocabulary's histograms would fill the memory
        self._saved_at = time.monotonic()

    def add(self, part: Measurement) -> None:
        self._unsaved.append(part.rows)
        self._usage = self._usage + part.usage
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        if self._unsaved:
            part = Measurement.join(self._unsaved, self._usage)
            if self.folder:
                self.folder.mkdir(parents=True, exist_ok=True)
                content = {"identity": self.identity, "rows": part.rows, "usage": part.usage}
                write_whole(self.folder / f"{uuid4().hex}.pt", lambda temporary: torch.save(content, temporary))
            self.mine.append(part)
        self._unsaved, self._usage, self._saved_at = [], torch.tensor(0), time.monotonic()

    def _read(self, path: Path) -> Measurement:
        try:
            content = read_pth(path)
            if content["identity"] != self.identity:
                raise EvaluationError(f"{self.folder} holds another evaluation. Name an empty folder, or remove it.")
            return Measurement(content["rows"], content["usage"])
        except (CheckpointError, KeyError) as error:
            raise EvaluationError(f"{path} is not part of an evaluation ({one_line(error, 100)}).") from None
