"""A Hugging Face dataset with a column of images, from the Hub or saved to disk."""

import io
from pathlib import Path
from typing import Any

from flowmo.data.sources.base import DataError, Source
from flowmo.errors import one_line
from flowmo.images import ImageError


class HuggingFaceSource(Source):
    """``hf:OWNER/NAME:SPLIT``, or ``hf:FOLDER:SPLIT`` for a dataset written by ``save_to_disk``. SPLIT is ``train``.

    Images come from the first column of type ``Image``, classes from the first of type ``ClassLabel``, in the order of
    the dataset. A row without a label, or with label −1, has no class.

    Raises:
        DataError: ``datasets`` is not installed, or there is no such dataset, split or column, or it is empty.
    """

    def __init__(self, spec: str):
        self.spec = spec
        name, _, split = spec.removeprefix("hf:").partition(":")
        try:
            import datasets
        except ImportError:
            raise DataError(f"{spec}: needs Hugging Face's library. Run pip install datasets.") from None
        table = _load(datasets, spec, name, split)

        def first_column(kind: type) -> str | None:
            return next((name for name, feature in table.features.items() if isinstance(feature, kind)), None)

        self.column, label_column = first_column(datasets.Image), first_column(datasets.ClassLabel)
        if self.column is None:
            raise DataError(f"{spec}: has no column of images. Its columns are {', '.join(table.column_names)}.")
        if not len(table):
            raise DataError(f"{spec}: contains no images.")
        self.fingerprint = table._fingerprint  # the library's, which a copy keeps
        labels = table[label_column] if label_column else [None] * len(table)
        self.labels = [None if label is None or label < 0 else int(label) for label in labels]
        self.classes = tuple(table.features[label_column].names) if any(n is not None for n in self.labels) else ()
        # Keep the encoded bytes, so that images are decoded as from every other source, and read no other column.
        self.table = table.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))

    def name(self, index: int) -> str:
        return f"{self.spec}[{index}]"

    def key(self, index: int) -> str:
        return f"{self.fingerprint}[{index}]"

    def file(self, index: int) -> Path | io.BytesIO:
        stored = self.table[index][self.column]
        if stored is None or not (stored["bytes"] or stored["path"]):
            raise ImageError(f"{self.name(index)}: is empty.")
        return io.BytesIO(stored["bytes"]) if stored["bytes"] else Path(stored["path"])


def _load(datasets: Any, spec: str, name: str, split: str) -> Any:
    try:
        if not Path(name).is_dir():
            return datasets.load_dataset(name, split=split or "train")
        loaded = datasets.load_from_disk(name)
    except Exception as error:  # the library, the network and the file system raise anything
        raise DataError(f"{spec}: cannot be loaded ({one_line(error, 200)}).") from None
    if isinstance(loaded, datasets.Dataset):
        if split and split != str(loaded.split or "train"):
            raise DataError(f"{spec}: the folder holds one dataset without splits. Write hf:{name}.")
        return loaded
    split = split or "train"
    if split not in loaded:
        raise DataError(f"{spec}: has no split {split!r}. It has {', '.join(loaded)}.")
    return loaded[split]
