"""Commands as functions with tables of options, and the options and argument types that several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

import flowmo
from flowmo.model.cpu_prepack import Packable
from flowmo.precision import PRECISIONS
from flowmo.tokenizer import FlowMo

Model = TypeVar("Model", bound=Packable)
Option = tuple[tuple[str, ...], dict[str, Any]]
"""Positional and keyword arguments of ``ArgumentParser.add_argument``."""
Run = Callable[[argparse.Namespace], tuple[str, Any] | None]
"""Runs a command. Returns text for people and data for --json."""
EPILOG = "Change settings with section.name=value, e.g. eval.sampling.rho=1. flowmo info --settings lists them."


def option(*flags: str, **settings: Any) -> Option:
    """Make an option. Its help text ends with its default."""
    if settings.get("default", ()) != ():
        settings["help"] += " (default: %(default)s)"
    return flags, settings


class Command(NamedTuple):
    """A function and its options. The command is named after the function and described by its docstring."""

    run: Run
    help: str
    options: tuple[Option, ...]

    def add_to(self, commands: Any) -> None:
        """Add a parser to the result of ``ArgumentParser.add_subparsers``."""
        parser = commands.add_parser(self.run.__name__, help=self.help, description=self.run.__doc__, epilog=EPILOG)
        parser.set_defaults(run=self.run)
        for flags, settings in self.options:
            parser.add_argument(*flags, **settings)


def command(text: str, *options: Option) -> Callable[[Run], Command]:
    """Decorate a function as a command with this help text and these options."""
    return lambda run: Command(run, text, options)


# Types of arguments


def number(kind: type[int] | type[float], low: float = -math.inf, high: float = math.inf) -> Callable[[str], Any]:
    """Make the argument type of finite numbers from ``low`` to ``high``."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its messages
    return parse


def device(text: str) -> str:
    try:
        if torch.device(text).type == "cuda":  # no allocation: every rank would create a context on the first GPU
            found = torch.cuda.is_available() and (torch.device(text).index or 0) < torch.cuda.device_count()
        else:
            found = torch.empty(0, device=text) is not None
    except (RuntimeError, AssertionError):
        found = False
    if not found:
        raise argparse.ArgumentTypeError(f"this machine has no device {text!r}")
    return text


# Options of several commands

POSITIVE, SEED, FINITE = number(int, 1), number(int, 0, 2**63 - 1), number(float)
DATASET = "folder, .tar, WebDataset shards or hf:NAME:SPLIT"
JSON = option("--json", action="store_true", help="print JSON and nothing else")
DEVICE = option("--device", type=device, help="cpu, cuda, mps … (default: a GPU if there is one; cpu with --pack)")
PRECISION = "precision of matrix products; auto is bfloat16 with TF32 on a GPU that has it, else float32"
MODEL = (
    option("--model", default="nano", help="preset, file, folder or Hub id of the tokenizer's weights"),
    DEVICE,
    option("--precision", choices=PRECISIONS, default="auto", help=PRECISION),
    option("--pack", action="store_true", help="prepack weights for this CPU: faster; only the last bits differ"),
    option("--compile", action="store_true", help="compile first: half a minute, then faster; needs a C++ compiler"),
)
SAMPLING = (
    option("--steps", type=POSITIVE, help="sampling steps (default: the model's own; 1 of nano, 25 of the paper's)"),
    option("--seed", type=SEED, default=0, help="seed of the noise"),
    option("--guidance", type=FINITE, help="classifier-free guidance; 1 is none (default: the preset's, 1.5)"),
)
WHOLE = "whole or tile: the whole image, in blended tiles if the model has one size; crop: the central square"
RATE = "variable-rate models: the highest rate up to RATE bits per pixel (default: the full rate)"
FIT = (
    option("--fit", choices=("whole", "tile", "crop"), default="whole", help=WHOLE),
    option("--bpp", type=FINITE, metavar="RATE", help=RATE),
)


def choose_device(arguments: argparse.Namespace) -> None:
    """Set ``arguments.device`` if the command has one and the user named none."""
    if getattr(arguments, "device", "") is None:
        packed = getattr(arguments, "pack", False)  # weights are packed for CPUs only
        arguments.device = "cuda" if torch.cuda.is_available() and not packed else "cpu"


def load(arguments: argparse.Namespace, device: str | None = None) -> FlowMo:
    """Load the tokenizer that the options ``MODEL`` describe, by default onto their device."""
    return prepare(flowmo.load(arguments.model, *arguments.settings, device=device or arguments.device), arguments)


def prepare(model: Model, arguments: argparse.Namespace) -> Model:
    """Pack, compile and set the precision of a tokenizer or generator, as the options ``MODEL`` say."""
    if arguments.pack:
        model.pack()
    if arguments.compile:
        model.compile()
    model.set_precision(arguments.precision)
    return model


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``FlowMo.decode_image`` from the options ``SAMPLING``."""
    return {"steps": arguments.steps, "seed": arguments.seed, "guidance": arguments.guidance}
