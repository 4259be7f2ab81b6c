"""The command line. Every command is a function with a table of options, and calls the library."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence

import flowmo
from flowmo.cli.evaluation import evaluate
from flowmo.cli.generation import context, export, generate, tokenize
from flowmo.cli.images import decode, encode, reconstruct
from flowmo.cli.models import bench, convert, demo, info, push
from flowmo.cli.options import Command, choose_device, command, option
from flowmo.cli.output import UsageError, status_of
from flowmo.cli.training import index, show, train

EXIT_STATUSES = (
    "Exit status: 0 success; 1 the reader of a pipe has gone; 2 an error that you can fix, in one line on standard "
    "error; 130 interrupted."
)
SETTING = re.compile(r"([a-z_]+(\.[a-z_0-9]+)+|global_seed)=.*", re.DOTALL)


@command(
    "print a script that completes commands in a shell",
    option("shell", choices=("bash", "zsh", "tcsh"), help="shell to write the script for"),
)
def completion(arguments: argparse.Namespace) -> tuple[str, None]:
    """Print a completion script. Completing a word then imports nothing of this package."""
    try:
        import shtab
    except ImportError:
        raise UsageError("Completion scripts need shtab. Install it: pip install shtab.") from None
    return shtab.complete(build_parser(), arguments.shell), None


COMMANDS: Sequence[Command] = (
    *(completion, reconstruct, encode, decode, info, bench, convert, push),
    *(train, evaluate, tokenize, context, generate, demo),
)
DATA_COMMANDS: Sequence[Command] = (index, show, export)


def build_parser() -> argparse.ArgumentParser:
    description = "Encode images as short strings of bits and decode them again."
    parser = argparse.ArgumentParser(prog="flowmo", description=description, epilog=EXIT_STATUSES)
    parser.add_argument("--version", action="version", version=f"flowmo {flowmo.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each in COMMANDS:
        each.add_to(commands)
    text = "prepare and inspect training data"
    data = commands.add_parser("data", help=text, description=f"{text.capitalize()}.")
    data_commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each in DATA_COMMANDS:
        each.add_to(data_commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``, by default the process's own. Returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    settings = [word for word in words if SETTING.fullmatch(word)]
    arguments = build_parser().parse_args([word for word in words if word not in settings])
    arguments.settings = settings
    choose_device(arguments)
    return status_of("flowmo", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    result = arguments.run(arguments)
    if result:
        text, data = result
        print(json.dumps(data, indent=1) if getattr(arguments, "json", False) else text)
