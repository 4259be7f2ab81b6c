"""Base class of the errors that a user can fix."""


class FlowMoError(Exception):
    """Base of the package's errors. The message is one line that says what to do; the command line prints only that."""


def one_line(error: BaseException, length: int = 150) -> str:
    """Return the message of another library's error, or else its type, in one line of at most ``length`` characters."""
    return " ".join(str(error).split())[:length] or type(error).__name__
