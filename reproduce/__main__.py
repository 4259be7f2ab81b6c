"""``python -m reproduce NAME``: a table or figure of the paper as a recipe: train, measure, write a table and plots."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from flowmo.cli.options import DEVICE, choose_device
from flowmo.cli.output import UsageError, status_of
from flowmo.distributed import join
from flowmo.evaluate.reconstruction import Evaluators
from reproduce import SCALES, STUDIES
from reproduce.study import Place


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reproduce", description="A table or figure of the paper.")
    parser.add_argument("name", choices=tuple(STUDIES), help="which")
    parser.add_argument("--scale", choices=SCALES, default="smoke", help="smoke: a minute; cpu: hours on a CPU; …")
    parser.add_argument("--data", default="", help="training images, as data.train")
    parser.add_argument("--held-out", default="", help="images to evaluate on")
    parser.add_argument("--out", type=Path, default=Path("docs/studies"), help="tables and plots (docs/studies)")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="runs (results)")
    models = "trained tokenizers for the studies that need one: presets or files (nano)"
    parser.add_argument("--models", nargs="+", default=["nano"], metavar="MODEL", help=models)
    parser.add_argument("--redraw", action="store_true", help="only draw the table and plots of the results in --out")
    flags, settings = DEVICE
    parser.add_argument(*flags, **settings)
    return parser


def run(arguments: argparse.Namespace) -> None:
    recipe = importlib.import_module(STUDIES[arguments.name])
    with join(arguments.device) as world:
        place = Place(
            arguments.name,
            arguments.scale,
            train=arguments.data,
            held_out=arguments.held_out,
            out=arguments.out,
            results=arguments.results_dir,
            world=world,
            models=(*arguments.models,),
        )
        if arguments.redraw:
            recipe.draw(place)
            return
        if not (arguments.data and arguments.held_out):
            raise UsageError("name the images: --data IMAGES --held-out OTHER_IMAGES")
        evaluators, missing = Evaluators.find()
        print("\n".join(missing), file=sys.stderr)
        evaluators.remember = True
        recipe.run(place, evaluators.to(world.device))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    choose_device(arguments)
    return status_of("reproduce", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
