"""The command that measures models."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmo.cli.options import load, prepare, sampling
from flowmo.cli.output import Progress, UsageError, check_outputs, require
from flowmo.codec.file import Codec, find_context
from flowmo.data import open_source
from flowmo.distributed import World, join
from flowmo.evaluate.reconstruction import Evaluators, FlowMoReconstructor
from flowmo.evaluate.summary import notes

if TYPE_CHECKING:
    from flowmo.evaluate.follow import Follower

Log = Callable[..., None]
"""Prints a line on the main rank, to standard output or ``file``."""
PICTURE_OPTIONS = ("limit", "fit", "bpp", "size", "peers", "report", "enlarge", "steps", "seed", "guidance")
"""Options of reconstructions of PICTURES."""
MODEL_OPTIONS = ("model", "precision", "compile", "no_lpips")
"""Options of models, which --reference has none of."""
RUN_OPTIONS = ("results_dir", "experiment_name")
RUN_SETTINGS = ("eval.eval_dir=", "eval.force_ckpt_path=", "eval.continuous=", "eval.subsample_rate=", "data.val=")
"""Starts of settings that only the evaluation of a run reads."""


def evaluate(arguments: argparse.Namespace) -> None:
    check_options(arguments)
    with join(arguments.device) as world:
        log = partial(print, flush=True) if world.main else lambda *_, **__: None
        if arguments.reference:
            evaluate_generated(arguments, world, log)
        elif arguments.images:
            compare(arguments, world, log)
        else:
            follower = run_follower(arguments, world, log)
            follower.evaluators = find_evaluators(arguments, world, log)
            follower.evaluate()


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that do not belong together, and a report that cannot be written. Raises ``UsageError``."""

    def given(*names: str) -> str:
        changed = [name for name in names if getattr(arguments, name) != arguments.parser.get_default(name)]
        return ", ".join(f"--{name.replace('_', '-')}" for name in changed)

    if words := given(*PICTURE_OPTIONS) if arguments.reference or not arguments.images else "":
        order = " Write PICTURES before --peers and --bpp." if arguments.peers or arguments.bpp else ""
        raise UsageError(
            f"{words}: only for reconstructions of PICTURES.{order} For a run, change settings, such as "
            "eval.subsample_rate=10 or eval.sampling.sample_steps=25."
        )
    if arguments.reference and (words := given(*MODEL_OPTIONS, *RUN_OPTIONS) or ", ".join(arguments.settings)):
        raise UsageError(f"{words}: not with --reference, which compares two sets of images.")
    if not arguments.images and (words := given("model")):
        raise UsageError(f"{words}: a run has its own model. Leave it out, or name PICTURES.")
    if arguments.images and (words := given(*RUN_OPTIONS)):
        raise UsageError(f"{words}: only for runs. Reconstructions of PICTURES are kept with --report.")
    run_settings = [setting for setting in arguments.settings if setting.startswith(RUN_SETTINGS)]
    if arguments.images and run_settings:
        raise UsageError(f"{run_settings[0]} is for runs. Leave out PICTURES, or write --model RUN.")
    if arguments.fit == "whole" and arguments.size:
        raise UsageError("--fit whole takes every image at its own size. Leave out --size.")
    if arguments.fit == "whole" and arguments.enlarge:
        raise UsageError("--enlarge is for crops. --fit whole takes every image at its own size.")
    if arguments.report:
        require("matplotlib", "--report", "'flowmo[studies]'")
        check_report(arguments.report)


def check_report(folder: Path) -> None:
    """Refuse a folder whose pages are not of an earlier report, or in which nothing can be written."""
    from flowmo.evaluate.comparison import MEASURED
    from flowmo.evaluate.report import PAGES, RESULTS, is_report

    pages = [folder / name for name in (*PAGES, RESULTS)]
    others = [page for page in pages if page.exists()]
    if others and not (folder / MEASURED).is_dir() and not is_report(folder):
        raise UsageError(f"{others[0]} is not of a report that --report made. Name another folder.")
    check_outputs(pages, force=True)


def find_evaluators(arguments: argparse.Namespace, world: World, log: Log) -> Evaluators:
    """Find the networks of the metrics, or download them. Log those that are missing."""
    evaluators, missing = Evaluators.find(() if arguments.no_lpips else ("alex", "vgg"), arguments.features)
    for line in missing:
        log(f"{line} --no-lpips and --features none leave such metrics out.", file=sys.stderr)
    return evaluators.to(world.device)


def evaluate_generated(arguments: argparse.Namespace, world: World, log: Log) -> None:
    """Compare generated images with reference images."""
    from flowmo.data.npz import STATISTICS, NpzFile
    from flowmo.evaluate.generation import GenerationSummary, extract_features, open_image_set
    from flowmo.evaluate.metrics import build_features
    from flowmo.evaluate.metrics.features import ResNetFeatures

    if not arguments.images or arguments.features == "none":
        raise UsageError("--reference compares generated PICTURES by a feature network. Name both.")
    sets = open_image_set(arguments.images), open_image_set(arguments.reference)
    network = build_features(arguments.features).to(world.device)
    not_inception = isinstance(network, ResNetFeatures) or arguments.features == "inception-legacy"
    for images in sets if not_inception else ():
        if isinstance(images, NpzFile) and images.names & set(sum(STATISTICS.values(), ())):
            raise UsageError(
                f"{images.name} holds statistics of FID's Inception, not of {network.name}. Add "
                "--features inception, or name a folder of images."
            )
    generated, reference = (
        extract_features(images, network, device=world.device, world=world, progress=Progress("looking"))
        for images in sets
    )
    if world.main:
        summary = GenerationSummary.of(generated, reference, network, (sets[0].name, sets[1].name))
        log(json.dumps(summary.as_dict(), indent=1) if arguments.json else "\n".join(summary.lines()))


def run_follower(arguments: argparse.Namespace, world: World, log: Log) -> Follower:
    """Make the evaluation of a run's checkpoints. With --json, standard output has one line per checkpoint."""
    from flowmo.evaluate.follow import Follower

    folder = arguments.results_dir / arguments.experiment_name
    follower = Follower(arguments.settings, folder, world=world, report=log)
    follower.ready = partial(prepare, arguments=arguments)
    if arguments.json:
        follower.report, follower.found = partial(log, file=sys.stderr), lambda row: log(json.dumps(row))
    return follower


def compare(arguments: argparse.Namespace, world: World, log: Log) -> None:
    """Measure reconstructions of a model and its peers."""
    from flowmo.evaluate.comparison import Comparison

    source = open_source(arguments.images)
    tokenizer = load(arguments, str(world.device))
    if world.main:
        sampling(arguments, tokenizer)  # warns of guidance without effect
    config, name = tokenizer.config, Path(arguments.model).stem
    model = FlowMoReconstructor(
        tokenizer,
        steps=arguments.steps or config.eval.sampling.sample_steps,
        seed=arguments.seed,
        guidance=config.eval.sampling.guidance if arguments.guidance is None else arguments.guidance,
        name=name,
        codec=Codec(tokenizer, find_context(arguments.model, tokenizer)) if tokenizer.quantizer.id_count else None,
    )
    comparison = Comparison(
        model=model,
        source=source,
        side=None if arguments.fit == "whole" else arguments.size or config.data.image_size,
        rates=arguments.bpp or (),
        peers=arguments.peers,
        limit=arguments.limit,
        enlarge=arguments.enlarge,
        out=arguments.report,
        world=world,
        progress=Progress,
    )
    comparison.evaluators = find_evaluators(arguments, world, log)  # downloads come after all that can be refused
    for entry in comparison.measure():
        if not arguments.json:
            log("\n".join((entry.summary.name, *entry.summary.lines(), "")))
    summaries = [entry.summary for entry in comparison.entries]
    if arguments.json:
        settings: dict[str, Any] = {"steps": model.steps, "seed": model.seed, "guidance": model.guidance}
        settings |= {"precision": comparison.precision}
        rows = [
            entry.summary.as_dict() | (settings if isinstance(entry.candidate, FlowMoReconstructor) else {})
            for entry in comparison.entries
        ]
        log(json.dumps(rows[0] if len(rows) == 1 else rows, indent=1))
    else:
        log("\n".join((comparison.protocol, *notes(summaries), f"Precision of {name}: {comparison.precision}.")))
    if arguments.report and world.main:
        comparison.report(without_folder(arguments.images), without_folder(arguments.model))
        log(f"report in {arguments.report}/index.html", file=sys.stderr if arguments.json else None)


def without_folder(name: str) -> str:
    """Shorten a path to its last part, because a report should not reveal where files lie on this machine."""
    return Path(name).name if Path(name).exists() else name
