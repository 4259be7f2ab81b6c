"""What a training run's folder looks like to those who only read it."""

from __future__ import annotations

from pathlib import Path

from flowmo import sharded

CHECKPOINTS = "checkpoints"
SETTINGS = "config.json"
ENDED = "ended"
"""File that a run leaves when it has come to its end, and removes when it goes on."""


def listing(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; never one that is still being written."""
    return sorted(
        (p for p in folder.glob("[0-9]*") if p.suffix == ".pth" or sharded.is_sharded(p)), key=lambda p: p.stem
    )


def has_ended(run: Path) -> bool:
    return (run / ENDED).is_file()
