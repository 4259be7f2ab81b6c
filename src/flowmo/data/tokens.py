"""Ids of many images, bit-packed in shards. Stage 2 trains on them.

A folder holds the metadata in ``tokens.json`` and the shards ``tokens-00000.bin`` and so on. Integers of a shard are
little-endian:

    4 bytes   magic "FLMT"
    1         version, 1
    8         identity of the tokenizer
    1         bits per id
    4 + 4     tokens per image, ids per token
    8 + 4     index of the first image, number of images
    …         the ids of each image, lowest bit first, each image padded to whole bytes
    …         the label of each image, 4 bytes; −1 is no class, −2 an unreadable image
    4         CRC-32 of everything before it
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowmo.data.bits import pack_ids, packed_size, unpack_ids
from flowmo.data.sources.base import DataError
from flowmo.errors import one_line

MANIFEST = "tokens.json"
FORMAT = 1
MAGIC = b"FLMT"
HEADER = struct.Struct("<4sB8sBIIQI")
CRC = struct.Struct("<I")
IDENTITY_BYTES = 8
MAX_SHARD_BYTES = 1 << 30
MAX_CLASSES = 1_000_000
NO_CLASS, UNREADABLE = -1, -2


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids of one tokenizer. A generator is trained for exactly one vocabulary.

    Attributes:
        tokenizer: identity of the tokenizer, 16 hex digits.
        model: name under which the tokenizer was loaded.
        image_size: side of its images, in pixels.
        classes: names by label.
        id_count: ids run from 0 to ``id_count`` − 1; ``None`` means all values of ``id_bits`` bits.

    Raises:
        TypeError: ``id_count`` ids do not take ``id_bits`` bits.
    """

    tokenizer: str
    model: str
    image_size: int
    tokens: int
    sub_tokens: int
    id_bits: int
    classes: tuple[str, ...] = ()
    id_count: int | None = None

    def __post_init__(self) -> None:
        count = self.id_count
        if count is not None and (type(count) is not int or count < 1 or (count - 1).bit_length() != self.id_bits):
            raise TypeError(f"{count} ids do not take {self.id_bits} bits")

    @property
    def vocab_size(self) -> int:
        return self.id_count or 1 << self.id_bits

    @property
    def ids(self) -> int:
        """Ids per image."""
        return self.tokens * self.sub_tokens


@dataclass(frozen=True, kw_only=True)
class TokenMetadata(Vocabulary):
    """Content of ``tokens.json``. Tokenization resumes only if all of it is equal.

    Attributes:
        count: samples: images × crops, × 2 with ``flip``.
    """

    source: str
    count: int
    shard_size: int
    crops: int = 1
    flip: bool = False
    seed: int = 0

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(**{f.name: getattr(self, f.name) for f in fields(Vocabulary)})

    @property
    def item_bytes(self) -> int:
        """Bytes of one image's ids."""
        return packed_size(self.ids, self.id_bits)

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def shard(self, number: int) -> tuple[str, range]:
        """File name and samples of a shard."""
        first = number * self.shard_size
        return f"tokens-{number:05d}.bin", range(first, min(first + self.shard_size, self.count))

    def header(self, number: int) -> bytes:
        samples = self.shard(number)[1]
        identity = bytes.fromhex(self.tokenizer)
        shape = (self.id_bits, self.tokens, self.sub_tokens)
        return HEADER.pack(MAGIC, FORMAT, identity, *shape, samples.start, len(samples))

    def labels_offset(self, number: int) -> int:
        return HEADER.size + len(self.shard(number)[1]) * self.item_bytes

    def shard_bytes(self, number: int) -> int:
        return self.labels_offset(number) + 4 * len(self.shard(number)[1]) + CRC.size

    def check(self) -> None:
        """Raise ``ValueError`` or ``TypeError`` if values read from a file are out of range."""
        sizes = (self.image_size, self.tokens, self.sub_tokens, self.count, self.shard_size, self.id_bits)
        if not all(isinstance(n, int) and 0 < n < 1 << 32 for n in sizes) or self.id_bits > 32:
            raise ValueError("a size is out of range")
        if self.shard_bytes(0) > MAX_SHARD_BYTES:
            raise ValueError(f"shards of more than {MAX_SHARD_BYTES} bytes")
        if len(bytes.fromhex(self.tokenizer)) != IDENTITY_BYTES:
            raise ValueError("tokenizer is not an identity")
        if not all(isinstance(name, str) for name in self.classes) or len(self.classes) > MAX_CLASSES:
            raise ValueError(f"classes is not a list of at most {MAX_CLASSES} names")


def pack_shard(metadata: TokenMetadata, number: int, ids: np.ndarray, labels: Sequence[int]) -> bytes:
    """Content of a shard. ids: int64 samples × tokens × sub-tokens."""
    body = b"".join(pack_ids(row, metadata.id_bits) for row in ids)
    content = metadata.header(number) + body + np.asarray(labels, "<i4").tobytes()
    return content + CRC.pack(zlib.crc32(content))


def read_shard(path: Path, metadata: TokenMetadata, number: int) -> bytes:
    """Read and verify a shard.

    Raises:
        DataError: the shard is missing, truncated, damaged, or belongs to other tokens.
    """
    expected = metadata.shard_bytes(number)
    if not path.is_file():
        raise DataError(f"{path}: missing. Tokenize again to write it.")
    if path.stat().st_size != expected:
        raise DataError(f"{path}: has {path.stat().st_size} bytes instead of {expected}. Tokenize again to replace it.")
    content = path.read_bytes()
    if zlib.crc32(content[: -CRC.size]) != CRC.unpack(content[-CRC.size :])[0]:
        raise DataError(f"{path}: damaged, the checksum differs. Remove the file and tokenize again.")
    if content[: HEADER.size] != metadata.header(number):
        raise DataError(f"{path}: belongs to another tokenizer or folder than {MANIFEST} names.")
    return content


def manifest(metadata: TokenMetadata, complete: bool) -> str:
    """Content of ``tokens.json``."""
    return json.dumps({"flowmo_tokens": FORMAT, **asdict(metadata), "complete": complete}, indent=1)


def read_metadata(folder: str | Path) -> tuple[TokenMetadata, bool]:
    """Read ``tokens.json``. Returns the metadata, and True if all shards were written.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    path = Path(folder) / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["flowmo_tokens"] != FORMAT:
            raise DataError(f"{path}: written in another version of the format. This flowmo reads version {FORMAT}.")
        if not isinstance(tree["classes"], list):
            raise ValueError("classes is not a list")
        known = {name: tree[name] for name in TokenMetadata.__dataclass_fields__ if name in tree}
        metadata = TokenMetadata(**{**known, "classes": tuple(tree["classes"])})
        metadata.check()
    except FileNotFoundError:
        raise DataError(
            f"{folder}: contains no {MANIFEST}. Make tokens with `flowmo tokenize DATA --out {folder}`."
        ) from None
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: not written by `flowmo tokenize`, or damaged ({one_line(error, 100)}).") from None
    return metadata, bool(tree.get("complete"))


class Tokens(Dataset):
    """The readable samples of a folder of tokens, in order; a ``flowmo.data.loader.IndexedDataset``.

    Shards are memory-mapped.

    Args:
        tokenizer: identity that the ids must have, if given.

    Raises:
        DataError: the folder is missing, incomplete or of another tokenizer, or a shard is missing or damaged.
    """

    def __init__(self, path: str | Path, tokenizer: str | None = None):
        self.path = Path(path)
        self.metadata, complete = read_metadata(self.path)
        self.classes = self.metadata.classes
        if not complete:
            raise DataError(f"{path}: not finished. Run the same `flowmo tokenize` command again to complete it.")
        if tokenizer is not None and tokenizer != self.metadata.tokenizer:
            raise DataError(
                f"{path}: made by tokenizer {self.metadata.tokenizer} ({self.metadata.model}), not by {tokenizer}. "
                "Each tokenizer needs its own tokens and generator."
            )
        labels = []
        for number in range(self.metadata.shards):
            content = read_shard(self._shard_path(number), self.metadata, number)
            labels.append(np.frombuffer(content[: -CRC.size], "<i4", offset=self.metadata.labels_offset(number)))
        self.labels = np.concatenate(labels)
        if self.labels.min() < UNREADABLE or self.labels.max() >= len(self.classes):
            raise DataError(f"{path}: has labels from {self.labels.min()} to {self.labels.max()}, beyond its classes.")
        self.samples = np.flatnonzero(self.labels != UNREADABLE)
        if not len(self.samples):
            raise DataError(f"{path}: none of its images could be read.")
        self._maps: dict[int, mmap.mmap] = {}

    def _shard_path(self, number: int) -> Path:
        return self.path / self.metadata.shard(number)[0]

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # each DataLoader worker opens its own maps

    def name(self, index: int) -> str:
        return f"{self.path}, sample {self.samples[index]}"

    def label(self, index: int) -> int | None:
        label = int(self.labels[self.samples[index]])
        return None if label == NO_CLASS else label

    def ids(self, index: int) -> Tensor:
        """int64 tokens × sub-tokens."""
        metadata = self.metadata
        number, position = divmod(int(self.samples[index]), metadata.shard_size)
        if number not in self._maps:
            with self._shard_path(number).open("rb") as file:
                self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = HEADER.size + position * metadata.item_bytes
        ids = unpack_ids(self._maps[number][start : start + metadata.item_bytes], metadata.ids, metadata.id_bits)
        return torch.from_numpy(ids.reshape(metadata.tokens, metadata.sub_tokens))

    def load(self, index: int, seed: int) -> tuple[Tensor, dict[str, str]]:
        """Label (−1 without a class) and ids of a sample in one row: int64 1 + ids. Nothing in it is random."""
        label = torch.tensor([self.labels[self.samples[index]]], dtype=torch.int64)
        return torch.cat((label, self.ids(index).flatten())), {}
