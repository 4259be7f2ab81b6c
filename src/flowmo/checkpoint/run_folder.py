"""What a training run's folder looks like to those who only read it."""

from __future__ import annotations

from pathlib import Path

from flowmo.checkpoint import distributed as sharded

CHECKPOINTS = "checkpoints"
SETTINGS = "config.json"
ENDED = "ended"
"""File that a run leaves when it has come to its end, and removes when it goes on."""


BEST = "best"
"""File that names the step of the checkpoint that ``trainer.best_metric`` judged best so far."""


def listing(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; never one that is still being written."""
    return sorted(
        (p for p in folder.glob("[0-9]*") if p.suffix == ".pth" or sharded.is_sharded(p)), key=lambda p: p.stem
    )


def has_ended(run: Path) -> bool:
    return (run / ENDED).is_file()


def chosen(run: Path) -> Path | None:
    """The checkpoint that stands for a run: the one judged best, or the newest; ``None`` while it has none."""
    checkpoints = listing(run / CHECKPOINTS)
    best = (run / BEST).read_text().strip() if (run / BEST).is_file() else None
    return next((path for path in checkpoints if path.stem == best), checkpoints[-1] if checkpoints else None)
