"""Folders of ``torch.distributed.checkpoint``: a state of named tensors that several ranks write at once.

The format's table of contents is a bare pickle, which ``torch.load(weights_only=True)`` cannot read. Here it is read
with an allowlist of its few classes and refused if it holds anything but tensors, so that it cannot run code.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from flowmo.checkpoint import CheckpointError, reading_error
from flowmo.checkpoint.pth import CountingUnpickler, check_pickles
from flowmo.checkpoint.run_folder import TABLE
from flowmo.errors import one_line

ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype))),
    "collections": ("OrderedDict",),
}
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


class _Unpickler(CountingUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module.partition(".")[0] == "pathlib" and name in PATHS:
            return PurePath  # the folder's path on the machine that wrote it
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Reader(FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = _Unpickler(io.BytesIO((Path(self.path) / TABLE).read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it is not a table of contents")
        numbers = 0
        for name, kind in metadata.state_dict_metadata.items():
            if not isinstance(kind, TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{name} is not a tensor")
            if not isinstance(name, str) or not all(isinstance(n, int) and n >= 0 for n in kind.size):
                raise pickle.UnpicklingError("a tensor without a name or a size")
            numbers += math.prod(kind.size)
        # A number takes at least a byte, so a folder cannot ask for more memory than it has on disk.
        if numbers > sum(file.stat().st_size for file in Path(self.path).iterdir()):
            raise pickle.UnpicklingError(f"it claims {numbers} numbers, more than the folder has")
        files = [entry.relative_path for entry in (metadata.storage_data or {}).values()]
        if any(PurePath(file).name != file for file in files):
            raise pickle.UnpicklingError("it names files outside the folder")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            entry = self.storage_data[item.storage_index]
            with open(Path(self.path) / entry.relative_path, "rb") as file:
                file.seek(entry.offset)
                check_pickles(io.BytesIO(file.read(entry.length)))
        return super().read_data(plan, planner)


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, also sharded ones, to a new folder. All ranks call this together.

    Raises:
        CheckpointError: a rank cannot write its part; every rank raises.
    """
    with _one_error():
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder))


def shapes(folder: Path) -> dict[str, torch.Size]:
    """Return names and shapes of the tensors in a folder. Raises ``CheckpointError``."""
    with _one_error(folder):
        return {name: kind.size for name, kind in _Reader(folder).read_metadata().state_dict_metadata.items()}


def read(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read whole tensors, those whose names begin with ``prefix``, under the rest of their names."""
    tensors = {name: torch.empty(size) for name, size in shapes(folder).items() if name.startswith(prefix)}
    read_into(folder, tensors)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def read_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, sharded over any number of ranks or not, from a folder. All ranks call this together.

    Raises:
        CheckpointError: the folder lacks one of them, has it in another shape, or is damaged.
    """
    found = shapes(folder)
    for name, tensor in tensors.items():
        if found.get(name) != tensor.shape:
            stored = f"{tuple(found[name])}" if name in found else "missing"
            raise CheckpointError(f"{folder}: {name} is {stored}, not {tuple(tensor.shape)}.")
    with _one_error(folder):
        dcp.load(dict(tensors), storage_reader=_Reader(folder))


@contextmanager
def _one_error(damaged: Path | None = None) -> Iterator[None]:
    """Turn any error into a ``CheckpointError``, one about the ``damaged`` folder if given."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # with a single process
            yield
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:
        inner = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if damaged:
            raise reading_error(damaged, inner, "damaged or unsafe") from None
        raise CheckpointError(one_line(inner)) from None
