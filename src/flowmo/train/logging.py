"""What a run tells: lines, a live line on a terminal, ``metrics.jsonl``, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from flowmo.errors import FlowMoError

METRICS = "metrics.jsonl"


class MetricLoggerError(FlowMoError, RuntimeError):
    """A service that was asked for and is not there."""


class MetricLogger:
    """Writes for one process of a run; the others' ``MetricLogger`` is silent but for ``report(…, everywhere=True)``.

    Args:
        active: whether this is the process that writes.
        report: takes each line.
        wandb_project: Weights & Biases project to send to; empty sends nothing.

    Raises:
        JournalError: wandb was asked for and is not installed.
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
        self._report = report
        self._tensorboard, self._project = tensorboard, wandb_project
        self._writer: Any = None
        self._run: Any = None
        self._shown = 0.0
        if wandb_project and active:
            try:
                import wandb  # noqa: F401
            except ImportError:
                raise MetricLoggerError(
                    f"trainer.wandb_project={wandb_project} needs Weights & Biases: pip install wandb"
                ) from None

    def open(self, step: int, images: int, settings: Mapping[str, Any]) -> None:
        """Go on from a position; what an interrupted run wrote beyond it is dropped, it will come again."""
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drop_after(images)
        if self._tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
            except ImportError:
                self.report("TensorBoard is not installed (pip install tensorboard): metrics.jsonl only")
        if self._project:
            import wandb

            self._run = wandb.init(
                project=self._project,
                name=self.folder.name,
                id=self.folder.name,
                dir=str(self.folder),
                resume="allow",
                config=dict(settings),
            )

    def _drop_after(self, images: int) -> None:
        path = self.folder / METRICS
        if not path.exists():
            return
        sound = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["images"] <= images:
                    sound.append(line + "\n")
            except (ValueError, KeyError):  # cut off by a kill
                continue
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(sound))
        os.replace(temporary, path)

    def report(self, line: str, everywhere: bool = False) -> None:
        if self.active or everywhere:
            if self._shown:
                sys.stderr.write("\r\033[K")
                self._shown = 0.0
            self._report(line)

    def live(self, line: Callable[[], str]) -> None:
        """A line on a terminal that the next one replaces, at most four a second."""
        now = time.monotonic()
        if self.active and sys.stderr.isatty() and now - self._shown > 0.25:
            sys.stderr.write(f"\r\033[K{line()}")
            sys.stderr.flush()
            self._shown = now

    def record(self, step: int, images: int, values: Mapping[str, float]) -> None:
        if not self.active:
            return
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps({"step": step, "images": images, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log({"images": images, **values}, step=step)

    def picture(self, step: int, picture: Image.Image) -> Path:
        """Keep a sample grid; its path."""
        path = self.folder / "samples" / f"{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        if self._writer is not None:
            import numpy as np

            self._writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")
        if self._run is not None:
            import wandb

            self._run.log({"samples": wandb.Image(str(path))}, step=step)
        return path

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()
        self._writer = self._run = None
