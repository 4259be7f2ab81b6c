"""The ADM evaluator's ``.npz`` files, read and written one batch at a time.

``arr_0`` holds uint8 images N × h × w × 3: ten gigabytes for 50 000 of 256 pixels. Reference files also hold the
statistics ``mu``, ``sigma`` of the pooled and ``mu_s``, ``sigma_s`` of the spatial features. ``numpy.load`` would read
whole arrays, and allocate what a hostile header claims. Here sizes are checked first, and pickles are never read.
"""

import math
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from flowmo.data import DataError
from flowmo.errors import one_line

IMAGES = "arr_0"
STATISTICS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
MAX_CHANNELS = 4096
MAX_PIXELS = 1 << 24
"""Per image; the evaluator's have 2^16."""


class NpzFile:
    """An ``.npz`` file as an image set; it is open only while it is read.

    Attributes:
        names: of its arrays.
        shape: (N, h, w, 3) of its images; N is 0 if it has none.

    Raises:
        DataError: the file cannot be read, or its images are not uint8 N × h × w × 3.
    """

    def __init__(self, path: str | Path):
        self.path, self.name = Path(path), str(path)
        self.shape: tuple[int, ...] = (0, 0, 0, 3)
        try:
            with zipfile.ZipFile(self.path) as archive:
                self.names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
        except Exception as error:  # zipfile raises anything on a damaged file
            raise self._error(f"it is not an .npz file ({one_line(error, 100)})") from None
        if IMAGES in self.names:
            with self._array(IMAGES) as (_, shape, dtype, fortran):
                if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or min(shape) < 1:
                    raise self._error(
                        f"{IMAGES} is {f'{dtype} {shape}'[:100]}, not uint8 images N × height × width × 3"
                    )
            if shape[1] * shape[2] > MAX_PIXELS:
                raise self._error(f"its images have {shape[1]}×{shape[2]} pixels, more than {MAX_PIXELS:,}")
            self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def _error(self, reason: str) -> DataError:
        return DataError(f"{self.path}: {reason}.")

    @contextmanager
    def _array(self, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype, bool]]:
        """Open an array behind its header: the data, shape, dtype and whether it is in Fortran order."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as data:
                if npy.read_magic(data) != (1, 0):  # later versions allow a header of gigabytes
                    raise ValueError("its header is not of version 1.0")
                shape, fortran, dtype = npy.read_array_header_1_0(data)
                yield data, shape, dtype, fortran
        except DataError:
            raise
        except Exception as error:  # NumPy evaluates a header as Python, and raises as Python does
            raise self._error(f"{name} is damaged ({one_line(error, 100)})") from None

    def batches(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Yield (number, images uint8 b × 3 × h × w) of every ``ranks``-th batch, from the one of ``rank`` on.

        Raises:
            DataError: there are no images, or the file ends.
        """
        if not len(self):
            raise self._error(f"it holds no images ({IMAGES})")
        count, *image = self.shape
        length = math.prod(image)
        with self._array(IMAGES) as (data, *_):
            for start in range(0, count, size):
                wanted = min(size, count - start)
                content = data.read(wanted * length)
                if len(content) < wanted * length:
                    raise self._error(f"it ends within image {start + len(content) // length} of {count}")
                if start // size % ranks == rank:
                    batch = np.frombuffer(bytearray(content), np.uint8).reshape(wanted, *image)
                    yield start // size, torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()

    def statistics(self, kind: str) -> tuple[Tensor, Tensor] | None:
        """Read mean and covariance, float64, of the ``pooled`` or ``spatial`` features; ``None`` if there are none.

        Raises:
            DataError: they are damaged, or do not belong together.
        """
        if not set(STATISTICS[kind]) <= self.names:
            return None
        arrays = []
        for name, dimensions in zip(STATISTICS[kind], (1, 2), strict=True):
            with self._array(name) as (data, shape, dtype, fortran):
                if len(shape) != dimensions or not all(1 <= n <= MAX_CHANNELS for n in shape) or dtype.kind != "f":
                    raise self._error(f"{name} is {f'{dtype} {shape}'[:100]}, not a mean or covariance")
                content = np.frombuffer(data.read(math.prod(shape) * dtype.itemsize), dtype)
                values = content.reshape(shape, order="F" if fortran else "C").astype(np.float64)
                arrays.append(torch.from_numpy(values))
        mean, covariance = arrays
        if covariance.shape != (len(mean), len(mean)) or not (mean.isfinite().all() and covariance.isfinite().all()):
            raise self._error(f"{' and '.join(STATISTICS[kind])} are not a mean and its covariance")
        return mean, covariance


def write_npz(path: str | Path, batches: Iterable[Tensor], count: int) -> None:
    """Write ``count`` images, in batches uint8 b × 3 × h × w.

    Raises:
        DataError: the images are not ``count``, or not of one size.
    """
    shape: tuple[int, ...] | None = None
    written = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as member:
            for batch in batches:
                images = batch.permute(0, 2, 3, 1).contiguous().cpu().numpy()
                if shape is None:
                    shape = images.shape[1:]
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                    npy.write_array_header_1_0(member, header)
                if images.shape[1:] != shape or images.dtype != np.uint8:
                    raise DataError(f"{path}: an image is {images.dtype} {images.shape[1:]}, the first {shape}.")
                member.write(images.tobytes())
                written += len(images)
        if written != count:
            raise DataError(f"{path}: {written} images were given, not {count}.")
