"""A run's state on disk, whole or not at all: one ``.pth`` file, or a folder of shards where FSDP2 shards the run.

Both hold the same tensors by the same names and either resumes either, on any number of processes. No state of a
random generator is among them: every random number of a run follows from its seed and the place of a picture.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from flowmo.checkpoint import distributed as sharded
from flowmo.checkpoint import files as checkpoint
from flowmo.checkpoint.run_folder import listing
from flowmo.distributed import World
from flowmo.errors import FlowMoError
from flowmo.train.ema import EMA
from flowmo.train.optimizer import NormControl

FORMAT = 2
FACTS = "run.json"
PARTS = ("model", "ema", "optimizer", "norms")


class StateError(FlowMoError, RuntimeError):
    """A state that could not be written, or read back; the message says what is sound."""


@dataclass(frozen=True)
class State:
    """Every tensor of a run, by reference: reading a checkpoint into it changes the run."""

    model: nn.Module
    average: EMA
    optimizer: torch.optim.Optimizer
    norms: NormControl

    def tensors(self) -> dict[str, Tensor]:
        """Flat, named ``model.…``, ``ema.…``, ``optimizer.….exp_avg`` and ``norms.…``."""
        optimizer = {
            f"optimizer.{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        return {
            **{f"model.{name}": value.detach() for name, value in self.model.state_dict().items()},
            **{f"ema.{name}": value for name, value in self.average.state.items()},
            **optimizer,
            **{f"norms.{name}": value for name, value in self.norms.state.items()},
        }


def tidy(folder: Path) -> None:
    """Remove what a killed run left half-written, and half-removed."""
    for path in folder.glob(".*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def save(folder: Path, step: int, state: State, facts: Mapping[str, Any], world: World) -> Path:
    """Write a checkpoint and return its path; all processes call this together.

    Raises:
        StateError: it could not be written. Nothing of it is left, and the older ones are as they were.
    """
    tensors = state.tensors()
    try:
        if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            return _save_shards(folder / f"{step:08d}", tensors, facts, world)
        path = folder / f"{step:08d}.pth"
        if world.main:
            content = {"flowmo": FORMAT, **facts, **nest(tensors)}
            checkpoint.write_whole(path, lambda temporary: _write(content, temporary))
        return path
    except (OSError, RuntimeError, sharded.ShardedError) as error:
        if world.main:
            tidy(folder)
        reason = " ".join(str(error).split())[:200]
        good = listing(folder)
        kept = f"{good[-1]} is sound" if good else "there is none yet"
        raise StateError(f"checkpoint of step {step} could not be written to {folder} ({reason}); {kept}") from None


def _write(content: dict, path: str) -> None:
    with open(path, "wb") as file:  # through Python's file: its errors say what is wrong, such as a full disk
        watched = _Watched(file)
        try:
            torch.save(content, watched)
        except RuntimeError:
            if watched.error is not None:  # torch's own, which follows, counts bytes
                raise watched.error from None
            raise


class _Watched:
    """A file to write to, which remembers what went wrong first."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.error: OSError | None = None
        self.flush = file.flush

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def _save_shards(path: Path, tensors: dict[str, Tensor], facts: Mapping[str, Any], world: World) -> Path:
    temporary = path.with_name(f".{path.name}.partial")
    if world.main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    sharded.write(temporary, tensors)
    if world.main:
        (temporary / FACTS).write_text(json.dumps({"flowmo": FORMAT, **facts}))
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        checkpoint.flush_folder(path.parent)
    world.barrier()
    return path


def remove(path: Path) -> None:
    """Delete a checkpoint so that a kill on the way leaves no half of one under its name."""
    if path.is_dir():
        gone = path.with_name(f".{path.name}.removed")
        os.replace(path, gone)
        shutil.rmtree(gone)
    else:
        path.unlink()


def read_metadata(path: Path) -> dict[str, Any]:
    """What a checkpoint tells besides tensors: ``config``, ``step``, ``images``, ….

    Raises:
        CheckpointError, StateError: damaged, or not a training checkpoint.
    """
    if path.is_dir():
        try:
            facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise StateError(f"{path}: damaged or not a training checkpoint ({error})") from None
    else:
        facts = {name: value for name, value in checkpoint.read_pth(path).items() if name not in PARTS}
    wrong = _wrong_fact(facts)
    if wrong:
        raise StateError(f"{path}: damaged or not a training checkpoint ({wrong} is missing or no such thing)")
    return facts


def _wrong_fact(facts: Any) -> str | None:
    """What a checkpoint of ours should tell and does not, if anything; others' may tell what they like."""
    if not isinstance(facts, dict):
        return "its table"
    if facts.get("flowmo") != FORMAT:
        return None
    for name, kind in (("config", dict), ("stage", str), ("step", int), ("images", int), ("skipped", int)):
        if not isinstance(facts.get(name), kind) or (kind is int and facts[name] < 0):
            return name
    return None


def restore(path: Path, state: State, optimizer: bool = True) -> None:
    """Read every tensor of a checkpoint, or all but the optimizer's, into a run; all processes call this together.

    Raises:
        CheckpointError, ShardedError, StateError: damaged, or of another architecture. The run may be half restored.
    """
    targets = {name: t for name, t in state.tensors().items() if optimizer or not name.startswith("optimizer.")}
    if path.is_dir():
        sharded.read_into(path, targets)
        return
    content = checkpoint.read_pth(path)
    parts = {part: content.get(part, {}) for part in PARTS}
    wrong = next((part for part, values in parts.items() if not isinstance(values, dict)), None)
    if wrong:
        raise StateError(f"{path}: damaged, its {wrong} has no names")
    found = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    lacking = next((name for name in targets if name not in found), None)
    if lacking:
        raise StateError(f"{path}: has no {lacking}; it is of another model or version")
    fill(path, targets, {name: found[name] for name in targets})


def fill(path: Path, targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, from file ``path``, into those of a run by the same names, sharded or not."""
    for name, value in values.items():
        target = targets.get(name)
        if not isinstance(value, Tensor):
            raise StateError(f"{path}: {name} is no tensor")
        if target is None or target.shape != value.shape:
            there = "no such tensor" if target is None else f"not {tuple(target.shape)}"
            raise StateError(f"{path}: {name} is {tuple(value.shape)}, here {there}; it is of another model")
        value = value.to(target.device, target.dtype)
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements)
        target.copy_(value)


def nest(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    return parts
