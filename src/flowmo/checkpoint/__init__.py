"""Files of weights: ours, sharded ones, the authors', the Hub's."""

from __future__ import annotations

import errno
from pathlib import Path

from flowmo.errors import FlowMoError, one_line

OF_SYSTEM = {
    *(errno.EIO, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EBUSY),
    *(errno.ESTALE, errno.ENOTCONN, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH),
}
"""Errors of disk, network, permissions or memory. A damaged file gives others, such as EINVAL."""


class CheckpointError(FlowMoError, ValueError):
    """A file of weights that is missing, damaged, unsafe or of another architecture, or cannot be written."""


class CheckpointReadError(CheckpointError):
    """The system could not read a file, which may be sound: an error of the disk or network, or too little memory."""


def reading_error(path: str | Path, error: BaseException, problem: str) -> CheckpointError:
    """Turn an error of reading weights into ours. ``problem`` completes "PATH is" if the file itself is to blame."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in OF_SYSTEM):
        return CheckpointReadError(f"{path} cannot be read ({one_line(error)}).")
    return CheckpointError(f"{path} is {problem} ({one_line(error, 200)}).")
