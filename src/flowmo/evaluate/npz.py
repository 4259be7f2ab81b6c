"""Pictures and statistics in the ``.npz`` files of the ADM evaluator, read and written a batch at a time.

Such a file holds ``arr_0``, uint8 pictures N × h × w × 3, ten gigabytes for 50 000 at 256 pixels, and in a reference
batch also ``mu``, ``sigma`` of the pooled and ``mu_s``, ``sigma_s`` of the spatial features. No pickles are read, and
what a header claims is bounded before anything is read: a few compressed bytes can stand for any number of zeros.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from flowmo.data import DataError

PICTURES = "arr_0"
STATISTICS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
MAX_CHANNELS = 4096
MAX_PIXELS = 1 << 24
"""Of one picture; the evaluator's have 2^16."""


class NpzError(DataError):
    """A ``.npz`` that is not one of the ADM evaluator's."""


class NpzFile:
    """One such file.

    Attributes:
        shape: N, h, w, 3 of its pictures; ``None`` where it has none.

    Raises:
        NpzError: it cannot be read, or its pictures are not uint8 N × h × w × 3.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.shape: tuple[int, int, int, int] | None = None
        with self._reading("it is no .npz file"), zipfile.ZipFile(self.path) as archive:
            self.names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
        if PICTURES in self.names:
            with self._member(PICTURES) as member:
                shape, dtype, fortran = self._header(member)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or min(shape) < 1:
                what = f"{dtype} {shape}"[:100]
                raise NpzError(f"{path}: {PICTURES} is {what}, not uint8 pictures N × height × width × 3")
            if shape[1] * shape[2] > MAX_PIXELS:
                raise NpzError(f"{path}: its pictures have {shape[1]}×{shape[2]} pixels, more than {MAX_PIXELS:,}")
            self.shape = shape

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Turns whatever ``zipfile`` and numpy raise on a damaged file into one ``NpzError``."""
        try:
            yield
        except NpzError:
            raise
        except Exception as error:  # numpy evaluates a header as Python, and raises as Python does
            raise NpzError(f"{self.path}: {what} ({' '.join(str(error).split())[:100]})") from None

    @contextmanager
    def _member(self, name: str) -> Iterator[IO[bytes]]:
        with (
            self._reading(f"{name} is damaged"),
            zipfile.ZipFile(self.path) as archive,
            archive.open(f"{name}.npy") as member,
        ):
            yield member

    @staticmethod
    def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
        version = npy.read_magic(member)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(member)
        return shape, dtype, fortran

    def batches(self, size: int) -> Iterator[Tensor]:
        """Its pictures in their order, uint8 b × 3 × h × w.

        Raises:
            NpzError: it has none, or ends before its last.
        """
        if self.shape is None:
            raise NpzError(f"{self.path}: holds no pictures ({PICTURES})")
        count, *one = self.shape
        length = math.prod(one)
        with self._member(PICTURES) as member:
            self._header(member)
            for start in range(0, count, size):
                wanted = min(size, count - start)
                data = member.read(wanted * length)
                if len(data) < wanted * length:
                    raise NpzError(f"{self.path}: ends within picture {start + len(data) // length} of {count}")
                pictures = np.frombuffer(bytearray(data), np.uint8).reshape(wanted, *one)
                yield torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()

    def statistics(self, kind: str) -> tuple[Tensor, Tensor] | None:
        """Mean and covariance of the ``pooled`` or ``spatial`` features, float64; ``None`` where it has none.

        Raises:
            NpzError: they are damaged, or do not belong together.
        """
        if not set(STATISTICS[kind]) <= self.names:
            return None
        arrays = []
        for name, dimensions in zip(STATISTICS[kind], (1, 2), strict=True):
            with self._member(name) as member:
                shape, dtype, fortran = self._header(member)
                sizes = len(shape) == dimensions and all(1 <= n <= MAX_CHANNELS for n in shape)
                if not sizes or dtype.kind != "f":
                    what = f"{dtype} {shape}"[:100]
                    raise NpzError(f"{self.path}: {name} is {what}, not a mean or covariance")
                data = member.read(math.prod(shape) * dtype.itemsize)
            if len(data) < math.prod(shape) * dtype.itemsize:
                raise NpzError(f"{self.path}: {name} ends early")
            array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
            arrays.append(torch.from_numpy(array.astype(np.float64)))
        mean, covariance = arrays
        if covariance.shape != (len(mean), len(mean)) or not (mean.isfinite().all() and covariance.isfinite().all()):
            raise NpzError(f"{self.path}: {' and '.join(STATISTICS[kind])} are no mean and its covariance")
        return mean, covariance


def write_npz(
    path: str | Path,
    batches: Iterable[Tensor],
    count: int,
    statistics: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Write ``count`` pictures, uint8 b × 3 × h × w at a time, and the statistics that ``NpzFile`` reads.

    Raises:
        NpzError: they are not ``count``, or not of one size.
    """
    shape: tuple[int, ...] | None = None
    written = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(f"{PICTURES}.npy", "w", force_zip64=True) as member:
            for batch in batches:
                pictures = batch.permute(0, 2, 3, 1).contiguous().cpu().numpy()
                if shape is None:
                    shape = pictures.shape[1:]
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                    npy.write_array_header_1_0(member, header)
                if pictures.shape[1:] != shape or pictures.dtype != np.uint8:
                    raise NpzError(f"{path}: a picture is {pictures.dtype} {pictures.shape[1:]}, the first {shape}")
                member.write(pictures.tobytes())
                written += len(pictures)
        if written != count:
            raise NpzError(f"{path}: {written} pictures were given, not {count}")
        for kind, pair in (statistics or {}).items():
            for name, array in zip(STATISTICS[kind], pair, strict=True):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    npy.write_array(member, array.double().cpu().numpy(), allow_pickle=False)
