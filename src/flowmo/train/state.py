"""Checkpoints of a run, written atomically: one ``.pth`` file, or a folder of shards under FSDP2.

Both hold the same named tensors, and either resumes on any number of ranks. There is no random-generator state,
because every random number follows from the seed and a position in the run.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from flowmo.checkpoint import CheckpointError
from flowmo.checkpoint import distributed as sharded
from flowmo.checkpoint import files as checkpoint
from flowmo.checkpoint.pth import read_pth
from flowmo.checkpoint.run_folder import METADATA, listing
from flowmo.distributed import World
from flowmo.errors import one_line
from flowmo.train.task import TrainingError

FORMAT = 2
PARTS = ("model", "ema", "optimizer", "norms")
REQUIRED = {"config": dict, "stage": str, "step": int, "images": int, "skipped": int}


class FolderLock:
    """Keeps other processes out of a run's folder for as long as this object lives.

    A POSIX record lock works over NFS, and forked data workers, which can outlive a killed run, do not inherit it.
    """

    _descriptor = -1  # until the file is open

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise TrainingError(f"{folder}: another run is writing there. End it, or use another name.") from None
            # some file systems have no locks; a run works without

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # os may be gone when the interpreter exits
        if self._descriptor >= 0:
            close(self._descriptor)


def tidy(folder: Path) -> None:
    """Remove the incomplete files and folders that a killed run left.

    NFS keeps a deleted file that another process reads as ``.nfs…``, which cannot be removed until then.
    """
    for path in folder.glob(".*"):
        if not path.name.startswith(".nfs"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def save(folder: Path, step: int, tensors: dict[str, Tensor], metadata: Mapping[str, Any], world: World) -> Path:
    """Write a run's tensors as a checkpoint, on all ranks together, and return its path.

    Raises:
        CheckpointError: it cannot be written. Nothing of it is left, and older checkpoints are intact.
    """
    content = {"flowmo": FORMAT, **metadata}
    try:
        if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            return _save_shards(folder / f"{step:08d}", tensors, content, world)
        path = folder / f"{step:08d}.pth"
        if world.main:
            parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
            for name, value in tensors.items():
                part, _, rest = name.partition(".")
                parts[part][rest] = value
            checkpoint.write_whole(path, lambda temporary: _write({**content, **parts}, temporary))
        return path
    except (OSError, RuntimeError, CheckpointError) as error:
        if world.main:
            tidy(folder)
        good = listing(folder)
        kept = f"{good[-1]} is sound" if good else "There is none yet"
        raise CheckpointError(
            f"The checkpoint of step {step} could not be written to {folder} ({one_line(error, 200)}). {kept}."
        ) from None


def _write(content: dict, path: str) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch raises its own after the file's, without the reason
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def _save_shards(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, Any], world: World) -> Path:
    temporary = path.with_name(f".{path.name}.partial")
    if world.main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    sharded.write(temporary, tensors)
    if world.main:
        checkpoint.write_content(temporary / METADATA, json.dumps(metadata))
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        checkpoint.flush_folder(path.parent)
    world.barrier()
    return path


def remove(path: Path) -> None:
    """Delete a checkpoint. A kill meanwhile leaves no incomplete checkpoint under its name."""
    if path.is_dir():
        renamed = path.with_name(f".{path.name}.removed")
        os.replace(path, renamed)
        shutil.rmtree(renamed)
    else:
        path.unlink()


def read_metadata(path: Path) -> dict[str, Any]:
    """Return a checkpoint's metadata: ``config``, ``step``, ``images``, ….

    Raises:
        CheckpointError: it is damaged, or not a training checkpoint.
    """
    metadata = {name: value for name, value in checkpoint.read_raw_metadata(path).items() if name not in PARTS}
    for name, kind in REQUIRED.items() if metadata.get("flowmo") == FORMAT else ():
        value = metadata.get(name)
        if not isinstance(value, kind) or (isinstance(value, int) and value < 0):
            raise CheckpointError(f"{path} is damaged or not a training checkpoint ({name} is missing or invalid).")
    return metadata


def restore(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Read a checkpoint into a run's tensors, on all ranks together.

    Raises:
        CheckpointError: it is damaged, or of another model. The run may be half restored.
    """
    if path.is_dir():
        sharded.read_into(path, targets)
        return
    content = read_pth(path)
    parts = {part: content[part] for part in PARTS if isinstance(content.get(part), dict)}
    found = {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}
    fill(path, targets, {name: found.get(name) for name in targets})


def fill(path: Path, targets: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Copy full tensors from file ``path`` into a run's tensors of the same names, sharded or not.

    Raises:
        CheckpointError: a value is not a tensor, or the run has none of its name and shape.
    """
    for name, value in values.items():
        target = targets.get(name)
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path} has no tensor {name}. It is damaged, or of another model or version.")
        if target is None or target.shape != value.shape:
            there = "no such tensor" if target is None else f"not {tuple(target.shape)}"
            raise CheckpointError(f"{path}: {name} is {tuple(value.shape)}, here {there}. It is of another model.")
        value = value.to(target.device, target.dtype)
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements)
        target.copy_(value)
