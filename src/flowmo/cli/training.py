"""Commands that train and that prepare training data: train, data index, data show."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

import flowmo
from flowmo.checkpoint.files import write_content
from flowmo.checkpoint.run_folder import CHECKPOINTS, listing
from flowmo.cli.options import DATASET, DEVICE, JSON, command, option
from flowmo.cli.output import UsageError
from flowmo.config import GENERATOR_PRESETS, PRESETS, Config
from flowmo.data import default_index, open_source
from flowmo.data.sources.tar import scan_tar
from flowmo.train.memory import keep_freed_memory

MAX_LINES = 20
"""Printed lines of each kind; --json lists all."""


@command(
    "index tars of images",
    option("tars", nargs="+", type=Path, metavar="TAR", help="uncompressed tar of images, or of tars of images"),
    option("--output", "-o", type=Path, help="file to write (default: TAR with .index.json)"),
    JSON,
)
def index(arguments: argparse.Namespace) -> tuple[str, list[dict]]:
    """Write the index of each tar, so that training reads its images without unpacking it."""
    if arguments.output is not None and len(arguments.tars) > 1:
        raise UsageError("--output names the index of one tar. Leave it out to write each index beside its tar.")
    lines: list[str] = []
    rows = []
    for tar in arguments.tars:
        output = arguments.output or default_index(tar)
        entries, left_out = scan_tar(tar)
        write_content(output, json.dumps(entries))
        more, others = describe_left_out(left_out)
        lines += [f"{output}: {len(entries)} pictures", *more]
        rows.append({"tar": str(tar), "index": str(output), "pictures": len(entries), "left_out": others})
    return "\n".join(lines), rows


@command(
    "show the training data in a source",
    option("source", metavar="SOURCE", help=f"{DATASET}, as data.train"),
    option("--index", type=Path, help="index of a single tar, as data.train_index (default: TAR with .index.json)"),
    JSON,
)
def show(arguments: argparse.Namespace) -> tuple[str, dict]:
    """Show what training sees of a source: its images, their classes, and the files that are left out, with reasons."""
    source = open_source(arguments.source, arguments.index)
    labels = [source.label(index) for index in range(len(source))]
    names = [source.name(index) for index in range(len(source))]
    items = [{"name": name, "label": label} for name, label in zip(names, labels, strict=True)]
    counts = Counter(labels)
    lines = [f"{arguments.source}: {len(source)} images, {len(source.classes) or 'no'} classes"]
    lines += first([f"class {i}, {name}: {counts[i]} images" for i, name in enumerate(source.classes)])
    if source.classes and counts[None]:
        lines.append(f"without a label: {counts[None]} images, the first {names[labels.index(None)]}")
    classes = ("no label" if label is None else f"class {label}" for label in labels)
    lines += first([f"{name}: {shown}" for name, shown in zip(names, classes, strict=True)])
    more, left_out = describe_left_out(source.left_out)
    data = {"count": len(items), "classes": [*source.classes], "items": items, "left_out": left_out}
    return "\n".join([*lines, *more]), data


def describe_left_out(left_out: Mapping[str, str]) -> tuple[list[str], list[dict[str, str]]]:
    """Describe {file: reason} in lines, and as rows of JSON."""
    lines = first([f"left out: {name} ({reason})" for name, reason in left_out.items()])
    return lines, [{"name": name, "reason": reason} for name, reason in left_out.items()]


def first(lines: list[str]) -> list[str]:
    more = [f"… and {len(lines) - MAX_LINES} more; --json lists all"] if len(lines) > MAX_LINES else []
    return lines[:MAX_LINES] + more


@command(
    "train a tokenizer (stages 1A, 1B, 1C) or a generator (stage 2)",
    option("--preset", choices=(*PRESETS, *GENERATOR_PRESETS), default="lo", help="settings to start from"),
    option("--config", type=Path, help="YAML file of settings that replace the preset's"),
    option("--experiment-name", default="my_experiment", help="name of the run's folder"),
    option("--results-dir", type=Path, default=Path("results"), help="folder of all runs"),
    option("--resume-from-ckpt", type=Path, help="checkpoint to start from"),
    DEVICE,
)
def train(arguments: argparse.Namespace) -> None:
    """Train on images, stage 1A. With model.posttrain_sample=true: stage 1B. With opt.teacher=MODEL: stage 1C,
    distillation. With a generator's preset: stage 2, on tokens."""
    from flowmo.distributed import join
    from flowmo.train.intent import check_start
    from flowmo.train.trainer import Trainer

    config = flowmo.preset(arguments.preset)
    if arguments.config:
        config = Config.from_yaml(arguments.config, config)
    config = config.override(*arguments.settings)
    if not config.data.train:
        raise UsageError(
            "data.train is not set. Name a folder or a .tar of images with data.train=PATH; for a generator, of tokens."
        )
    if torch.device(arguments.device).type == "cpu":
        keep_freed_memory()
    folder = arguments.results_dir / arguments.experiment_name
    check_start(config, bool(arguments.resume_from_ckpt or listing(folder / CHECKPOINTS)))
    with join(arguments.device, group=config.trainer.parallel == "fsdp") as world:
        Trainer(config, folder, world, arguments.resume_from_ckpt, lambda line: print(line, flush=True)).train()
