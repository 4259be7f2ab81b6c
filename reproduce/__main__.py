"""``python -m reproduce NAME``: train and measure what one table or figure of the paper needs, then write its page."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flowmo.cli.commands import DEVICE
from flowmo.cli.options import choose_device
from flowmo.cli.output import UsageError, status_of
from flowmo.distributed import join
from flowmo.evaluate.reconstruction import Evaluators
from reproduce import SCALES, STUDIES, page, runner


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reproduce", description="Reproduce a table or figure of the paper.", allow_abbrev=False
    )
    parser.add_argument("name", choices=STUDIES, help="the recipe: reproduce/NAME.py")
    parser.add_argument("--scale", choices=SCALES, default="smoke", help="size of the study (smoke, about a minute)")
    parser.add_argument("--data", default="", help="training images, as data.train")
    parser.add_argument("--held-out", default="", help="images to evaluate on")
    parser.add_argument("--out", type=Path, default=Path("results/studies"), help="folder of pages (results/studies)")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="folder of runs (results)")
    models = "trained tokenizers for recipes that need some: presets or files (nano)"
    parser.add_argument("--models", nargs="+", default=["nano"], metavar="MODEL", help=models)
    parser.add_argument("--redraw", action="store_true", help="only write the page again, from the results in --out")
    DEVICE.add_to(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    recipe = importlib.import_module(f"reproduce.{arguments.name}")
    with join(arguments.device) as world:
        study = runner.Study(
            arguments.name,
            arguments.scale,
            data=arguments.data,
            held_out=arguments.held_out,
            out=arguments.out,
            results=arguments.results_dir,
            world=world,
            models=tuple(arguments.models),
        )
        if arguments.redraw:
            runner.write_page(recipe, study)
            return
        if not (arguments.data and arguments.held_out):
            raise UsageError("Name the images: --data IMAGES --held-out OTHER_IMAGES.")
        page.subplots(1, 1, (1, 1))  # without matplotlib, end before the work
        evaluators, missing = Evaluators.find()
        print("\n".join(missing), file=sys.stderr)
        evaluators.cache_originals = True
        runner.run(recipe, replace(study, evaluators=evaluators.to(world.device)))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    choose_device(arguments)
    return status_of("reproduce", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
