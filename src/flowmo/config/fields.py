"""Types of settings: ranges and durations."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from flowmo.errors import FlowMoError, one_line


class ConfigError(FlowMoError, ValueError):
    """A setting that does not exist, has the wrong type or cannot work. The message says what to write instead."""


class Duration(str):
    """A length or period of training: ``"25.6M images"``, ``"200k steps"``, ``"40 epochs"``; a bare number is steps.

    Training counts in images. Steps are converted with the global batch of the run, epochs with the number of training
    images. ``"0 images"`` switches a period off.

    Raises:
        ValueError: the text has another form.
    """

    amount: float
    unit: str

    def __new__(cls, text: str | int | float) -> Self:
        match = re.fullmatch(r"([\d_.]+(?:e[-+]?\d+)?) *([kM]?) *(?:(step|image|epoch)s?)?", str(text).strip())
        if match is None:
            raise ValueError(f"{text!r} is not a length of training")
        number, scale, unit = match.groups()
        amount = float(number) * {"": 1, "k": 1_000, "M": 1_000_000}[scale]
        if not math.isfinite(amount):
            raise ValueError(f"{text!r} is not a finite length")
        amount = int(amount) if amount == int(amount) else amount
        duration = super().__new__(cls, f"{amount} {unit or 'step'}s")
        duration.amount, duration.unit = amount, f"{unit or 'step'}s"
        return duration

    def images(self, batch: int, epoch: int) -> int:
        """Convert to images, with ``batch`` images per step and ``epoch`` per epoch; at least 1 unless it is 0."""
        images = round(self.amount * {"images": 1, "steps": batch, "epochs": epoch}[self.unit])
        return max(images, 1) if self.amount else 0


@dataclass(frozen=True)
class Range:
    """The values that a setting takes, and the words for them after "must be"."""

    contains: Callable[[Any], bool]
    words: str
    choices: tuple[str, ...] = ()


def at_least(low: float) -> Range:
    return Range(lambda value: value >= low, f"at least {low}")


def above(low: float) -> Range:
    return Range(lambda value: value > low, f"above {low}")


def between(low: float, high: float) -> Range:
    return Range(lambda value: low <= value <= high, f"between {low} and {high}")


def below(high: float) -> Range:
    return Range(lambda value: 0 <= value < high, f"at least 0 and below {high}")


def one_of(*choices: str) -> Range:
    return Range(choices.__contains__, " or ".join(choices), choices)


def matching(pattern: str, words: str) -> Range:
    return Range(lambda text: re.fullmatch(pattern, text) is not None, words)


NUMBER = r"[-+]?\d{1,20}(\.\d{1,20})?(e[-+]?\d{1,2})?"
VALUES = matching(f"({NUMBER},{NUMBER})?", "two numbers such as 0,4095")
BIT_DEPTHS = Range((8, 16, 32).__contains__, "8, 16 or 32")
LONGER_THAN_0 = Range(lambda duration: duration.amount > 0, "longer than 0")
CHANNELS = matching(r"(\d{1,4},){2}\d{1,4}|\d{0,4}", "three channels such as '0,1,2', or one")
SIZES = matching(r"[\s,]*([1-9]\d{0,8}x[1-9]\d{0,8}([\s,]+|$))*", "a list of sizes such as '128x128 96x192'")
IDENTITIES = matching("([0-9a-f]{16}-[0-9a-f]{16})?", "empty or two identities")


def setting(default: Any, doc: str, allowed: Range | None = None, *, training: bool = False) -> Any:
    """Declare a setting: default, meaning and range. ``training``: it changes how a model learns, not what it is."""
    if allowed and allowed.choices:
        doc = f"{doc}: {', '.join(choice for choice in allowed.choices if choice)}"
    return field(default=default, metadata={"doc": doc, "allowed": allowed, "training": training})


training = partial(setting, training=True)
"""Declares a setting of a model that matters only while it is trained."""


def shown(value: object) -> str:
    """Format a value for a message, on one line of at most 200 characters."""
    try:
        return one_line(repr(str(value) if isinstance(value, Duration) else value), 200)
    except (ValueError, RecursionError):  # Python prints at most 4300 digits
        return f"a {type(value).__name__}"
