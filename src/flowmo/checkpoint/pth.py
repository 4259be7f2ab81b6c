"""PyTorch's pickled files, read without running code: tensors and plain values, or nothing."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from flowmo.errors import FlowMoError

MAX_DEPTH = 16
MAX_LEAVES = 1_000_000
LEGACY_PICKLES = 5
"""One after another at the start of a file of ``torch.save`` before version 1.6."""


class PthError(FlowMoError, ValueError):
    """A file that is damaged, unsafe or no mapping of names to tensors and values; the message is one line."""


class CountingUnpickler(pickle._Unpickler):
    """Refuses tuples of many leaves. A tuple of twice the same tuple of twice the same … has 2^n of them in a few
    bytes, and hashing it visits them all.

    It is Python's own in Python: that in C allocates as much memory as a pickle names as the place of a value.
    """

    stack: list[Any]

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.leaves: dict[int, int] = {}
        self.kept: list[tuple] = []  # so that no two have the same id

    def count(self, made: tuple) -> None:
        self.kept.append(made)
        self.leaves[id(made)] = total = sum(self.leaves.get(id(part), 1) for part in made)
        if total > MAX_LEAVES:
            raise pickle.UnpicklingError("it holds a tuple of millions of values")


def _counted(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(self: CountingUnpickler) -> None:
        load(self)
        self.count(self.stack[-1])

    return run


def _refused(_: Any) -> None:
    raise pickle.UnpicklingError("it holds a bytearray")


CountingUnpickler.dispatch = {
    **pickle._Unpickler.dispatch,
    pickle.BYTEARRAY8[0]: _refused,  # made as long as it claims before a byte is read; torch.save writes none
    **{
        code[0]: _counted(pickle._Unpickler.dispatch[code[0]])
        for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
    },
}


class _Inert:
    """Stands for every class and function that a pickle names."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    extend = append


class _Rehearsal(CountingUnpickler):
    """Goes through a pickle and makes nothing of it."""

    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, name: Any) -> Any:
        return None


def read_pth(path: str | Path) -> dict[str, Any]:
    """The content of a file that ``torch.save`` wrote, mapped rather than loaded where its form allows that.

    Raises:
        PthError: damaged; something other than tensors and plain values in it, which could run code when loaded; or a
            tensor that claims more than the file holds.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        _rehearse(path, zipped)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise PthError(
            f"{path}: refused, it is damaged or holds something other than tensors and plain values, "
            "which could run code when loaded"
        ) from None
    except Exception as error:  # reading a damaged pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PthError(f"{path}: damaged or not a PyTorch checkpoint ({reason[:150]})") from None
    if not isinstance(content, dict):
        raise PthError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    _check(content, path, MAX_DEPTH, set())
    return content


def _rehearse(path: str | Path, zipped: bool) -> None:
    if not zipped:
        with open(path, "rb") as file:
            for _ in range(LEGACY_PICKLES):
                _Rehearsal(file).load()
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith("data.pkl"):
                if entry.compress_type != zipfile.ZIP_STORED:  # a few bytes could stand for any number
                    raise ValueError("its table of contents is compressed")
                with archive.open(entry) as file:
                    _Rehearsal(file).load()


def _check(value: object, path: str | Path, depth: int, seen: set[int]) -> None:
    """Refuse tensors that are not laid out densely on a CPU: strides of 0 make a terabyte of a byte."""
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise PthError(f"{path}: holds a tensor that is not dense")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise PthError(f"{path}: holds a tensor of {tuple(value.shape)} numbers, more than the file has")
    elif isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str | bytes)):
        if depth == 0:
            raise PthError(f"{path}: is nested too deeply")
        seen.add(id(value))
        for inner in value.values() if isinstance(value, Mapping) else value:
            _check(inner, path, depth - 1, seen)
