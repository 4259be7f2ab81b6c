"""Files of weights: ours, sharded ones, the authors', the Hub's."""

from __future__ import annotations

from pathlib import Path

from flowmo.errors import FlowMoError, one_line


class CheckpointError(FlowMoError, ValueError):
    """A file of weights that is missing, damaged, unsafe or of another architecture, or cannot be written."""


class CheckpointReadError(CheckpointError):
    """The system could not read a file, which may be sound: an error of the disk or network, or too little memory."""


def reading_error(path: str | Path, error: BaseException, problem: str) -> CheckpointError:
    """Turn an error of reading weights into ours. ``problem`` completes "PATH is" if the file itself is to blame.

    A file that is missing in a checkpoint's folder makes the checkpoint damaged, not unreadable.
    """
    of_system = isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError)
    if of_system or isinstance(error, MemoryError):
        return CheckpointReadError(f"{path} cannot be read ({one_line(error)}).")
    return CheckpointError(f"{path} is {problem} ({one_line(error, 200)}).")
