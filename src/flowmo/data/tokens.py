"""Ids of many pictures, bit-packed in shards: what stage 2 trains on.

A folder holds ``tokens.json``, which says whose ids they are, and ``tokens-00000.bin`` and so on. A shard, integers
little-endian:

    4 bytes   magic "FLMT"
    1         version, 1
    8         identity of the tokenizer
    1         bits of an id
    4 + 4     tokens a picture, ids a token
    8 + 4     number of its first picture, count of its pictures
    …         the ids of each picture, lowest bit first, each picture filled up to whole bytes
    …         the label of each picture, 4 bytes, −1 without a class and −2 where it could not be read
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

from flowmo.codec.bits import pack_ids, packed_size, unpack_ids
from flowmo.data.sources.base import DataError

MANIFEST = "tokens.json"
FORMAT = 1
MAGIC = b"FLMT"
HEADER = struct.Struct("<4sB8sBIIQI")
CRC = struct.Struct("<I")
IDENTITY_BYTES = 8
MAX_SHARD_BYTES = 1 << 30
"""A shard of the usual 4096 pictures has about a megabyte."""
MAX_CLASSES = 1_000_000
NO_CLASS, UNREADABLE = -1, -2


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Whose ids they are and what they look like; a generator knows one, and no other.

    Attributes:
        tokenizer: identity of the tokenizer, 16 hex digits; ids are noise to any other.
        model: what it was called when it was loaded.
        image_size: side of its pictures.
        classes: names by label.
        id_count: ids run from 0 to ``id_count`` − 1; ``None`` where these are all of ``id_bits`` bits.

    Raises:
        TypeError: ``id_count`` does not take ``id_bits`` bits.
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
        """Ids run from 0 to ``vocab_size`` − 1."""
        return self.id_count or 1 << self.id_bits

    @property
    def ids(self) -> int:
        """Ids a picture."""
        return self.tokens * self.sub_tokens


@dataclass(frozen=True, kw_only=True)
class TokenMetadata(Vocabulary):
    """What a folder of tokens says of itself, and what must be equal to go on with it.

    Attributes:
        count: samples: pictures × crops × 2 with mirrored ones.
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
    def record(self) -> int:
        """Bytes a picture, without its label."""
        return packed_size(self.ids, self.id_bits)

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def shard(self, number: int) -> tuple[str, range]:
        """A shard's file name, and the samples that it holds."""
        first = number * self.shard_size
        return f"tokens-{number:05d}.bin", range(first, min(first + self.shard_size, self.count))

    def header(self, number: int) -> bytes:
        samples = self.shard(number)[1]
        identity = bytes.fromhex(self.tokenizer)
        shape = (self.id_bits, self.tokens, self.sub_tokens)
        return HEADER.pack(MAGIC, FORMAT, identity, *shape, samples.start, len(samples))

    def shard_bytes(self, number: int) -> int:
        return HEADER.size + len(self.shard(number)[1]) * (self.record + 4) + CRC.size


def pack_shard(facts: TokenMetadata, number: int, ids: np.ndarray, labels: Sequence[int]) -> bytes:
    """The content of a shard: ids int64 samples × tokens × sub-tokens."""
    body = b"".join(pack_ids(row, facts.id_bits) for row in ids)
    content = facts.header(number) + body + np.asarray(labels, "<i4").tobytes()
    return content + CRC.pack(zlib.crc32(content))


def read_shard(path: Path, facts: TokenMetadata, number: int) -> bytes:
    """The content of a sound shard.

    Raises:
        DataError: missing, truncated, damaged, or of other tokens.
    """
    expected = facts.shard_bytes(number)
    if not path.is_file():
        raise DataError(f"{path}: missing")
    if path.stat().st_size != expected:
        raise DataError(f"{path}: has {path.stat().st_size} bytes where {expected} belong; tokenize again to mend it")
    content = path.read_bytes()
    if zlib.crc32(content[: -CRC.size]) != CRC.unpack(content[-CRC.size :])[0]:
        raise DataError(f"{path}: damaged, its checksum does not fit; remove it and tokenize again")
    if content[: HEADER.size] != facts.header(number):
        raise DataError(f"{path}: of another tokenizer or another folder than its {MANIFEST} says")
    return content


def describe(facts: TokenMetadata, **more: Any) -> str:
    """The content of ``tokens.json``."""
    return json.dumps({"flowmo_tokens": FORMAT, **asdict(facts), **more}, indent=1)


def read_metadata(folder: str | Path) -> tuple[TokenMetadata, dict[str, Any]]:
    """What ``tokens.json`` says: the facts, and the rest.

    Raises:
        DataError: there is none, or it is no such file.
    """
    path = Path(folder) / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.pop("flowmo_tokens") != FORMAT:
            raise DataError(f"{path}: of another version of the format; this flowmo reads version {FORMAT}")
        names = {name for name in TokenMetadata.__dataclass_fields__ if name in tree}
        facts = TokenMetadata(**{name: tree.pop(name) for name in names})
        numbers = (facts.image_size, facts.tokens, facts.sub_tokens, facts.count, facts.shard_size)
        if not all(isinstance(n, int) and 0 < n < 1 << 32 for n in (*numbers, facts.id_bits)) or facts.id_bits > 32:
            raise ValueError("a size that is none")
        if facts.shard_bytes(0) > MAX_SHARD_BYTES:
            raise ValueError(f"shards of more than {MAX_SHARD_BYTES} bytes")
        if len(bytes.fromhex(facts.tokenizer)) != IDENTITY_BYTES:
            raise ValueError("no identity of a tokenizer")
        if not isinstance(facts.classes, list) or not all(isinstance(name, str) for name in facts.classes):
            raise ValueError("no list of classes")
        if len(facts.classes) > MAX_CLASSES:
            raise ValueError(f"more than {MAX_CLASSES} classes")
    except FileNotFoundError:
        raise DataError(
            f"{folder}: holds no {MANIFEST}; make tokens with `flowmo tokenize DATA --out {folder}`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: not what `flowmo tokenize` wrote ({' '.join(str(error).split())[:100]})") from None
    return TokenMetadata(**{**asdict(facts), "classes": tuple(facts.classes)}), tree


class Tokens(Dataset):
    """The readable samples of a folder of tokens, in order; shards are mapped, not loaded.

    Args:
        path: the folder.
        tokenizer: identity that the ids must have, if given.

    Raises:
        DataError: no such folder, not finished, of another tokenizer, or a shard is missing, truncated or damaged.
    """

    def __init__(self, path: str | Path, tokenizer: str | None = None):
        self.path = Path(path)
        self.facts, rest = read_metadata(self.path)
        self.classes = self.facts.classes
        if not rest.get("complete"):
            raise DataError(f"{path}: not finished; run the same `flowmo tokenize` again to go on")
        if tokenizer is not None and tokenizer != self.facts.tokenizer:
            raise DataError(
                f"{path}: ids of tokenizer {self.facts.tokenizer} ({self.facts.model}), not of {tokenizer}; "
                "each tokenizer needs tokens and a generator of its own"
            )
        labels = []
        for number in range(self.facts.shards):
            content = read_shard(self._shard(number), self.facts, number)
            labels.append(np.frombuffer(content[: -CRC.size], "<i4", offset=self._labels(number)))
        self.labels = np.concatenate(labels)
        if self.labels.min() < UNREADABLE or self.labels.max() >= len(self.classes):
            raise DataError(f"{path}: labels run from {self.labels.min()} to {self.labels.max()}, beyond its classes")
        self.samples = np.flatnonzero(self.labels != UNREADABLE)
        if not len(self.samples):
            raise DataError(f"{path}: none of its pictures could be read")
        self._maps: dict[int, mmap.mmap] = {}

    def _shard(self, number: int) -> Path:
        return self.path / self.facts.shard(number)[0]

    def _labels(self, number: int) -> int:
        return HEADER.size + len(self.facts.shard(number)[1]) * self.facts.record

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a data loader's worker opens its own

    def name(self, index: int) -> str:
        return f"{self.path}, sample {self.samples[index]}"

    def label(self, index: int) -> int | None:
        label = int(self.labels[self.samples[index]])
        return None if label == NO_CLASS else label

    def ids(self, index: int) -> Tensor:
        """int64 tokens × sub-tokens."""
        facts = self.facts
        number, place = divmod(int(self.samples[index]), facts.shard_size)
        if number not in self._maps:
            with self._shard(number).open("rb") as file:
                self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = HEADER.size + place * facts.record
        content = self._maps[number][start : start + facts.record]
        return torch.from_numpy(unpack_ids(content, facts.ids, facts.id_bits).reshape(facts.tokens, facts.sub_tokens))

    # As training items

    def readable(self, index: int, seed: int) -> tuple[Tensor, dict[str, str]]:
        """Label, −1 without one, and ids of a sample as one row: int64 1 + ids. Nothing in it is random."""
        label = torch.tensor([self.labels[self.samples[index]]], dtype=torch.int64)
        return torch.cat((label, self.ids(index).flatten())), {}
