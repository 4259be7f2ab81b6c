"""What several commands have in common."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

import flowmo
from flowmo.errors import FlowMoError
from flowmo.model.cpu_prepack import Packable
from flowmo.precision import PRECISIONS
from flowmo.tokenizer import FlowMo

Model = TypeVar("Model", bound=Packable)


class UsageError(FlowMoError):
    """Arguments that make no sense together."""


def command(run: Callable, text: str, commands: Any) -> argparse.ArgumentParser:
    """The parser of a command that is named and described as the function that it runs."""
    note = "Settings are changed by section.name=value, e.g. eval.sampling.rho=1; see flowmo info --settings."
    sub = commands.add_parser(run.__name__, help=text, description=run.__doc__, epilog=note)
    sub.set_defaults(run=run)
    return sub


def with_model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", default="nano", help="preset, file, folder or Hub id of the weights (nano)")
    with_device(sub)
    precision = "of matrix products (auto): bfloat16 with TF32 on a GPU that has it, else float32"
    sub.add_argument("--precision", choices=PRECISIONS, default="auto", help=precision)
    packing = "lay the weights out for this CPU: the same sooner, but for the last bits"
    sub.add_argument("--pack", action="store_true", help=packing)
    compiling = "compile first, for half a minute, where a C++ compiler is: sooner again"
    sub.add_argument("--compile", action="store_true", help=compiling)


def with_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", type=device, help="cpu, cuda, mps … (a GPU where there is one; cpu with --pack)")


def choose_device(arguments: argparse.Namespace) -> None:
    """Set the device of a command that has one and is not told which."""
    if getattr(arguments, "device", "") is None:
        packed = getattr(arguments, "pack", False)  # weights are packed for CPUs alone
        arguments.device = "cuda" if torch.cuda.is_available() and not packed else "cpu"


def with_sampling(sub: argparse.ArgumentParser) -> None:
    steps = "steps from noise to picture (the model's own: 1 of nano, 25 of the paper's)"
    sub.add_argument("--steps", type=positive, help=steps)
    sub.add_argument("--seed", type=seed, default=0, help="seed of the noise (0)")
    sub.add_argument("--guidance", type=finite, help="classifier-free guidance (the preset's: 1.5); 1 is none")


def with_fit(sub: argparse.ArgumentParser) -> None:
    fit = "whole (or tile): the whole image, in blended tiles where the model has one size; crop: the central square"
    sub.add_argument("--fit", choices=("whole", "tile", "crop"), default="whole", help=fit)
    bpp = "of a model of variable rate: the highest rate at or below this many bits per pixel (the full rate)"
    sub.add_argument("--bpp", type=finite, metavar="RATE", help=bpp)


def load(arguments: argparse.Namespace, device: str | None = None) -> FlowMo:
    """The tokenizer of ``with_model``, on another device where one is given."""
    return hasten(flowmo.load(arguments.model, *arguments.settings, device=device or arguments.device), arguments)


def hasten(model: Model, arguments: argparse.Namespace) -> Model:
    """A tokenizer or generator, in the precision that is asked for, packed and compiled as asked."""
    if arguments.pack:
        model.pack()
    if arguments.compile:
        model.compile()
    model.set_precision(arguments.precision)
    return model


def sampling(arguments: argparse.Namespace) -> dict:
    return {"steps": arguments.steps, "seed": arguments.seed, "guidance": arguments.guidance}


def with_json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print JSON")


def tell(arguments: argparse.Namespace, line: str, **facts: Any) -> None:
    """What a command has done: a line for people, or facts for programs."""
    print(json.dumps(facts, indent=1) if arguments.json else line)


def message_of(error: Exception) -> str:
    """An error as one line, without numbers that only programmers know."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    return " ".join(str(error).split())


def refuse_clash(outputs: Sequence[Path]) -> None:
    clash = next((path for path in outputs if outputs.count(path) > 1), None)
    if clash:
        raise UsageError(f"two pictures would both be written to {clash}; give them other names")


def progress_bar(name: str) -> Callable[[int, int], None] | None:
    """A counter on a terminal's standard error; nothing elsewhere, nor on a terminal that cannot go back on a line."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return None

    def show(done: int, total: int) -> None:
        sys.stderr.write(f"\r{name[:40]} {done}/{total}" + ("\r\033[K" if done == total else ""))
        sys.stderr.flush()

    return show


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2^63 − 1")
    return value


def device(text: str) -> str:
    try:
        if torch.device(text).type == "cuda":  # asked, not touched: eight processes would all settle on the first GPU
            there = torch.cuda.is_available() and (torch.device(text).index or 0) < torch.cuda.device_count()
        else:
            there = torch.empty(0, device=text) is not None
    except (RuntimeError, AssertionError):
        there = False
    if not there:
        raise argparse.ArgumentTypeError(f"no device {text!r} on this machine")
    return text
