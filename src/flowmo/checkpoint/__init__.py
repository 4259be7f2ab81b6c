"""Files of weights: ours, sharded ones, the authors', the Hub's."""

from __future__ import annotations

from flowmo.errors import FlowMoError


class CheckpointError(FlowMoError, ValueError):
    """A file of weights that is missing, damaged, unsafe or of another architecture, or cannot be written."""


class CheckpointReadError(CheckpointError):
    """The system could not read a file, which may be sound: an error of the disk or network, or too little memory."""
