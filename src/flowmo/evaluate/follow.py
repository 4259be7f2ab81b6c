"""Evaluation beside a training run: each checkpoint once, as soon as it is whole, until the run has ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flowmo
from flowmo.checkpoint.files import CheckpointError
from flowmo.checkpoint.run_folder import CHECKPOINTS, SETTINGS, has_ended, listing
from flowmo.config import Config, DataConfig
from flowmo.data import open_source
from flowmo.distributed import World
from flowmo.evaluate.reconstruction import EvaluationError, Evaluators, FlowMoReconstructor, measure
from flowmo.evaluate.summary import Summary
from flowmo.precision import describe
from flowmo.tokenizer import FlowMo

LOG = "evaluations.jsonl"
POLL_SECONDS = 10.0


@dataclass
class Follower:
    """Evaluates checkpoints of a run, or one checkpoint.

    Args:
        settings: ``section.name=value`` over the checkpoints' own, ``eval.…`` and ``data.val`` among them.
        folder: of this evaluation; its log is ``evaluations.jsonl``, and so is the line added to the run's folder.
        report: takes each line.
        found: takes the figures of each checkpoint, as the log does.
        ready: packs or compiles each tokenizer.

    Raises:
        EvaluationError: there is neither a run nor a checkpoint, or no held-out pictures are named.
    """

    settings: Sequence[str]
    folder: Path
    judges: Evaluators
    world: World = World()
    report: Callable[[str], None] = print
    found: Callable[[dict[str, Any]], None] | None = None
    ready: Callable[[FlowMo], object] | None = None
    config: Config = field(init=False)

    def __post_init__(self) -> None:
        self.config = Config().override(*self.settings)
        wanted = self.config.eval
        if not wanted.eval_dir and not wanted.force_ckpt_path:
            raise EvaluationError(
                "name pictures, or a run (eval.eval_dir=results/RUN), or a checkpoint (eval.force_ckpt_path=FILE)"
            )
        self.run = Path(wanted.eval_dir) if wanted.eval_dir else None
        if self.run and not self.run.is_dir() and not (wanted.continuous or wanted.force_ckpt_path):
            raise EvaluationError(f"{self.run}: no such run")

    def evaluate(self) -> None:
        """Evaluate what the settings ask for. With ``eval.continuous``, return when the run has ended."""
        wanted = self.config.eval
        if wanted.force_ckpt_path:
            self._evaluate(Path(wanted.force_ckpt_path))
            return
        run, waiting = Path(wanted.eval_dir), False
        while True:
            ended = self.world.broadcast(has_ended(run))  # asked before the listing, so that none is missed
            there = self.world.broadcast([str(path) for path in listing(run / CHECKPOINTS)])
            left = [Path(path) for path in there if Path(path).name not in self._evaluated()]
            if not wanted.continuous:
                if not there:
                    raise EvaluationError(f"{run}: no checkpoint yet; eval.continuous=true waits for one")
                left = [Path(there[-1])]
            for path in left[:1]:
                self._try(path)
                waiting = False
            if not wanted.continuous or (ended and not left):
                return
            if not left:
                if not waiting:
                    self.report(f"waiting for the next checkpoint of {run}")
                waiting = True
                time.sleep(POLL_SECONDS)

    def _try(self, path: Path) -> None:
        """Evaluate a checkpoint, unless the run has replaced it by a newer one meanwhile."""
        try:
            self._evaluate(path)
        except (CheckpointError, OSError):
            if path.exists():
                raise
            self.report(f"{path.name} was removed before it was evaluated")
            self._record({"checkpoint": path.name, "removed": True})

    def _evaluated(self) -> set[str]:
        log = self.folder / LOG
        lines = log.read_text().splitlines() if self.world.main and log.is_file() else []
        return set(self.world.broadcast([json.loads(line)["checkpoint"] for line in lines]))

    def _evaluate(self, path: Path) -> Summary:
        tokenizer = flowmo.load(path, *self.settings, device=str(self.world.device))
        if self.ready:
            self.ready(tokenizer)
        config, precision = tokenizer.config, describe(tokenizer.precision, tokenizer.device)
        val, index = self._held_out(config.data)
        source = open_source(val, index or None)
        candidate, side = FlowMoReconstructor(tokenizer, name=path.name), config.data.image_size
        measured = measure(
            candidate,
            source,
            side,
            self.judges,
            limit=max(len(source) // self.config.eval.subsample_rate, 1),
            batch_size=self.config.eval.batch_size,
            device=self.world.device,
            world=self.world,
            folder=self.folder / "measured" / path.stem,
            facts={"identity": tokenizer.identity(), "sampling": str(config.eval.sampling), "precision": precision},
        )
        summary = Summary.of(path.name, measured, self.judges.features)
        self.report("\n".join((f"{path}: {summary.pictures} pictures of {val}", *summary.lines())))
        row = {"checkpoint": path.name, **summary.as_dict(), "precision": precision}
        if self.found:
            self.found(row)
        if path.name not in self._evaluated():
            self._record(row)
        return summary

    def _held_out(self, trained: DataConfig) -> tuple[str, str]:
        """Held-out source and its index: those of the settings, else of the checkpoint, else of the run.

        An index belongs to the source that is named beside it. One in the settings alone is for the source they leave.
        """
        own = self.config.data
        of_the_run = self._of_the_run()
        for val, index in (
            (own.val, own.val_index),
            (trained.val, own.val_index or trained.val_index),
            (of_the_run.get("val"), own.val_index or of_the_run.get("val_index", "")),
        ):
            if val:
                return val, index
        raise EvaluationError("no held-out pictures: name them by data.val=PICTURES")

    def _of_the_run(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.run / SETTINGS).read_text())["data"]) if self.run else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _record(self, line: dict[str, Any]) -> None:
        if not self.world.main:
            return
        for folder in {self.folder, self.run or self.folder}:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / LOG).open("a") as log:
                log.write(json.dumps(line) + "\n")
