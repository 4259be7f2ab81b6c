"""What a run trains: a model, the loss of a batch, and what can be seen of it on the way.

The engine in ``flowmo.train.trainer`` knows of batches, steps, processes and checkpoints, but not images or ids;
a ``Task`` knows of those, and nothing of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from flowmo.config import Config
from flowmo.data.loader import IndexedDataset
from flowmo.distributed import World
from flowmo.errors import FlowMoError
from flowmo.losses.stages import Loss
from flowmo.train.cost import Cost
from flowmo.train.schedule import Schedule


class TrainingError(FlowMoError, RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


class Task(Protocol):
    """One stage of training.

    Attributes:
        stage: its name in checkpoints; an optimizer's state is of use to the same stage only.
        source: what it learns from, as ``flowmo.data.batches`` takes it.
        model: whose weights are trained, averaged and saved; has a ``config``.
        module: computes the loss of a part of a batch; its ``networks`` have ``blocks``, which are compiled, recomputed
            and sharded each for itself.
        norm_controlled: networks of the model, by name, whose blocks' weights keep their initial norms.
    """

    @property
    def stage(self) -> str: ...

    @property
    def source(self) -> IndexedDataset: ...

    @property
    def model(self) -> nn.Module: ...

    @property
    def module(self) -> nn.Module: ...

    @property
    def norm_controlled(self) -> Mapping[str, nn.Module]: ...

    def cost(self, fused: bool = True) -> Cost:
        """Of the stage as it is now, see ``training_cost``."""

    def advance(self, images: int, times: Schedule) -> bool:
        """Come to the step that starts at ``images``; whether other parameters learn from now on."""

    def share(self, chunks: Sequence[Tensor], first: int) -> Any:
        """What the passes over a process's ``chunks`` of a batch, the first item at place ``first``, have in common."""

    def loss(self, module: nn.Module, chunk: Tensor, place: int, shared: Any) -> Loss:
        """Of a pass, through ``module``, which may wrap the task's own."""

    def stepped(self, step: int, finite: Tensor) -> None:
        """Learn what is not learnt by gradients, after the optimizer's step; all ranks call this together.

        Args:
            step: index of the step, from 0.
            finite: 1.0, or 0.0 after a step that was skipped, on the device.
        """

    def statistics(self) -> dict[str, float]:
        """Figures for the log since the last call; all processes call this together."""

    def averaged(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """The model with other weights, for inference."""

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures of a model, ``trainer.best_metric`` among them; the main process alone calls this."""

    def show(self, model: nn.Module) -> tuple[Image.Image | None, dict[str, float]]:
        """What a model can do, as a picture and figures; the main process alone calls this."""

    def facts(self) -> dict[str, Any]:
        """What checkpoints need besides settings and weights, as plain values."""

    def check(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Raise ``TrainingError`` for a checkpoint of another model."""

    def foreign_weights(self, path: Path) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """``model`` and ``ema`` weights in a file of another form. Raises ``CheckpointError``, ``TrainingError``."""


def build_task(config: Config, world: World, report: Callable[[str], None]) -> Task:
    """The task that the settings name, with fresh weights, on the process's device."""
    if config.generator.train:
        from flowmo.train.generator import GeneratorTask

        return GeneratorTask(config, world, report)
    from flowmo.train.tokenizer import TokenizerTask

    return TokenizerTask(config, world, report)


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], path: Path, section: str) -> None:
    """Raise ``TrainingError`` where a checkpoint's model has other settings."""
    changed = [f"{section}.{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name]]
    if changed:
        raise TrainingError(
            f"{path} is of a model with other settings: {', '.join(changed)}; use another --experiment-name, "
            "or the settings it was started with"
        )


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a product of bfloat16 matrices is worth asking for: a CPU without instructions for it takes 70 times as
    long as in float32 (2 cores of an AVX2 machine).
    """
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_bfloat16(config: Config, device: torch.device) -> bool:
    """Whether a run multiplies in bfloat16: ``trainer.enable_bfloat16`` allows it, and the device can."""
    return config.trainer.enable_bfloat16 and multiplies_bfloat16(device)


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16 where ``in_bfloat16`` says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(config, device))
