"""Export a folder of tokens to formats that other tools read, one file per shard.

``webdataset`` writes tars: ``KEY.npy``, the ids tokens × sub-tokens, and ``KEY.cls``, the label as digits. KEY is the
number of the sample. ``datasets`` writes Parquet files that ``datasets.load_dataset(folder)`` opens, with the columns
``ids`` and ``label``. Without classes there are no labels. Ids are stored as int16 if they fit, else as int32 or int64.
"""

import io
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flowmo.checkpoint.files import write_whole
from flowmo.data.sources.base import DataError
from flowmo.data.tokens import TokenDataset


def export(
    dataset: TokenDataset, out: Path, kind: str, progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Write all readable samples to an empty folder, and return its files.

    Args:
        kind: a key of ``WRITERS``.
        progress: called with (shards done, shards in total).

    Raises:
        DataError: the folder is not empty, or ``datasets`` is not installed.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} is not empty. Name an empty folder.")
    name, write = WRITERS[kind]
    shards, size = dataset.metadata.shards, dataset.metadata.shard_size
    files = [out / name.format(number, shards) for number in range(shards)]
    for number, file in enumerate(files):
        first, last = (int(np.searchsorted(dataset.samples, n * size)) for n in (number, number + 1))
        write_whole(file, partial(write, dataset=dataset, items=range(first, last)))
        if progress:
            progress(number + 1, shards)
    return files


def _dtype(dataset: TokenDataset) -> str:
    bits = dataset.metadata.id_bits
    return "int16" if bits < 16 else "int32" if bits < 32 else "int64"


def _write_tar(path: str, dataset: TokenDataset, items: range) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for item in items:
            ids, label = dataset[item]
            array = io.BytesIO()
            np.save(array, ids.numpy().astype(_dtype(dataset)))
            members = {"npy": array.getvalue()} | ({"cls": str(label).encode()} if dataset.classes else {})
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{dataset.samples[item]:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _write_parquet(path: str, dataset: TokenDataset, items: range) -> None:
    try:
        import datasets
        import pyarrow.parquet
    except ImportError:
        raise DataError("Parquet files need Hugging Face's library. Run pip install datasets.") from None
    metadata = dataset.metadata
    row = datasets.Sequence(datasets.Value(_dtype(dataset)), metadata.sub_tokens)
    columns: dict[str, Any] = {"ids": [dataset.ids(item).tolist() for item in items]}
    features = {"ids": datasets.Sequence(row, metadata.tokens)}
    if dataset.classes:
        columns["label"] = dataset.labels[items.start : items.stop]
        features["label"] = datasets.ClassLabel(names=[*dataset.classes])
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features)).data.table
    pyarrow.parquet.write_table(table, path)


WRITERS: dict[str, tuple[str, Callable[..., None]]] = {
    "webdataset": ("tokens-{:05d}.tar", _write_tar),
    "datasets": ("data/train-{:05d}-of-{:05d}.parquet", _write_parquet),
}
"""Name of the files, and the function that writes one, by kind of export."""
