"""Folders of ``torch.distributed.checkpoint``: one state of named tensors, written by several processes at once.

The format's table of contents is a pickle. Here it is read with a list of the few classes that it consists of, and
refused where it names any other or holds anything but tensors, so that opening a folder cannot run code.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from flowmo.checkpoint.pth import CountingUnpickler
from flowmo.errors import FlowMoError

TABLE = ".metadata"
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


class ShardedError(FlowMoError, ValueError):
    """A folder of shards that is damaged, unsafe, or holds other tensors."""


class _Unpickler(CountingUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module.partition(".")[0] == "pathlib" and name in PATHS:
            return PurePath  # where the folder was written, which need not exist here
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Reader(FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = _Unpickler(io.BytesIO((Path(self.path) / TABLE).read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it is no table of contents")
        other = [n for n, kind in metadata.state_dict_metadata.items() if not isinstance(kind, TensorStorageMetadata)]
        if other:
            raise pickle.UnpicklingError(f"{other[0]} is no tensor")
        places = (metadata.storage_data or {}).values()
        if any(PurePath(place.relative_path).name != place.relative_path for place in places):
            raise pickle.UnpicklingError("it names files outside the folder")
        self._check_sizes(metadata)
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata

    def _check_sizes(self, metadata: Metadata) -> None:
        """A number takes a byte at least, so that no folder can ask for more memory than it takes on disk."""
        wanted = 0
        for name, kind in metadata.state_dict_metadata.items():
            if not isinstance(name, str) or not all(isinstance(n, int) and n >= 0 for n in kind.size):
                raise pickle.UnpicklingError("a tensor without a name or a size")
            wanted += math.prod(kind.size)
        if wanted > sum(file.stat().st_size for file in Path(self.path).iterdir()):
            raise pickle.UnpicklingError(f"it claims {wanted} numbers, more than the folder has")


def is_sharded(path: Path) -> bool:
    return (path / TABLE).is_file()


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, sharded ones among them, to a new folder. All processes of the run call this together.

    Raises:
        ShardedError: a process could not write its part; every process raises.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder))
        except CheckpointException as error:
            raise ShardedError(reason(error)) from None


def shapes(folder: Path) -> dict[str, torch.Size]:
    """Names and shapes of the tensors in a folder. Raises ``ShardedError``."""
    with _errors(folder):
        return {name: kind.size for name, kind in _Reader(folder).read_metadata().state_dict_metadata.items()}


def read_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors of this or another number of processes, sharded or whole, from a folder; all processes together.

    Raises:
        ShardedError: the folder lacks one of them, has it in another shape, or is damaged.
    """
    there = shapes(folder)
    for name, tensor in tensors.items():
        if there.get(name) != tensor.shape:
            found = f"{tuple(there[name])}" if name in there else "missing"
            raise ShardedError(f"{folder}: {name} is {found}, not {tuple(tensor.shape)}")
    with _errors(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(dict(tensors), storage_reader=_Reader(folder))


class _errors:  # noqa: N801
    """Turns whatever reading a damaged folder raises into one ``ShardedError``."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if isinstance(error, Exception | CheckpointException) and not isinstance(error, ShardedError):
            raise ShardedError(f"{self.folder}: damaged or unsafe checkpoint ({reason(error)})") from None


def reason(error: BaseException) -> str:
    """One line about an error, which ``torch.distributed.checkpoint`` wraps in one of its own for all processes."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:150] or type(error).__name__
