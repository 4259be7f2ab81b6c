"""Trains one run after another, in every rank, as a JSON list of (name, settings) says."""

import json
from pathlib import Path

from flowmo import Config
from flowmo.distributed import join
from flowmo.train import trainer


def train_all(base: Path, runs: Path, results: Path) -> None:
    trainer.draw = lambda *_: None  # longer than a tiny run
    with join("cpu", group=True) as world:
        for name, settings in json.loads(runs.read_text()):
            config = Config.from_yaml(base).override(*settings)
            trainer.Trainer(config, results / name, world, report=lambda line: None).train()
