"""Pickled files of tensors, read with ``torch.load(weights_only=True)``, which refuses code.

``weights_only`` lacks a bound on cost: a few bytes can name a dict key of 2^60 leaves, which it would hash for years,
or a tensor with stride 0 that claims terabytes. So each pickle first runs through an inert unpickler that counts
leaves, and each tensor is checked against its storage.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from flowmo.checkpoint import CheckpointError, reading_error

MAX_DEPTH = 16
MAX_LEAVES = 1_000_000
LEGACY_PICKLES = 5
"""Number of pickles at the start of a file that ``torch.save`` wrote before version 1.6."""


class CountingUnpickler(pickle._Unpickler):
    """Refuse tuples of many leaves: a tuple of twice the same tuple of twice the same … has 2^n leaves in n bytes.

    It is Python's own unpickler in Python, because the one in C allocates whatever size a pickle claims.
    """

    stack: list[Any]

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.leaves: dict[int, tuple[int, tuple]] = {}  # by id, which is unique as long as the tuple is kept

    def count(self, made: tuple) -> None:
        total = sum(self.leaves.get(id(part), (1,))[0] for part in made)
        if total > MAX_LEAVES:
            raise pickle.UnpicklingError("it holds a tuple of millions of values")
        self.leaves[id(made)] = total, made


def _counted(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(self: CountingUnpickler) -> None:
        load(self)
        self.count(self.stack[-1])

    return run


def _refused(_: Any) -> None:
    raise pickle.UnpicklingError("it holds a bytearray")


CountingUnpickler.dispatch = {
    **pickle._Unpickler.dispatch,
    pickle.BYTEARRAY8[0]: _refused,  # allocates its claimed size at once; torch.save writes none
    **{
        code[0]: _counted(pickle._Unpickler.dispatch[code[0]])
        for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
    },
}


class _Inert:
    """Replaces every class and function that a pickle names."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def ignore(self, *_: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = ignore


class _InertUnpickler(CountingUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, name: Any) -> Any:
        return None


def read_pth(path: str | Path) -> dict[str, Any]:
    """Read a file of ``torch.save``, memory-mapped if its format allows.

    Raises:
        CheckpointReadError: the system cannot read it.
        CheckpointError: it is damaged, holds more than tensors and plain values, or a tensor larger than the file.
    """
    try:
        with open(path, "rb") as file:
            zipped = check_pickles(file)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is refused: it is damaged or holds something other than tensors and plain values, "
            "which could run code when loaded."
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise reading_error(path, error, "damaged or not a PyTorch checkpoint") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint.")
    _check_tensors(content, path, MAX_DEPTH, set())
    return content


def check_pickles(file: IO[bytes]) -> bool:
    """Refuse a file of ``torch.save`` whose pickles would take for ever to read. Returns whether it is a zip file."""
    zipped = zipfile.is_zipfile(file)
    file.seek(0)
    if not zipped:
        for _ in range(LEGACY_PICKLES):
            _InertUnpickler(file).load()
        return False
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.filename.lower().endswith("data.pkl"):  # PyTorch ignores the case, too
                if entry.compress_type != zipfile.ZIP_STORED:  # a small file could expand without bound
                    raise ValueError("its table of contents is compressed")
                with archive.open(entry) as table:
                    _InertUnpickler(table).load()
    return True


def _check_tensors(value: object, path: str | Path, depth: int, seen: set[int]) -> None:
    """Refuse tensors that are not dense on the CPU or larger than their storage."""
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(f"{path} holds a tensor that is not dense.")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path} holds a tensor of {tuple(value.shape)} numbers, more than the file has.")
    elif isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str | bytes)):
        if depth == 0:
            raise CheckpointError(f"{path} is nested too deeply.")
        seen.add(id(value))
        for inner in value.values() if isinstance(value, Mapping) else value:
            _check_tensors(inner, path, depth - 1, seen)
