"""Ids of many images as a PyTorch dataset. Stage 2 trains on them."""

import operator
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowmo.data import token_files as files
from flowmo.data.bits import unpack_ids
from flowmo.data.sources.base import DataError
from flowmo.data.token_files import NO_CLASS, TokenMetadata, Vocabulary, read_shard, read_token_metadata

__all__ = ["NO_CLASS", "TokenDataset", "TokenMetadata", "Vocabulary"]

MAX_LISTED = 8


class TokenDataset(Dataset[tuple[Tensor, int]]):
    """A folder of tokens as a PyTorch dataset. Unreadable images are left out.

    An item is (ids, label): ids int64 tokens × sub-tokens, label an int, −1 without a class. ``DataLoader`` stacks them
    to ids b × tokens × sub-tokens and labels int64 b. Shards are mapped into memory when an item of theirs is first
    read. Also a ``flowmo.data.loader.IndexedDataset``.

    Args:
        path: folder that ``flowmo tokenize`` wrote.
        tokenizer: identity that the ids must have, if given: ``tok.identity()``.
        verify: check every checksum now, which reads the folder once. ``False`` checks sizes and headers.

    Attributes:
        metadata: ``TokenMetadata``: ``tokens``, ``sub_tokens``, ``vocab_size``, ``tokenizer`` and more.
        classes: names by label.
        labels: int32, the label of each item.

    Raises:
        DataError: the folder is missing, incomplete or of another tokenizer, or a shard is missing or damaged.
    """

    def __init__(self, path: str | Path, tokenizer: str | None = None, verify: bool = True):
        self.path = Path(path)
        self.metadata = metadata = read_token_metadata(self.path)
        self.classes = metadata.classes
        if tokenizer is not None and tokenizer != metadata.tokenizer:
            raise DataError(
                f"{path}: made by tokenizer {metadata.tokenizer} ({metadata.model}), not by {tokenizer}. "
                "Each tokenizer needs its own tokens and generator."
            )
        self._check_parts()
        every = np.concatenate(
            [files.read_labels(self.path, metadata, number, verify) for number in range(metadata.shards)]
        )
        if every.min() < files.UNREADABLE or every.max() >= len(self.classes):
            raise DataError(f"{path}: has labels from {every.min()} to {every.max()}, beyond its classes.")
        self.samples = np.flatnonzero(every != files.UNREADABLE)
        """Number of each item among all images and crops."""
        self.labels = every[self.samples]
        if not len(self.samples):
            raise DataError(f"{path}: none of its images could be read.")
        self._maps: dict[int, np.ndarray] = {}

    def _check_parts(self) -> None:
        parts = files.find_parts(self.path)
        for part in parts:
            different = read_token_metadata(self.path, part.manifest).difference(self.metadata)
            if different:
                raise DataError(f"{self.path}: {part.manifest} is of other tokens than {files.MANIFEST} ({different}).")
        missing, total = files.missing_shards(self.path, self.metadata), self.metadata.shards
        if missing:
            absent = [self.metadata.shard(number)[0] for number in missing]
            if parts:
                absent = [*dict.fromkeys(f"part {parts[-1].owner(number, total)}" for number in missing)]
            more = ", …" if len(absent) > MAX_LISTED else ""
            raise DataError(
                f"{self.path}: not finished, {len(missing)} of {total} shards are missing: "
                f"{', '.join(absent[:MAX_LISTED])}{more}. Run the same `flowmo tokenize` command again to complete it."
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: SupportsIndex) -> tuple[Tensor, int]:
        """(ids, label) of an item. A negative index counts from the end.

        Raises:
            IndexError: there is no such item.
        """
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.path}: there is no item {number} of {len(self)}.")
        return self.ids(number), int(self.labels[number])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # each DataLoader worker opens its own maps

    def ids(self, index: int) -> Tensor:
        """int64 tokens × sub-tokens. Raises ``DataError`` for an id beyond the vocabulary."""
        metadata = self.metadata
        number, position = divmod(int(self.samples[index]), metadata.shard_size)
        if number not in self._maps:
            self._maps[number] = read_shard(self.path, metadata, number, verify=False)
        start = files.HEADER.size + position * metadata.item_bytes
        ids = unpack_ids(self._maps[number][start : start + metadata.item_bytes], metadata.ids, metadata.id_bits)
        if ids.max() >= metadata.vocab_size:
            raise DataError(f"{self.path}: item {index} has id {ids.max()}, beyond {metadata.vocab_size - 1}.")
        return torch.from_numpy(ids.reshape(metadata.tokens, metadata.sub_tokens))

    def load(self, index: int, seed: int) -> tuple[Tensor, dict[str, str]]:
        """Label (−1 without a class) and ids of a sample in one row: int64 1 + ids. Nothing in it is random."""
        ids, label = self[index]
        return torch.cat((torch.tensor([label]), ids.flatten())), {}
