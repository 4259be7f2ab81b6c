"""Names of classes: a generator's own, and ImageNet's for those that are WordNet ids."""

from __future__ import annotations

import difflib
import re
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


def known_names(name: str) -> tuple[str, ...]:
    """All names of a class: its own, and ImageNet's of a WordNet id."""
    return (name, *imagenet_names()[name].split(", ")) if name in imagenet_names() else (name,)


def display_name(name: str) -> str:
    """What people call a class: of a WordNet id its first name."""
    return (*known_names(name)[1:], name)[0]


@cache
def _owners(classes: tuple[str, ...]) -> dict[str, set[str]]:
    """The classes of each name, case-folded; also those of ImageNet that are not among ``classes``."""
    owners: dict[str, set[str]] = {}
    for name in (*imagenet_names(), *classes):
        for known in known_names(name):
            owners.setdefault(known.casefold(), set()).add(name)
    return owners


def class_titles(classes: Sequence[str]) -> tuple[str, ...]:
    """What people call each class. A name that is also another's, or a number, is followed by what tells it apart."""
    return _titles(tuple(classes))


@cache
def _titles(classes: tuple[str, ...]) -> tuple[str, ...]:
    titles, owners, present = [], _owners(classes), {*classes}
    for index, name in enumerate(classes):
        title = display_name(name)
        if _is_number(title):
            title = f"{title} (class {index})"
        elif name in imagenet_names() and len(owners[title.casefold()] & present) > 1:
            title = f"{title} ({name})"
        titles.append(title)
    return tuple(titles)


def _is_number(text: str) -> bool:
    return re.fullmatch("-?[0-9]{1,18}", text) is not None


def find_class(wanted: str | int, classes: Sequence[str]) -> int:
    """The index of a class.

    Args:
        wanted: an index, −1 for none. Or text: the class's own name, its title, one of ImageNet's names of a WordNet
            id, or an index where no class is called by that number.

    Raises:
        GenerationError: no such class, and the message has the nearest names; or a name of several, and it asks which.
    """
    text = str(wanted).strip()
    if not isinstance(wanted, str) or (text not in classes and _is_number(text)):
        number = int(text)
        if -1 <= number < len(classes):
            return number
        raise GenerationError(f"no class {number}; they run from 0 to {len(classes) - 1}, and −1 is none")
    for titles in (classes, class_titles(classes)):
        if text in titles:
            return titles.index(text)
    everyone = _owners(tuple(classes)).get(text.casefold(), set())
    found = [name for name in classes if name in everyone]
    if not found:
        near = _nearest(text, classes)
        shown = near or [display_name(name) for name in classes[:NEAREST]]
        raise GenerationError(f"no class {text!r}; {'the nearest are' if near else 'there are'} {', '.join(shown)}")
    if len(found) == 1 and (len(everyone) == 1 or display_name(found[0]).casefold() == text.casefold()):
        return classes.index(found[0])
    others = f"is a name of several classes; which one: {_listed(found)}"
    if len(found) == 1:
        absent = sorted(everyone - {*found})
        others = f"may be {_listed(absent)}, which the generator does not draw; it draws {_listed(found)}"
    raise GenerationError(f"{text!r} {others}? Write the id")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"{name} ({display_name(name)})" if name in imagenet_names() else repr(name) for name in names)


def _nearest(text: str, classes: Sequence[str]) -> list[str]:
    names = {known.casefold() for name in classes for known in known_names(name)} - {""}
    return difflib.get_close_matches(text.casefold(), sorted(names), NEAREST, cutoff=0.5)
