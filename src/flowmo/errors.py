"""Base class of the errors that a user can fix."""


class FlowMoError(Exception):
    """Base of the package's errors. The message is one line that says what to do; the command line prints only that."""


def one_line(value: object, length: int = 150) -> str:
    """Return a text, or another library's error (its type if it says nothing), in one line of ``length`` characters."""
    return " ".join(str(value).split())[:length] or type(value).__name__
