"""Evaluation of a training run: every checkpoint once, as soon as it is complete, until the run ends."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flowmo
from flowmo.checkpoint import CheckpointError
from flowmo.checkpoint.run_folder import CHECKPOINTS, SETTINGS, has_ended, listing
from flowmo.config import Config, DataConfig
from flowmo.data import open_source, release_source
from flowmo.distributed import World
from flowmo.evaluate.comparison import Comparison
from flowmo.evaluate.measurement import EvaluationError
from flowmo.evaluate.reconstruction import Evaluators, FlowMoReconstructor
from flowmo.evaluate.summary import notes
from flowmo.tokenizer import FlowMo

LOG = "evaluations.jsonl"
POLL_SECONDS = 10.0
OF_NO_METRIC = ("eval.eval_dir=", "eval.continuous=", "eval.batch_size=")
"""Starts of settings that change no metric."""


@dataclass
class Follower:
    """Evaluates a run's checkpoints, or one checkpoint.

    Args:
        settings: ``section.name=value``; they override the checkpoint's own.
        folder: of this evaluation. Its log ``evaluations.jsonl`` is also appended to the run's.
        report: callback with each line for a person.
        found: callback with the metrics of each checkpoint, as logged.
        ready: compiles each tokenizer.

    Raises:
        EvaluationError: the settings name no run, checkpoint or held-out images, or there is none.
    """

    settings: Sequence[str]
    folder: Path
    evaluators: Evaluators = field(default_factory=Evaluators)
    world: World = World()
    report: Callable[[str], None] = print
    found: Callable[[dict[str, Any]], None] = lambda row: None
    ready: Callable[[FlowMo], object] = lambda tokenizer: None
    config: Config = field(init=False)

    def __post_init__(self) -> None:
        self.config = Config().override(*self.settings)
        settings = self.config.eval
        if not settings.eval_dir and not settings.force_ckpt_path:
            raise EvaluationError(
                "Name images, or a run (eval.eval_dir=results/RUN), or a checkpoint (eval.force_ckpt_path=FILE)."
            )
        self.run = Path(settings.eval_dir) if settings.eval_dir else None

    @property
    def about(self) -> dict[str, Any]:
        """What the metrics of a checkpoint depend on."""
        of_metrics = sorted(word for word in self.settings if not word.startswith(OF_NO_METRIC))
        run = str(self.run.resolve()) if self.run else ""
        return {"run": run, "settings": of_metrics, **self.evaluators.describe()}

    def evaluate(self) -> None:
        """Evaluate a named checkpoint, or the run's newest, or with ``eval.continuous`` all until the run ends."""
        for path in self._checkpoints():
            tokenizer = self._load(path)
            if tokenizer is not None:
                self._evaluate(path, tokenizer)
            else:
                self.report(f"{path.name} was removed before it was evaluated")
                self._record({"checkpoint": path.name, "removed": True})

    def _load(self, path: Path) -> FlowMo | None:
        """Load a checkpoint. Returns ``None`` on all ranks if it was removed before every rank had loaded it."""
        tokenizer, error = None, None
        try:
            tokenizer = flowmo.load(path, *self.settings, device=str(self.world.device))
        except (CheckpointError, OSError) as caught:
            error = caught
        # a rank that skips alone would leave the others waiting in the next collective
        if not self.world.any(error is not None):
            return tokenizer
        if self.config.eval.force_ckpt_path or self.world.broadcast(path.exists()):
            raise error or EvaluationError(f"Another process cannot load {path}.")
        return None

    def _checkpoints(self) -> Iterator[Path]:
        settings = self.config.eval
        if settings.force_ckpt_path:
            yield Path(settings.force_ckpt_path)
            return
        run, done, waiting = Path(settings.eval_dir), self._evaluated(), False
        while True:
            # the end is asked first, so that no checkpoint is missed
            ended, checkpoints = self.world.broadcast((has_ended(run), listing(run / CHECKPOINTS)))
            if not settings.continuous:
                if not checkpoints:
                    if not self.world.broadcast(run.is_dir()):
                        raise EvaluationError(f"There is no run {run}.")
                    raise EvaluationError(f"{run} has no checkpoint yet. eval.continuous=true waits for one.")
                yield checkpoints[-1]
                return
            new = next((path for path in checkpoints if path.name not in done), None)
            if new is not None:
                done.add(new.name)
                yield new
            elif ended:
                return
            else:
                if not waiting:
                    self.report(f"waiting for the next checkpoint of {run}")
                time.sleep(POLL_SECONDS)
            waiting = new is None

    def _evaluated(self) -> set[str]:
        """Return names of the checkpoints that this folder's log has, of the same run and with the same settings."""
        log, names = self.folder / LOG, []
        for line in log.read_text().splitlines() if self.world.main and log.is_file() else []:
            with suppress(json.JSONDecodeError):  # a kill cut the line off
                row = json.loads(line)
                if row.get("evaluation", self.about) == self.about:  # earlier versions did not record it
                    names.append(row["checkpoint"])
        return set(self.world.broadcast(names))

    def _evaluate(self, path: Path, tokenizer: FlowMo) -> None:
        self.ready(tokenizer)
        val, index = self._held_out(tokenizer.config.data)
        source = open_source(val, index or None)
        comparison = Comparison(
            model=FlowMoReconstructor(tokenizer, name=path.name),
            source=source,
            evaluators=self.evaluators,
            side=tokenizer.config.data.image_size,
            limit=max(len(source) // self.config.eval.subsample_rate, 1),
            out=self.folder / hashlib.sha256(json.dumps(self.about).encode()).hexdigest()[:8],
            world=self.world,
        )
        (summary,) = (entry.summary for entry in comparison.measure())
        self.report("\n".join((f"{path}, images of {val}", *summary.lines(), *notes([summary]))))
        row = {"checkpoint": path.name, **summary.as_dict(), "precision": comparison.precision}
        self.found(row)
        if path.name not in self._evaluated():
            self._record(row)

    def _held_out(self, trained: DataConfig) -> tuple[str, str]:
        """Held-out source and its index, from the settings, the checkpoint, the run, or else the working directory.

        An index belongs to the source beside it. An index in the settings without a source applies to any source.
        """
        settings = self.config.data
        saved: dict[str, Any] = {}
        with suppress(OSError, ValueError, KeyError, TypeError):  # a run may be writing it, or be of another version
            saved = json.loads((self.run / SETTINGS).read_text())["data"] if self.run else {}
        named = (settings.val, ""), (trained.val, trained.val_index), (saved.get("val"), saved.get("val_index"))
        for val, index in (*named, release_source("val")):
            if val:
                return val, settings.val_index or index or ""
        raise EvaluationError("There are no held-out images. Name them with data.val=IMAGES.")

    def _record(self, line: dict[str, Any]) -> None:
        if not self.world.main:
            return
        for folder in {self.folder, self.run or self.folder}:
            folder.mkdir(parents=True, exist_ok=True)
            _append(folder / LOG, json.dumps({**line, "evaluation": self.about}))


def _append(path: Path, line: str) -> None:
    """Append a line to a file. It never joins a line that a kill cut off."""
    with path.open("ab+") as file:
        cut = b""
        if file.tell():
            file.seek(-1, os.SEEK_END)
            cut = b"" if file.read(1) == b"\n" else b"\n"
        file.write(cut + line.encode() + b"\n")
