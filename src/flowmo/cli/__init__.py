"""The command line: thin, every command is a few calls of the library.

Errors that a user can mend are one line on standard error. Exit statuses: see ``STATUSES``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

import flowmo
from flowmo.cli import demo as page
from flowmo.cli import evaluation, generation, models, training
from flowmo.cli import images as pictures
from flowmo.cli.shared import UsageError, choose_device, message_of
from flowmo.errors import FlowMoError

STATUSES = (
    "Exit status: 0 done; 1 the reader of a pipe is gone; 2 something that you can mend, said in one line on standard "
    "error; 130 interrupted."
)
SETTING = re.compile(r"([a-z_]+(\.[a-z_0-9]+)+|global_seed)=.*", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    settings = [word for word in words if SETTING.fullmatch(word)]
    parser = build_parser()
    arguments = parser.parse_args([word for word in words if word not in settings])
    arguments.settings = settings
    choose_device(arguments)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("flowmo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FlowMoError, OSError) as error:
        print(f"flowmo: {message_of(error)}", file=sys.stderr)
        return 2
    return 0


def completion(shell: str) -> str:
    """A script for a shell, made once: to complete a word, nothing of this package is imported.

    Raises:
        UsageError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise UsageError("completion scripts need shtab: pip install shtab") from None
    return shtab.complete(build_parser(), shell)


def build_parser() -> argparse.ArgumentParser:
    about = "Pictures to a short string of bits and back."
    parser = argparse.ArgumentParser(prog="flowmo", description=about, epilog=STATUSES)
    parser.add_argument("--version", action="version", version=f"flowmo {flowmo.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    shells = commands.add_parser("completion", help="a script that completes commands in a shell")
    shells.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which")
    shells.set_defaults(run=lambda arguments: print(completion(arguments.shell)))
    for part in (pictures, models, training, evaluation, generation, page):
        part.add_to(commands)
    return parser
