"""The command line: a table of commands, whose functions call the library."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import flowmo
from flowmo.cli import threads
from flowmo.cli.commands import COMMANDS, DATA_COMMANDS
from flowmo.cli.options import choose_device
from flowmo.cli.output import status_of
from flowmo.config import FIELDS

EXIT_STATUSES = (
    "Exit status: 0 success; 1 broken pipe; 2 an error that you can fix, in one line on standard "
    "error; 130 interrupted."
)
SETTING = re.compile(r"([a-z_]+(\.[a-z_0-9]+)+|global_seed)=.*", re.DOTALL)
WRONG_CHOICE = re.compile(r"argument (.+?): invalid choice: (['\"].*['\"]) \(choose from (.*)\)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """A parser that answers wrong arguments with one line, abbreviated options too."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        wrong = WRONG_CHOICE.fullmatch(message)
        if wrong:
            choices = re.findall(r"[\w-]+", wrong[3])
            problem = "There is no command" if wrong[1] == "COMMAND" else f"{wrong[1]} cannot be"
            self.reject(f"{problem} {wrong[2]}", wrong[2], choices)
        self.reject(message)

    def reject(self, problem: str, word: str = "", choices: Sequence[str] = ()) -> NoReturn:
        """Exit with the problem, and with the choice that looks most like ``word``."""
        close = difflib.get_close_matches(word, choices, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        problem = " ".join(problem.split()).rstrip(".")
        self.exit(2, f"{self.prog}: {problem[:1].upper()}{problem[1:]}.{hint} See {self.prog} --help.\n")


def build_parser() -> Parser:
    description = "Encode images as short strings of bits and decode them again."
    parser = Parser(prog="flowmo", description=description, epilog=EXIT_STATUSES)
    parser.add_argument("--version", action="version", version=f"flowmo {flowmo.__version__}")
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each in COMMANDS:
        each.add_to(commands)
    text = "prepare and inspect training data"
    data = commands.add_parser("data", help=text, description=f"{text.capitalize()}.")
    data_commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each in DATA_COMMANDS:
        each.add_to(data_commands)
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the words of a command line. ``settings`` holds its section.name=value words."""
    settings = [word for word in words if SETTING.fullmatch(word) and not os.path.exists(word)]
    arguments, rest = build_parser().parse_known_args([word for word in words if word not in settings])
    arguments.settings = settings
    if settings and not arguments.command.configurable:
        arguments.parser.reject(f"It takes no settings such as {settings[0]!r}")
    if rest:
        word = rest[0].partition("=")[0]
        options = arguments.command.options
        flags = [flag for each in options if each.settings["help"] != argparse.SUPPRESS for flag in each.flags]
        if word.startswith("-"):
            arguments.parser.reject(f"There is no option {word!r} here", word, flags)
        before, advice = words[: words.index(rest[0])], ""
        if word in FIELDS:
            advice = f". A setting is one word: {word}=VALUE"
        elif any(each.startswith("-") for each in before):
            advice = ". Write names of files before the options"
        arguments.parser.reject(f"There is no argument {word!r} here{advice}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``, by default the process's own. Returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    return status_of("flowmo", lambda: run(words))


def run(words: Sequence[str]) -> None:
    load = threads.Load.now()
    arguments = parse(words)
    function = arguments.command.function()
    choose_device(arguments)
    threads.choose(arguments.command.name, load)
    result = function(arguments)
    if result:
        text, data = result
        print(json.dumps(data, indent=1) if getattr(arguments, "json", False) else text)
