"""Against reward hacking: every checkpoint is measured on held-out pictures, the best is kept, and a run that only
makes its loss better ends (section 3.3: post-training is stopped early by rFID).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HIGHER_IS_BETTER = {"psnr": True, "lpips": False, "rfid": False, "cross_entropy": False}
LOSSES = ("sample_distance", "lpips", "cross_entropy")
PLOT = "guard.png"


@dataclass
class EarlyStopping:
    """Remembers the best of a run's checkpoints by one held-out figure.

    Attributes:
        metric: ``psnr``, ``lpips``, ``rfid`` or ``cross_entropy``; empty judges nothing.
        patience: checkpoints in a row without a better one that end the run; 0 never does.
        step: of the best checkpoint, ``None`` before the first.
        value: its figure.
        since: checkpoints since then.
    """

    metric: str = ""
    patience: int = 0
    step: int | None = None
    value: float | None = None
    since: int = 0

    def judge(self, step: int, value: float) -> bool:
        """Take in a checkpoint's figure; whether it is the best so far."""
        better = self.value is None or ((value > self.value) == HIGHER_IS_BETTER[self.metric] and value != self.value)
        if better:
            self.step, self.value, self.since = step, value, 0
        else:
            self.since += 1
        return better

    @property
    def exhausted(self) -> bool:
        return bool(self.patience) and self.since >= self.patience

    def facts(self) -> dict[str, Any]:
        return {"best_step": self.step, "best_value": self.value, "since_best": self.since, "best_metric": self.metric}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on with what a checkpoint remembers, unless it was judged by another figure."""
        if facts.get("best_metric") == self.metric:
            self.step, self.value, self.since = facts["best_step"], facts["best_value"], facts["since_best"]


def plot(folder: Path, metric: str) -> Path | None:
    """Draw a run's perceptual loss and its held-out figure over the images seen, where matplotlib is installed.

    Where the loss still falls and the figure turns, the run has begun to please the loss alone.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    loss = next((name for name in LOSSES if any(name in line for line in lines)), "loss")
    trained = [(line["images"], line[loss]) for line in lines if loss in line]
    held_out = [(line["images"], line[f"eval_{metric}"]) for line in lines if f"eval_{metric}" in line]
    if not held_out:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    left.plot(*zip(*trained, strict=True), color="tab:blue", label=f"training: {loss}") if trained else None
    left.set(xlabel="images", ylabel=loss)
    right = left.twinx()
    right.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label=f"held out: {metric}")
    right.set_ylabel(metric)
    best = (max if HIGHER_IS_BETTER[metric] else min)(held_out, key=lambda point: point[1])
    right.axvline(best[0], color="gray", linestyle=":", label=f"best held out, {best[1]:.4g}")
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(folder / PLOT, dpi=90)
    return folder / PLOT
