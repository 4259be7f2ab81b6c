"""Early stopping by a held-out metric (appendix A.2). A falling loss alone does not make better images."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HIGHER_IS_BETTER = {"psnr": True, "lpips": False, "rfid": False, "cross_entropy": False}


@dataclass
class EarlyStopping:
    """Best checkpoint of a run by one held-out metric.

    Attributes:
        metric: key of ``HIGHER_IS_BETTER``; empty switches early stopping off.
        patience: end the run after this many checkpoints without improvement; 0 never ends it.
        step: step of the best checkpoint, ``None`` before the first.
        value: metric of the best checkpoint.
        since: checkpoints since the best one.
    """

    metric: str = ""
    patience: int = 0
    step: int | None = None
    value: float | None = None
    since: int = 0

    def update(self, step: int, value: float) -> bool:
        """Record a checkpoint's metric. Return True if it is the best so far."""
        sign = 1 if HIGHER_IS_BETTER[self.metric] else -1
        if self.value is None or math.isnan(self.value) or sign * value > sign * self.value:
            self.step, self.value, self.since = step, value, 0
            return True
        self.since += 1
        return False

    @property
    def exhausted(self) -> bool:
        return bool(self.patience) and self.since >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best_step": self.step, "best_value": self.value, "since_best": self.since, "best_metric": self.metric}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a checkpoint's state if it was of the same metric."""
        if state.get("best_metric") == self.metric:
            self.step, self.value, self.since = state["best_step"], state["best_value"], state["since_best"]
