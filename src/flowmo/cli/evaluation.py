"""The command that measures."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowmo.cli.options import DATASET, FINITE, JSON, MODEL, POSITIVE, SAMPLING, command, load, option, prepare
from flowmo.cli.output import UsageError, progress_bar
from flowmo.codec.file import Codec, find_context
from flowmo.data import Source, evenly_spread, open_source
from flowmo.distributed import World
from flowmo.evaluate.metrics import KINDS
from flowmo.evaluate.reconstruction import Evaluators, Reconstructor
from flowmo.images import Tiling
from flowmo.precision import describe


@command(
    "measure reconstructions (PSNR, SSIM, LPIPS, rFID) or generated images (FID)",
    option("images", nargs="?", metavar="PICTURES", help=DATASET),
    option("--limit", type=POSITIVE, help="use this many images, evenly spread"),
    option(
        "--fit",
        choices=("crop", "whole"),
        default="crop",
        help="crop: the central square, as in the paper; whole: every image at its own size",
    ),
    option(
        "--bpp",
        type=FINITE,
        nargs="+",
        metavar="RATE",
        help="variable-rate models: measure the highest rate up to each RATE bits per pixel (default: the full rate)",
    ),
    option(
        "--size",
        type=POSITIVE,
        help="side of the square crops; other sizes than the model's go in tiles (default: the model's)",
    ),
    option(
        "--peers",
        nargs="+",
        default=(),
        metavar="PEER",
        help="also measure codecs at equal bytes (jpeg webp avif jxl) and tokenizers (llamagen16=WEIGHTS)",
    ),
    option("--report", type=Path, help="folder for a page with tables, plots and images"),
    option("--reference", help="PICTURES are generated: compare them with this folder or ADM's .npz"),
    option("--no-lpips", action="store_true", help="leave out LPIPS, which needs trained networks"),
    option(
        "--features",
        choices=KINDS,
        default="auto",
        help="network of the Fréchet distance: auto is FID's Inception if its weights are found; inception-legacy sees "
        "float images, as in the paper's rFID",
    ),
    option("--enlarge", action="store_true", help="enlarge images smaller than the crop instead of refusing them"),
    option("--experiment-name", default="my_evaluation", help="without PICTURES: name of the evaluation's folder"),
    option("--results-dir", type=Path, default=Path("results"), help="without PICTURES: folder of all evaluations"),
    *(*MODEL, *SAMPLING, JSON),
)
def evaluate(arguments: argparse.Namespace) -> None:
    """How close reconstructions come to pictures, or how good generated pictures are.

    With PICTURES: PSNR, SSIM, LPIPS, rFID and bits per pixel of a model, beside codecs with --peers; as files with
    --report. With --reference: FID and its companions of generated PICTURES. Without PICTURES: the newest checkpoint
    of a run, eval.eval_dir=results/RUN, or with eval.continuous=true each as it comes.
    """
    from flowmo.distributed import join
    from flowmo.evaluate.follow import Follower
    from flowmo.evaluate.generation import GenerationSummary, NpzImages, extract_features, open_image_set
    from flowmo.evaluate.metrics import build_features
    from flowmo.evaluate.metrics.features import ResNetFeatures
    from flowmo.evaluate.npz import STATISTICS

    def say(line: str, to: Any = None) -> None:
        if world.main:
            print(line, file=to, flush=True)

    with join(arguments.device) as world:
        if arguments.reference:
            if not arguments.images or arguments.features == "none":
                raise UsageError("--reference compares generated PICTURES by a feature network; name both")
            sets = open_image_set(arguments.images), open_image_set(arguments.reference)
            network = build_features(arguments.features).to(world.device)
            own = isinstance(network, ResNetFeatures) or arguments.features == "inception-legacy"
            for pictures in sets if own else ():
                if isinstance(pictures, NpzImages) and pictures.names & set(sum(STATISTICS.values(), ())):
                    raise UsageError(
                        f"{pictures.name} holds statistics of FID's Inception, and {network.name} sees otherwise; add "
                        "--features inception, or name a folder of pictures"
                    )
            show = progress_bar("looking")
            generated, reference = (
                extract_features(pictures, network, device=world.device, world=world, progress=show)
                for pictures in sets
            )
            found = GenerationSummary.of(generated, reference, network, (sets[0].name, sets[1].name))
            say(json.dumps(found.as_dict(), indent=1) if arguments.json else "\n".join(found.lines()))
            return
        source = open_source(arguments.images) if arguments.images else None
        judges, missing = Evaluators.find(() if arguments.no_lpips else ("alex", "vgg"), arguments.features)
        judges.to(world.device)
        if source is None:
            folder = arguments.results_dir / arguments.experiment_name
            follower = Follower(arguments.settings, folder, judges, world, say)
            follower.ready = partial(prepare, arguments=arguments)
            if arguments.json:  # a line of it a checkpoint, as each is done; what people read goes the other way
                follower.report, follower.found = partial(say, to=sys.stderr), lambda row: say(json.dumps(row))
            follower.evaluate()
        else:
            compare(arguments, source, judges, world, say)
        for line in missing:
            say(line, sys.stderr)


def compare(arguments: argparse.Namespace, source: Source, judges: Evaluators, world: World, say: Callable) -> None:
    """A model beside its peers on some pictures."""
    from flowmo.evaluate.codecs import FORMATS, CodecReconstructor
    from flowmo.evaluate.peers import SIDE, build_peer
    from flowmo.evaluate.reconstruction import FlowMoReconstructor, Throughput, measure
    from flowmo.evaluate.report import Entry, weights_hash, write_report
    from flowmo.evaluate.summary import Summary

    tokenizer = load(arguments, str(world.device))
    own, preset = tokenizer.config.data.image_size, tokenizer.config.eval
    whole = arguments.fit == "whole"
    if whole and arguments.size:
        raise UsageError("--fit whole takes every image at its own size; leave out --size")
    side = None if whole else arguments.size or own
    steps, guidance = arguments.steps or preset.sampling.sample_steps, arguments.guidance or preset.sampling.guidance
    name = Path(arguments.model).stem
    codec = None
    if tokenizer.quantizer.id_count:
        codec = Codec(tokenizer, find_context(arguments.model, tokenizer))
    sampling = {"steps": steps, "seed": arguments.seed, "guidance": guidance, "identity": tokenizer.identity()}
    sampling["precision"] = precision = describe(tokenizer.precision, tokenizer.device)
    ours = FlowMoReconstructor(tokenizer, arguments.steps, arguments.seed, arguments.guidance, name, codec)
    model = tokenizer.config.model
    tiles = len(Tiling(side, side, own).corners) if side else None
    content = tokenizer.config.bits_per_image or 32 * model.code_length * model.context_dim
    budget = math.ceil((tiles or 1) * content / 8)
    entries: list[Entry] = []

    def candidates() -> Iterator[tuple[Reconstructor, dict[str, Any]]]:
        """Each candidate with the settings that its metrics depend on."""
        for rate in arguments.bpp or [None]:
            shown = name if rate is None else f"{name} at {rate:g}"
            yield replace(ours, name=shown, bits_per_pixel=rate), sampling | {"bits_per_pixel": rate}
            if whole:  # our whole files' bytes are the peers' budgets
                found = entries[-1].measurement
                sizes = dict(
                    zip(chosen[found.done].tolist(), found.column("file_bits").div(8).int().tolist(), strict=True)
                )
                for kind in arguments.peers:
                    peer = CodecReconstructor(kind, sizes, at_least=True)
                    peer.name += "" if rate is None else f" at {rate:g}"
                    yield peer, {"budget": "the model's files", **sampling, "bits_per_pixel": rate}
        for peer, weights in [] if whole else peers:
            if peer in FORMATS:
                for headers in (True, False):
                    yield CodecReconstructor(peer, budget, headers), {"budget": budget}
            else:
                yield build_peer(peer, weights or None, world.device), {"weights": weights}

    peers = [peer.partition("=")[::2] for peer in arguments.peers]
    for peer, _ in peers:
        if peer in FORMATS:
            CodecReconstructor(peer, 0)  # a codec that is missing is reported before hours of work
        elif side != SIDE:
            size = "whole images" if whole else f"{side} × {side}"
            raise UsageError(f"{peer} works at {SIDE} × {SIDE}, not at {size}; add --size {SIDE}")
    if whole and peers and codec is None:
        raise UsageError("codecs beside whole images need a model that writes files; this one has a continuous code")
    chosen = torch.tensor(evenly_spread(arguments.limit or len(source), len(source)))
    judges.remember = bool(peers) or len(arguments.bpp or []) > 1
    protocol = "whole, at its own size" if whole else f"short side resized to {side}, central square"
    for candidate, depends in candidates():
        throughput = Throughput()
        measured = measure(
            candidate,
            source,
            side,
            judges,
            limit=arguments.limit,
            batch_size=preset.batch_size,
            device=world.device,
            world=world,
            enlarge=arguments.enlarge,
            folder=arguments.report / "measured" / candidate.name if arguments.report else None,
            metadata=depends,
            throughput=throughput,
            progress=progress_bar(candidate.name),
        )
        summary = Summary.of(candidate.name, measured, judges.features)
        entries.append(Entry(candidate, measured, summary, throughput))
        if not arguments.json:
            say(f"{candidate.name}: {summary.pictures} images, {'each ' if whole else ''}{protocol}")
            say("\n".join(summary.lines()) + "\n")
    if not arguments.json and not arguments.report:
        say(f"precision of {name}: {precision}")
    if arguments.json:
        told = {"steps": steps, "seed": arguments.seed, "precision": precision}
        rows = [{**entry.summary.as_dict(), **told} for entry in entries]
        say(json.dumps(rows[0] if len(rows) == 1 else rows, indent=1))
    if arguments.report and world.main:
        measured_indices = chosen[entries[0].measurement.done].tolist()
        networks = {"LPIPS (AlexNet)": judges.lpips_alex, "LPIPS (VGG)": judges.lpips_vgg, "features": judges.features}
        facts = {
            "pictures": f"{shown_path(arguments.images)}: {len(measured_indices)} of {len(source)}, evenly spread",
            "protocol": f"each image {protocol}"
            if whole
            else f"short side resized to {side} (bilinear, antialiased), central square of {side} × {side}",
            "model": f"{shown_path(arguments.model)}, tokenizer {tokenizer.identity()}",
            **({"tiles a picture": tiles} if tiles else {}),
            "sampling": f"{steps} steps, seed {arguments.seed}, guidance {guidance}",
            "precision": precision,
            "judges' weights": {key: weights_hash(network) for key, network in networks.items() if network is not None},
        }
        if arguments.peers:
            facts["codecs"] = (
                "lowest quality whose whole file has at least the bytes of the model's file of the same image"
                if whole
                else f"highest quality within {budget} bytes a picture: whole files, and without their headers"
            )
        write_report(arguments.report, entries, source, measured_indices, side, facts)
        say(f"report in {arguments.report}/index.html", sys.stderr if arguments.json else None)


def shown_path(name: str) -> str:
    """What a report calls a file or folder; where it lies on this machine is nobody else's business."""
    return Path(name).name if Path(name).exists() else name
