"""Base class of the errors that a user can fix."""

from collections.abc import Sequence


class FlowMoError(Exception):
    """Base of the package's errors. The message is one line that says what to do; the command line prints only that."""


class SmallImageError(FlowMoError, ValueError):
    """Images are smaller than a metric's window or a network's receptive field."""


def check_side(name: str, shape: Sequence[int], least: int) -> None:
    """Raise ``SmallImageError`` if images … × h × w have a side below ``least`` pixels."""
    if min(shape[-2:]) < least:
        raise SmallImageError(f"{name} needs at least {least} pixels a side. These images are {shape[-1]}×{shape[-2]}.")


def one_line(value: object, length: int = 150) -> str:
    """Return a text, or another library's error (its type if it says nothing), in one line of ``length`` characters."""
    return " ".join(str(value).split())[:length] or type(value).__name__
