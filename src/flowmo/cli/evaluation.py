"""The command that measures models."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flowmo.cli.options import load, prepare, sampling
from flowmo.cli.output import Progress, UsageError, require
from flowmo.codec.file import Codec, find_context
from flowmo.data import Source, open_source
from flowmo.distributed import World, join
from flowmo.evaluate.reconstruction import Evaluators, FlowMoReconstructor
from flowmo.evaluate.summary import notes

if TYPE_CHECKING:
    from flowmo.evaluate.follow import Follower

Log = Callable[..., None]
"""Prints a line on the main rank, to standard output or ``file``."""


FOR_PICTURES = ("limit", "fit", "bpp", "size", "peers", "report", "enlarge", "steps", "seed", "guidance")
"""Options of ``compare``."""
OF_MODELS = ("model", "precision", "compile", "no_lpips")
"""Options of models, which ``--reference`` has none of."""
OF_RUNS = ("results_dir", "experiment_name")
FOR_RUNS = ("eval.eval_dir=", "eval.force_ckpt_path=", "eval.continuous=", "eval.subsample_rate=", "data.val=")
"""Starts of settings that ``compare`` does not read."""


def evaluate(arguments: argparse.Namespace) -> None:

    def given(*names: str) -> str:
        changed = [name for name in names if getattr(arguments, name) != arguments.parser.get_default(name)]
        return ", ".join(f"--{name.replace('_', '-')}" for name in changed)

    if words := given(*FOR_PICTURES) if arguments.reference or not arguments.images else "":
        raise UsageError(
            f"{words}: only for reconstructions of PICTURES. For a run, change settings, such as "
            "eval.subsample_rate=10 or eval.sampling.sample_steps=25."
        )
    if arguments.reference and (words := given(*OF_MODELS, *OF_RUNS) or ", ".join(arguments.settings)):
        raise UsageError(f"{words}: not with --reference, which compares two sets of images.")
    if not arguments.images and (words := given("model")):
        raise UsageError(f"{words}: a run has its own model. Leave it out, or name PICTURES.")
    if arguments.images and (words := given(*OF_RUNS)):
        raise UsageError(f"{words}: only for runs. Reconstructions of PICTURES are kept with --report.")
    of_a_run = [setting for setting in arguments.settings if setting.startswith(FOR_RUNS)]
    if arguments.images and of_a_run:
        raise UsageError(f"{of_a_run[0]} is for runs. Leave out PICTURES, or write --model RUN.")
    if arguments.report:
        require("matplotlib", "--report", "'flowmo[studies]'")
    with join(arguments.device) as world:
        log = partial(print, flush=True) if world.main else lambda *_, **__: None
        if arguments.reference:
            evaluate_generated(arguments, world, log)
            return
        source = open_source(arguments.images) if arguments.images else None
        follower = run_follower(arguments, world, log) if source is None else None
        evaluators, missing = Evaluators.find(() if arguments.no_lpips else ("alex", "vgg"), arguments.features)
        for line in missing:
            log(line, file=sys.stderr)
        evaluators.to(world.device)
        if follower is not None:
            follower.evaluators = evaluators
            follower.evaluate()
        elif source is not None:
            compare(arguments, source, evaluators, world, log)


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


def compare(arguments: argparse.Namespace, source: Source, evaluators: Evaluators, world: World, log: Log) -> None:
    """Measure reconstructions of a model and its peers."""
    from flowmo.evaluate.comparison import Comparison

    if arguments.fit == "whole" and arguments.size:
        raise UsageError("--fit whole takes every image at its own size. Leave out --size.")
    if arguments.fit == "whole" and arguments.enlarge:
        raise UsageError("--enlarge is for crops. --fit whole takes every image at its own size.")
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
        evaluators=evaluators,
        side=None if arguments.fit == "whole" else arguments.size or config.data.image_size,
        rates=arguments.bpp or (),
        peers=arguments.peers,
        limit=arguments.limit,
        enlarge=arguments.enlarge,
        out=arguments.report,
        world=world,
        progress=Progress,
    )
    for entry in comparison.measure():
        if not arguments.json:
            log("\n".join((entry.summary.name, *entry.summary.lines(), "")))
    summaries = [entry.summary for entry in comparison.entries]
    if arguments.json:
        settings = {"steps": model.steps, "seed": model.seed, "precision": comparison.precision}
        rows = [summary.as_dict() | settings for summary in summaries]
        log(json.dumps(rows[0] if len(rows) == 1 else rows, indent=1))
    else:
        log("\n".join((comparison.protocol, *notes(summaries), f"Precision of {name}: {comparison.precision}.")))
    if arguments.report and world.main:
        comparison.report(without_folder(arguments.images), without_folder(arguments.model))
        log(f"report in {arguments.report}/index.html", file=sys.stderr if arguments.json else None)


def without_folder(name: str) -> str:
    """Shorten a path to its last part, because a report should not reveal where files lie on this machine."""
    return Path(name).name if Path(name).exists() else name
