"""The form of commands, the types of their arguments, and the models that options describe.

Nothing is imported here that imports torch: ``--help`` and wrong arguments are answered at once.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import flowmo

if TYPE_CHECKING:
    from flowmo.model.inference import InferenceModel
    from flowmo.tokenizer import FlowMo

Model = TypeVar("Model", bound="InferenceModel")
Run = Callable[[argparse.Namespace], tuple[str, Any] | None]
"""Runs a command. Returns text for people and data for --json."""
EPILOG = "Change settings with section.name=value, e.g. eval.sampling.rho=1. flowmo info --settings lists them."


PATHS = ("PATH", "PICTURES", "SOURCE", "TOKENS")
FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
"""Tells shtab that an argument is a path. The same as ``shtab.FILE``."""


class Option(NamedTuple):
    """Arguments of ``ArgumentParser.add_argument``, and former names that the help does not show."""

    flags: tuple[str, ...]
    settings: dict[str, Any]
    former: tuple[str, ...] = ()

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        action = parser.add_argument(*self.flags, *self.former, **self.settings)
        action.option_strings = [flag for flag in action.option_strings if flag not in self.former]
        if self.settings.get("type") is Path or self.settings.get("metavar") in PATHS:
            action.complete = FILES  # type: ignore[attr-defined]


def option(*flags: str, former: tuple[str, ...] = (), **settings: Any) -> Option:
    """Make an option. Its help text ends with its default."""
    if settings.get("default") not in (None, (), argparse.SUPPRESS) and settings["help"] != argparse.SUPPRESS:
        settings["help"] += " (default: %(default)s)"
    return Option(flags, settings, former)


class Command:
    """A command. ``flowmo.cli.MODULE.NAME`` runs it. The list of commands has the first sentence of its description.

    ``configurable`` commands take section.name=value settings.
    """

    def __init__(self, path: str, description: str, *options: Option, configurable: bool = True):
        self.module, self.name = path.split(".")
        self.description, self.options, self.configurable = description, options, configurable

    def add_to(self, commands: Any) -> None:
        """Add a parser to the result of ``ArgumentParser.add_subparsers``."""
        text = self.description.partition(". ")[0].rstrip(".")
        text = text[:1].lower() + text[1:]
        epilog = EPILOG if self.configurable else None
        parser = commands.add_parser(self.name, help=text, description=self.description, epilog=epilog)
        parser.set_defaults(command=self, parser=parser)
        for each in self.options:
            each.add_to(parser)

    def function(self) -> Run:
        """Import the function of the command, and torch with it."""
        return getattr(import_module(f"flowmo.cli.{self.module}"), self.name)


# Types of arguments


def number(kind: type[int] | type[float], low: float = -math.inf, high: float = math.inf) -> Callable[[str], Any]:
    """Make the argument type of finite numbers from ``low`` to ``high``."""
    limits = f" from {low}" * (low > -math.inf) + f" to {high}" * (high < math.inf)

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (-math.inf < value < math.inf and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number{limits}")
        return value

    return parse


def device(text: str) -> str:
    import torch

    try:
        if torch.device(text).type == "cuda":  # no allocation: every rank would create a context on the first GPU
            found = torch.cuda.is_available() and (torch.device(text).index or 0) < torch.cuda.device_count()
        else:
            found = torch.empty(0, device=text).device.type != "meta"  # whose tensors have no values
    except (RuntimeError, AssertionError, ImportError):
        found = False
    if not found:
        raise argparse.ArgumentTypeError(f"this machine has no device {text!r}")
    return text


POSITIVE, SEED, FINITE = number(int, 1), number(int, 0, 2**63 - 1), number(float)


def choose_device(arguments: argparse.Namespace) -> None:
    """Set ``arguments.device`` if the command has one and the user named none."""
    if getattr(arguments, "device", "") is None:
        import torch

        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split settings into a tokenizer's and a generator's, which start with ``generator.``."""
    own = [setting for setting in settings if setting.startswith("generator.")]
    return [setting for setting in settings if setting not in own], own


def load(arguments: argparse.Namespace, device: str | None = None) -> FlowMo:
    """Load the tokenizer that the options ``MODEL`` describe, by default onto their device."""
    return prepare(flowmo.load(arguments.model, *arguments.settings, device=device or arguments.device), arguments)


def prepare(model: Model, arguments: argparse.Namespace) -> Model:
    """Compile and set the precision of a tokenizer or generator, as the options ``MODEL`` say."""
    if arguments.compile:
        if sys.stderr.isatty():
            print("flowmo: The first image waits half a minute for the compiler.", file=sys.stderr)
        model.compile()
    model.set_precision(arguments.precision)
    return model


def sampling(arguments: argparse.Namespace, tokenizer: FlowMo) -> dict[str, Any]:
    """Keyword arguments of ``FlowMo.decode_image`` from the options ``SAMPLING``. Warns of guidance without effect."""
    from flowmo.cli.output import warn
    from flowmo.model.sampler import network_passes

    s = tokenizer.config.eval.sampling
    s = replace(s, sample_steps=arguments.steps or s.sample_steps)
    guided = arguments.guidance not in (None, 1)
    if guided and network_passes(replace(s, guidance=arguments.guidance)) == network_passes(replace(s, guidance=1.0)):
        steps = f"no step of {s.sample_steps} lies" if s.sample_steps > 1 else "the only step, at t = 1, does not lie"
        interval = f"from t = {s.guidance_low:.3g} to {s.guidance_high:.3g}"
        warn(f"--guidance changes nothing: {steps} in its interval, {interval}")
    return {"steps": arguments.steps, "seed": arguments.seed, "guidance": arguments.guidance}
