"""Classes by name. A WordNet id also has ImageNet's names."""

import difflib
import operator
import re
from functools import cache
from pathlib import Path

from flowmo.errors import FlowMoError

IMAGENET = Path(__file__).parent / "imagenet_classes.tsv"
"""WordNet id and names of the ImageNet-1K classes, in index order (WordNet 3.0, Princeton University)."""


class GenerationError(FlowMoError, ValueError):
    """An argument that a generator cannot use. The message says what it accepts."""


@cache
def imagenet_names() -> dict[str, str]:
    """``{"n01440764": "tench, Tinca tinca", …}``."""
    return dict(line.split("\t") for line in IMAGENET.read_text().splitlines())


def _names(name: str) -> list[str]:
    """Return all names of a class: its own, and ImageNet's if it is a WordNet id."""
    return [name, *filter(None, imagenet_names().get(name, "").split(", "))]


def _display_name(name: str) -> str:
    """Return the first ImageNet name of a WordNet id, else the name itself."""
    return (*_names(name)[1:], name)[0]


@cache
def _owners(classes: tuple[str, ...]) -> dict[str, set[str]]:
    """Map each case-folded name to the classes that have it. Includes ImageNet classes outside ``classes``."""
    owners: dict[str, set[str]] = {}
    for name in (*imagenet_names(), *classes):
        for known in _names(name):
            owners.setdefault(known.casefold(), set()).add(name)
    return owners


def _is_number(text: str) -> bool:
    return re.fullmatch("-?[0-9]{1,18}", text) is not None


@cache
def class_titles(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Unique display names. A name that is a number gets its index added, an ambiguous one its WordNet id."""

    def title(index: int, name: str) -> str:
        title = _display_name(name)
        if _is_number(title):
            return f"{title} (class {index})"
        ambiguous = name in imagenet_names() and len(_owners(classes)[title.casefold()].intersection(classes)) > 1
        return f"{title} ({name})" if ambiguous else title

    return tuple(title(index, name) for index, name in enumerate(classes))


def find_class(wanted: str | int, classes: tuple[str, ...]) -> int:
    """Return the index of a class.

    Args:
        wanted: an index, or −1 for no class. Or text: the class's name, its title, an ImageNet name of its WordNet id,
            name and id, or an index if no class has that name.

    Raises:
        GenerationError: there is no such class, or several classes have this name.
    """
    if not isinstance(wanted, str):
        try:
            wanted = operator.index(wanted)
        except TypeError:
            raise GenerationError(f"{wanted!r} is no class. Give a name or an index.") from None
    text = str(wanted).strip()
    if not classes and text != "-1":
        raise GenerationError("This generator has no classes. Give -1, or leave out --class.")
    if not isinstance(wanted, str) or (text not in classes and _is_number(text)):
        if -1 <= int(text) < len(classes):
            return int(text)
        raise GenerationError(f"There is no class {text}. Give an index from 0 to {len(classes) - 1}, or -1 for none.")
    for titles in (classes, class_titles(classes)):
        if text in titles:
            return titles.index(text)
    if (title := re.fullmatch(r"(.+) \((n[0-9]{8})\)", text)) and title[2] in classes and title[1] in _names(title[2]):
        return classes.index(title[2])
    owners = _owners(classes).get(text.casefold(), set())
    found = [name for name in classes if name in owners]
    if not found:
        names = {known.casefold() for name in classes for known in _names(name)}
        near = difflib.get_close_matches(text.casefold(), sorted(names), cutoff=0.5)
        which, shown = ("nearest", near) if near else ("first", class_titles(classes)[:3])
        raise GenerationError(f"There is no class {text!r}. The {which} are {', '.join(shown)}.")
    if len(found) == 1 and (len(owners) == 1 or _display_name(found[0]).casefold() == text.casefold()):
        return classes.index(found[0])
    several = ", ".join(f"{name} ({_display_name(name)})" for name in sorted(owners))
    raise GenerationError(
        f"{text!r} is a name of several classes: {several}. The generator knows {', '.join(found)}. Give the id of one."
    )
