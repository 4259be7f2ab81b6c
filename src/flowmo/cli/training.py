"""Commands that train and that prepare training data: train, data index, data show."""

from __future__ import annotations

import argparse
import json
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

import flowmo
from flowmo.checkpoint.files import find, read_config, read_raw_metadata, write_content
from flowmo.checkpoint.run_folder import CHECKPOINTS, SETTINGS, best_checkpoint, listing
from flowmo.cli.output import Progress, UsageError, check_outputs
from flowmo.config import FINE_TUNING, Config, own_settings
from flowmo.data import build_index, default_index, open_source, release_source
from flowmo.train.memory import keep_freed_memory

MAX_LINES = 20
"""Printed lines of each kind; --json lists all."""


def index(arguments: argparse.Namespace) -> tuple[str, list[dict]]:
    if arguments.output is not None and len(arguments.tars) > 1:
        raise UsageError("--output names the index of one tar. Leave it out to write each index beside its tar.")
    outputs = [arguments.output or default_index(tar) for tar in arguments.tars]
    check_outputs(outputs, arguments.force, inputs=arguments.tars)
    lines: list[str] = []
    rows = []
    for tar, output in zip(arguments.tars, outputs, strict=True):
        progress = Progress(f"{tar.name}, MiB")
        entries, left_out = build_index(tar, progress)
        progress.clear()
        write_content(output, json.dumps(entries))
        more, others = describe_left_out(left_out)
        lines += [f"{output}: {len(entries)} images", *more]
        rows.append({"tar": str(tar), "index": str(output), "images": len(entries), "left_out": others})
    return "\n".join(lines), rows


def show(arguments: argparse.Namespace) -> tuple[str, dict]:
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


def train(arguments: argparse.Namespace) -> None:
    folder, source = arguments.results_dir / arguments.experiment_name, arguments.resume_from_ckpt
    started = bool(listing(folder / CHECKPOINTS))
    config = settings_of(arguments, folder if started else None)
    assumed = {} if config.data.train or config.generator.train else release_images(config)
    config = config.updated(assumed)
    if not config.data.train:
        raise UsageError(
            "data.train is not set. Name a folder or a .tar of images with data.train=PATH; for a generator, of tokens."
        )
    # These imports take seconds. Most mistakes are found before.
    from flowmo.distributed import join
    from flowmo.train.start_checks import check_start
    from flowmo.train.trainer import Trainer

    if torch.device(arguments.device).type == "cpu":
        keep_freed_memory()
    check_start(config, bool(source or started), bool(started))
    with join(arguments.device, group=config.trainer.parallel == "fsdp") as world:
        if assumed and world.main:
            print("Images in the working directory:", *(f"{name}={value}" for name, value in assumed.items()))
        Trainer(config, folder, world, source, lambda line: print(line, flush=True)).train()
        if world.main:
            print(next_steps(folder, config))


def without_start(config: Config) -> Config:
    """Leave out from which weights the stage of a checkpoint started: the next stage has a default of its own."""
    return config.updated({"trainer.start_weights": ""})


def release_images(config: Config) -> dict[str, str]:
    """Settings of the authors' ImageNet tars, where they are in the working directory and no images are named."""
    data, found = config.data, dict[str, str]()
    for split, named, index in (("train", data.train, data.train_index), ("val", data.val, data.val_index)):
        tar, usual = release_source(split)
        if tar and not named:
            found |= {f"data.{split}": tar, f"data.{split}_index": index or usual}
    return found


def next_steps(folder: Path, config: Config) -> str:
    """Say where the best model of a run is, the newest without a metric, and what to do with it."""
    model = shlex.quote(str(best_checkpoint(folder)))
    steps = {"Model": model}
    if config.generator.train:
        steps["Use it"] = f"flowmo generate {model} --model TOKENIZER"
    else:
        steps["See it"] = f"flowmo reconstruct PICTURE --model {model}"
        steps["Measure it"] = f"flowmo evaluate {shlex.quote(config.data.val or 'PICTURES')} --model {model}"
    steps["Share it"] = f"flowmo convert {model} {folder.name}.safetensors"
    return "\n".join(f"{name + ':':12} {text}" for name, text in steps.items())


def settings_of(arguments: argparse.Namespace, started: Path | None) -> Config:
    """Return a run's settings. The command's words win over its preset, its checkpoint or the model that it names.

    Args:
        started: folder of the run if it has checkpoints.
    """
    settings, source = arguments.settings, arguments.resume_from_ckpt
    if arguments.preset or arguments.config:
        base = flowmo.preset(arguments.preset or "lo")
        return (Config.from_yaml(arguments.config, base) if arguments.config else base).override(*settings)
    if started:
        return without_start(Config.from_yaml(started / SETTINGS)).override(*settings)
    if source:
        path = find(source)
        metadata = read_raw_metadata(path)
        if "vocabulary" in metadata:
            from flowmo.generate.generator import load_generator

            return load_generator(path, *settings).config
        model = read_config(path)
        if "flowmo" in metadata:  # a training checkpoint
            return without_start(model).override(*settings)
        config = own_settings(model, Config()).override(*settings)
        new = config.stage == "pretrain"
        return own_settings(model, Config.from_dict(FINE_TUNING)).override(*settings) if new else config
    if not any(setting.startswith("model.") for setting in settings):  # the authors' commands name some
        raise UsageError(
            "Name the model to train: a preset or a file of settings with --preset or --config, or weights to "
            "fine-tune with --resume-from-ckpt, such as nano."
        )
    return Config().override(*settings)
