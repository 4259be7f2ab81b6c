"""Commands that train."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import flowmo
from flowmo.checkpoint import files as checkpoint
from flowmo.checkpoint.run_folder import CHECKPOINTS, listing
from flowmo.cli.shared import UsageError, command, with_device, with_json
from flowmo.config import GENERATOR_PRESETS, PRESETS, Config
from flowmo.data import default_index, open_source
from flowmo.data.sources.tar import scan_tar
from flowmo.train.memory import keep_freed_memory

SHOWN = 20
"""Lines of each kind that a person is shown."""


def index(arguments: argparse.Namespace) -> None:
    """Write the index of each tar of pictures, or of tars, so that training reads it without unpacking."""
    if arguments.output is not None and len(arguments.tars) > 1:
        raise UsageError("--output names one index, of one tar; many have theirs beside them")
    done = []
    for tar in arguments.tars:
        output = arguments.output or default_index(tar)
        entries, left_out = scan_tar(tar)
        checkpoint.write_content(output, json.dumps(entries))
        others = [{"name": name, "reason": reason} for name, reason in left_out.items()]
        done.append({"tar": str(tar), "index": str(output), "pictures": len(entries), "left_out": others})
        if not arguments.json:
            print(f"{output}: {len(entries)} pictures", flush=True)
            tell_some([f"left out: {name} ({reason})" for name, reason in left_out.items()])
    if arguments.json:
        print(json.dumps(done, indent=1))


def show(arguments: argparse.Namespace) -> None:
    """What training would see of a source: its images, their classes, and which files are left out, and why."""
    source = open_source(arguments.source, arguments.index)
    labels = [source.label(index) for index in range(len(source))]
    left_out = source.left_out
    if arguments.json:
        items = [{"name": source.name(index), "label": label} for index, label in enumerate(labels)]
        others = [{"name": name, "reason": reason} for name, reason in left_out.items()]
        print(json.dumps({"count": len(items), "classes": [*source.classes], "items": items, "left_out": others}))
        return
    without = labels.count(None) if source.classes else 0
    print(f"{arguments.source}: {len(source)} images, {len(source.classes) or 'no'} classes")
    counts = Counter(labels)
    tell_some([f"class {i}, {name}: {counts[i]} images" for i, name in enumerate(source.classes)])
    if without:
        print(f"without a label: {without} images, the first {source.name(labels.index(None))}")
    classes = ["no label" if label is None else f"class {label}" for label in labels]
    tell_some([f"{source.name(index)}: {name}" for index, name in enumerate(classes)])
    tell_some([f"left out: {name} ({reason})" for name, reason in left_out.items()])


def tell_some(lines: Sequence[str]) -> None:
    """Print the first lines of many."""
    for line in lines[:SHOWN]:
        print(line)
    if len(lines) > SHOWN:
        print(f"… and {len(lines) - SHOWN} more; --json lists all")


def train(arguments: argparse.Namespace) -> None:
    """Stage 1A on pictures; with model.posttrain_sample=true stage 1B, with opt.teacher=MODEL stage 1C, distillation;
    with a generator's preset stage 2, on tokens."""
    from flowmo.distributed import join
    from flowmo.train.intent import check_start
    from flowmo.train.trainer import Trainer

    config = flowmo.preset(arguments.preset)
    if arguments.config:
        config = Config.from_yaml(arguments.config, config)
    config = config.override(*arguments.settings)
    if not config.data.train:
        raise UsageError(
            "data.train is not set; name a folder or a .tar of pictures, data.train=PATH; of tokens for a generator"
        )
    if torch.device(arguments.device).type == "cpu":
        keep_freed_memory()
    folder = arguments.results_dir / arguments.experiment_name
    check_start(config, bool(arguments.resume_from_ckpt or listing(folder / CHECKPOINTS)))
    with join(arguments.device, group=config.trainer.parallel == "fsdp") as world:
        Trainer(config, folder, world, arguments.resume_from_ckpt, lambda line: print(line, flush=True)).train()


def add_to(commands: Any) -> None:
    group = commands.add_parser("data", help="prepare training pictures", description="Prepare training pictures.")
    data_commands = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    sub = command(index, "index of tars of pictures", data_commands)
    sub.add_argument(
        "tars", nargs="+", type=Path, metavar="TAR", help="uncompressed; the tars inside it are looked through too"
    )
    sub.add_argument("--output", "-o", type=Path, help="file to write (TAR with .index.json)")
    with_json(sub)
    sub = command(show, "what training would see of a source", data_commands)
    sub.add_argument("source", metavar="SOURCE", help="folder, .tar, WebDataset shards or hf:NAME:SPLIT, as data.train")
    sub.add_argument("--index", type=Path, help="index of a single tar (TAR with .index.json), as data.train_index")
    with_json(sub)

    sub = command(train, "a stage of training: 1A, 1B, 1C, or 2, the generator", commands)
    sub.add_argument(
        "--preset", choices=tuple(PRESETS | GENERATOR_PRESETS), default="lo", help="settings to start from (lo)"
    )
    sub.add_argument("--config", type=Path, help="YAML file of settings over the preset's")
    sub.add_argument("--experiment-name", default="my_experiment", help="folder of the run (my_experiment)")
    sub.add_argument("--results-dir", type=Path, default=Path("results"), help="where runs are kept (results)")
    sub.add_argument("--resume-from-ckpt", type=Path, help="training checkpoint to start from")
    with_device(sub)
