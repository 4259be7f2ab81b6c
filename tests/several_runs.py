"""Started by ``torchrun`` in the tests: trains one run after another, as a JSON list of (name, settings) says."""

import json
import sys
from pathlib import Path

from flowmo import Config
from flowmo.distributed import join
from flowmo.train import trainer

base, runs, results = (Path(word) for word in sys.argv[1:])
trainer.draw = lambda folder, best: None  # longer than a tiny run
with join("cpu", group=True) as world:
    for name, settings in json.loads(runs.read_text()):
        config = Config.from_yaml(base).override(*settings)
        trainer.Trainer(config, results / name, world, report=lambda line: None).train()
