"""Logs of a run: lines, a progress line on a terminal, ``metrics.jsonl``, TensorBoard and Weights & Biases."""

import io
import json
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowmo.checkpoint.files import write_content
from flowmo.config import ConfigError
from flowmo.distributed import World

METRICS = "metrics.jsonl"
WANDB_ID = "wandb_id"
PROGRESS_INTERVAL = 0.25
CLEAR_LINE = "\r\033[K"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the ``metrics.jsonl`` of a run's folder, or this file, all but a last line that a kill cut off."""
    path = path / METRICS if path.is_dir() else path
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = []
    for line in lines:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


class MetricLogger:
    """Writes the logs of one rank. An inactive logger writes nothing but ``report(…, everywhere=True)``.

    Args:
        active: True for the rank that writes.
        report: prints a line.
        wandb_project: Weights & Biases project; empty switches it off.

    Raises:
        ConfigError: wandb is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        active: bool,
        report: Callable[[str], None] = print,
        tensorboard: bool = True,
        wandb_project: str = "",
    ):
        self.folder, self.active = folder, active
        self._report, self._tensorboard, self._project = report, tensorboard, wandb_project
        self._writer: Any = None
        self._wandb: Any = None
        self._progress_at = 0.0
        if wandb_project and active:
            try:
                import wandb  # noqa: F401
            except ImportError:
                raise ConfigError(
                    f"trainer.wandb_project={wandb_project} needs Weights & Biases: pip install wandb."
                ) from None

    def open(self, step: int, images: int, settings: Mapping[str, Any]) -> None:
        """Start logging at a position. Metrics that an interrupted run wrote beyond it are dropped."""
        if not self.active:
            return
        kept = [row for row in read_metrics(self.folder) if row["images"] <= images]
        write_content(self.folder / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
        if self._tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
            except ImportError:
                self.report("TensorBoard is not installed (pip install tensorboard): metrics.jsonl only")
        if self._project:
            import wandb

            name, identity = self.folder.name, self.folder / WANDB_ID
            if not identity.is_file():  # a run of the same name in another folder is another run
                begun = bool(kept)  # perhaps by a version that took the name
                write_content(identity, name if begun else secrets.token_hex(8))
            options = {"id": identity.read_text(), "dir": str(self.folder), "resume": "allow", "config": dict(settings)}
            self._wandb = wandb.init(project=self._project, name=name, **options)

    def report(self, line: str, everywhere: bool = False) -> None:
        """Print a line; with ``everywhere``, on an inactive rank too."""
        if self.active or everywhere:
            if self._progress_at:
                sys.stderr.write(CLEAR_LINE)
                self._progress_at = 0.0
            self._report(line)

    def progress(self, line: Callable[[], str]) -> None:
        """Replace the progress line of a terminal, at most four times a second."""
        now = time.monotonic()
        if self.active and sys.stderr.isatty() and now - self._progress_at > PROGRESS_INTERVAL:
            sys.stderr.write(CLEAR_LINE + line())
            sys.stderr.flush()
            self._progress_at = now

    def record(self, step: int, images: int, values: Mapping[str, float]) -> None:
        """Write metrics to ``metrics.jsonl`` and to the services."""
        if not self.active:
            return
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps({"step": step, "images": images, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"images": images, **values}, step=step)

    def image(self, step: int, image: Image.Image) -> Path:
        """Save a grid of samples and return its path."""
        path, content = self.folder / "samples" / f"{step:08d}.png", io.BytesIO()
        image.save(content, "PNG")
        write_content(path, content.getvalue())
        if self._writer is not None:
            import numpy as np

            self._writer.add_image("samples", np.asarray(image), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"samples": wandb.Image(str(path))}, step=step)
        return path

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._writer = self._wandb = None


class Meter:
    """Mean losses and throughput since the last log line. ``skipped`` is the count of skipped steps up to it."""

    def __init__(self, world: World, batch: int, skipped: int = 0):
        self.world, self.batch, self.skipped = world, batch, skipped
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, Tensor] = {}  # 2: of values and of steps, because a frozen encoder ends some losses
        self.steps = 0
        self.since = time.perf_counter()

    def add(self, parts: dict[str, Tensor]) -> None:
        """Add a step's losses. Those of a skipped step, whose ``finite`` is 0, do not count."""
        self.steps += 1
        finite = parts["finite"]
        for name, value in parts.items():
            counted = torch.stack((torch.where(finite > 0, value.float(), 0.0), finite))
            self.sums[name] = self.sums.get(name, 0) + counted

    def rate(self) -> float:
        """Images per second."""
        return self.steps * self.batch / max(time.perf_counter() - self.since, 1e-9)

    def take(self) -> tuple[float, dict[str, float]]:
        """Return images per second and the means over steps and ranks, and start anew."""
        totals = self.world.mean(torch.stack(list(self.sums.values()))).tolist()
        found = zip(self.sums, totals, strict=True)
        means = {name: value / steps for name, (value, steps) in found if steps and name != "finite"}
        rate = self.rate()
        self._restart()
        return rate, means

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of this context."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start


class CodebookUsage:
    """Counts ids over batches and ranks: how many a bottleneck uses, and how evenly.

    ``id_count`` is ``None`` for a continuous bottleneck, which has no ids.
    """

    def __init__(self, id_count: int | None, world: World):
        self.id_count, self.world = id_count or 0, world
        self.counts: Tensor | None = None

    def add(self, ids: Tensor | None) -> None:
        """Count ids, int64 b × tokens × sub-tokens."""
        if ids is not None:
            if self.counts is None:
                self.counts = torch.zeros(self.id_count, dtype=torch.int64, device=ids.device)
            self.counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))  # bincount would sync the host

    def take(self) -> dict[str, float]:
        """Return the metrics since the last call, on all ranks together, and start anew.

        ``ids_used`` is the share of ids that occurred. ``id_entropy`` is the entropy of an id over its bits, 1 where
        all ids are equally frequent. ``bit_entropy`` is the mean entropy of a single bit, at most 1.
        """
        if self.counts is None:
            return {}
        counts = self.world.sum(self.counts).double()
        self.counts = None
        share = counts / counts.sum()
        bits = (len(counts) - 1).bit_length()
        is_set = (torch.arange(len(counts), device=share.device)[:, None] >> torch.arange(bits).to(share.device)) & 1
        p = (share[:, None] * is_set).sum(dim=0)
        return {
            "ids_used": float((counts > 0).double().mean()),
            "id_entropy": float(torch.special.entr(share).sum()) / math.log(2) / bits,
            "bit_entropy": float(torch.special.entr(torch.stack((p, 1 - p))).sum(dim=0).mean()) / math.log(2),
        }
