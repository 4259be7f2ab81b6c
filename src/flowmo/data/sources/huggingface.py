"""A Hugging Face dataset with a column of pictures, from the Hub or saved to disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from flowmo.data.sources.base import DataError
from flowmo.images import ImageError, read_image

PREFIX = "hf:"


class HuggingFaceSource:
    """``hf:OWNER/NAME:SPLIT``, or ``hf:FOLDER:SPLIT`` of a dataset that ``save_to_disk`` wrote; SPLIT is ``train``.

    The first column of type ``Image`` holds the pictures, the first of type ``ClassLabel`` their classes, in the order
    that the dataset gives them. A row without a label, or with −1 as ``datasets`` writes it, has no class.

    Raises:
        DataError: ``datasets`` is not installed; there is no such dataset or split; it has no pictures.
    """

    def __init__(self, spec: str):
        self.spec = spec
        name, _, split = spec.removeprefix(PREFIX).partition(":")
        try:
            import datasets
        except ImportError:
            raise DataError(f"{spec}: needs Hugging Face's library: pip install datasets") from None
        table = _load(datasets, spec, name, split or "train")
        features = table.features.items()
        column = next((key for key, kind in features if isinstance(kind, datasets.Image)), None)
        if column is None:
            raise DataError(f"{spec}: has no column of pictures, its columns are {', '.join(table.column_names)}")
        if not len(table):
            raise DataError(f"{spec}: holds no pictures")
        self.column = column
        label_column = next((key for key, kind in features if isinstance(kind, datasets.ClassLabel)), None)
        labels = table[label_column] if label_column else [None] * len(table)
        self.labels = [None if label is None or label < 0 else int(label) for label in labels]
        self.classes = tuple(table.features[label_column].names) if any(n is not None for n in self.labels) else ()
        self.left_out: dict[str, str] = {}
        # The files' bytes, so that pictures are decoded as those of every other source.
        self.table = table.cast_column(column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"{self.spec}[{index}]"

    def label(self, index: int) -> int | None:
        return self.labels[index]

    def read(self, index: int, side: int | None = None) -> Image.Image:
        stored = self.table[index][self.column]
        if stored is None or not (stored["bytes"] or stored["path"]):
            raise ImageError(f"{self.name(index)}: is empty")
        file = io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]
        return read_image(file, self.name(index), side)


def _load(datasets: Any, spec: str, name: str, split: str) -> Any:
    try:
        if not Path(name).is_dir():
            return datasets.load_dataset(name, split=split)
        loaded = datasets.load_from_disk(name)
    except Exception as error:  # whatever the library, the network or the file system raises
        raise DataError(f"{spec}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise DataError(f"{spec}: has no split {split!r}; it has {', '.join(loaded)}")
    return loaded[split]
