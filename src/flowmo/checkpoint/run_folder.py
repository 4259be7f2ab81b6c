"""Layout of a training run's folder."""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
SETTINGS = "config.json"
METADATA = "run.json"
"""File of a sharded checkpoint's metadata."""
ENDED = "ended"
"""File that exists once a run has reached its end, until it is resumed."""
BEST = "best"
"""File with the step of the best checkpoint by ``trainer.best_metric``."""
TABLE = ".metadata"
"""File that only a sharded checkpoint has."""


def is_sharded(path: Path) -> bool:
    return (path / TABLE).is_file()


def listing(folder: Path) -> list[Path]:
    """List the complete checkpoints in a folder, oldest first. Files of other names, such as copies, are not listed."""
    found = (path for path in folder.glob("[0-9]*") if re.fullmatch(r"\d+(\.pth)?", path.name))
    return sorted((p for p in found if p.suffix or is_sharded(p)), key=lambda p: int(p.stem))


def has_ended(run: Path) -> bool:
    return (run / ENDED).is_file()


def best_checkpoint(run: Path) -> Path | None:
    """Return the best checkpoint of a run, the newest if none is marked as best, or ``None``."""
    checkpoints = listing(run / CHECKPOINTS)
    best = (run / BEST).read_text(errors="replace").strip() if (run / BEST).is_file() else None
    return next((path for path in checkpoints if path.stem == best), checkpoints[-1] if checkpoints else None)
