"""Interface between the trainer and what it trains.

The ``Trainer`` knows batches, steps, ranks and checkpoints. A ``Task`` knows images or ids, the model and its loss.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from flowmo.config import Config, flatten
from flowmo.data.loader import IndexedDataset
from flowmo.data.tokens import Vocabulary
from flowmo.distributed import World
from flowmo.errors import FlowMoError
from flowmo.losses.stages import Loss
from flowmo.precision import multiplies_bfloat16
from flowmo.train.schedule import Schedule

MISFITS = 3
"""Tensors that a message names."""
OWN_SETTINGS = (
    "Leave out --config, --preset and these settings to take the model's own. A new model needs another "
    "--experiment-name and no --resume-from-ckpt."
)


class TrainingError(FlowMoError, RuntimeError):
    """A run cannot start or continue."""


class Task:
    """One stage of training. A subclass sets the attributes and at least the methods without a default.

    Attributes:
        source: the training set, as ``flowmo.data.batches`` takes it.
        model: the module to train, average and save. It has a ``config``.
        module: computes the loss of a micro-batch. Its ``networks`` have ``blocks``, which are compiled, checkpointed
            and sharded one by one.
        norm_controlled: networks, by name, whose blocks keep their initial weight norms.
        samples_show_originals: True if the upper half of a sample grid are originals.
    """

    samples_show_originals = False
    source: IndexedDataset
    model: nn.Module
    module: nn.Module
    norm_controlled: Mapping[str, nn.Module]

    def __init__(self, config: Config, world: World, report: Callable[[str], None]):
        self.config, self.world, self.report = config, world, report

    def forecast_arguments(self) -> tuple[Config, bool, Vocabulary | None]:
        """Return the arguments of ``training_flops`` and ``training_memory`` that describe the current step."""
        return self.config, False, None

    # Step

    def advance(self, images: int, schedule: Schedule) -> bool:
        """Prepare the step that starts at ``images``. Return True if the set of trained parameters changes."""
        return False

    def global_batch_statistics(self, microbatches: Sequence[Tensor], first: int) -> Any:
        """Return the statistics of the global batch that its losses use. ``first``: the first item's position."""

    def loss(self, module: nn.Module, microbatch: Tensor, first: int, statistics: Any) -> Loss:
        """Compute a micro-batch's loss through ``module``, which may wrap the task's own."""
        raise NotImplementedError

    def after_step(self, step: int, finite: Tensor) -> None:
        """Update buffers that have no gradient, such as a VQ codebook, on all ranks together.

        Args:
            step: from 0.
            finite: 1.0, or 0.0 after a skipped step, on the device.
        """

    # Evaluation

    def statistics(self) -> dict[str, float]:
        """Return metrics for the log since the last call, on all ranks together."""
        return {}

    def build_ema(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Build the model with other weights, for inference."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return held-out metrics, ``trainer.best_metric`` among them. Rank 0 only."""
        raise NotImplementedError

    def sample(self, model: nn.Module) -> tuple[Image.Image | None, dict[str, float]]:
        """Return a grid of samples and metrics. Rank 0 only."""
        raise NotImplementedError

    # Checkpoints

    def source_identity(self) -> str:
        """Return a hash of the training set's items and their order."""
        raise NotImplementedError

    def metadata(self) -> dict[str, Any]:
        """Return plain values that checkpoints need besides settings and weights."""
        return {}

    def check(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Raise ``TrainingError`` if the checkpoint is of another model."""
        raise NotImplementedError

    def foreign_weights(self, path: Path) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Yield ``model`` and ``ema`` weights of a file that is no training checkpoint of ours.

        Raises:
            CheckpointError, TrainingError: the file is damaged or does not fit.
        """
        raise NotImplementedError


def check_same_settings(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    path: Path,
    section: str,
    misfits: Sequence[str] = (),
    advice: str = OWN_SETTINGS,
) -> None:
    """Raise ``TrainingError`` if a checkpoint's model has other settings, or tensors that do not fit."""
    changed = [f"{section}.{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if changed or misfits:
        settings = f" with other settings: {', '.join(changed)}" if changed else " with other tensors"
        more = f" and {len(misfits) - MISFITS} more" if len(misfits) > MISFITS else ""
        tensors = f" These tensors do not fit: {', '.join(misfits[:MISFITS])}{more}." if misfits else ""
        raise TrainingError(f"{path} is of a model{settings}.{tensors} {advice}")


def changed_settings(before: Config, now: Config, prefixes: tuple[str, ...] = ("",)) -> str:
    """List the settings of these prefixes that differ, with both values."""
    old, new = flatten(before), flatten(now)
    names = [name for name in new if name.startswith(prefixes) and old[name] != new[name]]
    return ", ".join(f"{name} {old[name]} -> {new[name]}" for name in names)


def find_misfits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Describe each tensor whose shape differs between a file and a model, or that only one of them has."""

    def shape(tensors: Mapping[str, Tensor], name: str) -> Any:
        return tuple(tensors[name].shape) if name in tensors else "missing"

    names = [name for name in {**wanted, **found} if shape(found, name) != shape(wanted, name)]
    return [f"{name} ({shape(found, name)} in the file, {shape(wanted, name)} here)" for name in names]


def in_bfloat16(config: Config, device: torch.device) -> bool:
    """Return whether a run multiplies in bfloat16: ``trainer.enable_bfloat16`` allows it and the device can."""
    return config.trainer.enable_bfloat16 and multiplies_bfloat16(device)


def lpips_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Type of LPIPS' convolutions: bfloat16 if ``opt.lpips_bfloat16`` allows it and the device can, else float32."""
    return torch.bfloat16 if config.opt.lpips_bfloat16 and multiplies_bfloat16(device) else torch.float32


def autocast(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(config, device))
