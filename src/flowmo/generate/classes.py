"""Names of classes: a generator's own, and ImageNet's for those that are WordNet ids."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from flowmo.errors import FlowMoError

IMAGENET = Path(__file__).parent / "imagenet_classes.tsv"
"""WordNet id and names of ImageNet-1K's classes, in the order of their numbers (WordNet 3.0, Princeton University)."""
NEAREST = 3


class GenerationError(FlowMoError, ValueError):
    """A class, an id or a mask that a generator cannot use; the message says which it can."""


@cache
def imagenet_names() -> dict[str, str]:
    """``{"n01440764": "tench, Tinca tinca", …}``."""
    return dict(line.split("\t") for line in IMAGENET.read_text().splitlines())


def display_name(name: str) -> str:
    """What people call a class: of a WordNet id its first name."""
    return imagenet_names().get(name, name).partition(",")[0]


def find_class(wanted: str | int, classes: Sequence[str]) -> int:
    """The number of a class, by its number, its name, or for WordNet ids any of ImageNet's names; −1 is none.

    Raises:
        GenerationError: no such class; the message has the nearest names.
    """
    text = str(wanted).strip()
    if text.lstrip("-").isdigit():
        number = int(text)
        if -1 <= number < len(classes):
            return number
        raise GenerationError(f"no class {number}; they run from 0 to {len(classes) - 1}, and −1 is none")
    names: dict[str, int] = {}
    for number, name in enumerate(classes):
        for known in (name, *imagenet_names().get(name, "").split(", ")):
            names.setdefault(known.casefold(), number)
    found = names.get(text.casefold())
    if found is None:
        near = difflib.get_close_matches(text.casefold(), [name for name in names if name], NEAREST, cutoff=0.5)
        shown = near or [display_name(name) for name in classes[:NEAREST]]
        raise GenerationError(f"no class {text!r}; {'the nearest are' if near else 'there are'} {', '.join(shown)}")
    return found
