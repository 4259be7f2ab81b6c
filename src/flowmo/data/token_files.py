"""The files of a folder of tokens: ids of many images, bit-packed in shards.

A folder holds the metadata in ``tokens.json`` and the shards ``tokens-00000.bin`` and so on. If several jobs wrote it,
``part-00003-of-00016.json`` repeats the metadata for one of them. Integers of a shard are little-endian:

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

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import torch

from flowmo.data.bits import pack_ids, packed_size
from flowmo.data.sources.base import DataError, class_difference
from flowmo.errors import one_line

MANIFEST = "tokens.json"
FORMAT = 1
MAGIC = b"FLMT"
HEADER = struct.Struct("<4sB8sBIIQI")
CRC = struct.Struct("<I")
IDENTITY_BYTES = 8
MAX_SHARD_BYTES = 1 << 30
MAX_SHARDS = 1 << 20
MAX_CLASSES = 1_000_000
MAX_ID_BITS = 32
NO_CLASS, UNREADABLE = -1, -2


def check_sizes(*sizes: int) -> None:
    if not all(isinstance(size, int) and 0 < size < 1 << 32 for size in sizes):
        raise ValueError(f"Each of {', '.join(map(str, sizes))} must be a whole number from 1 to 2^32 − 1.")


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
        ValueError: a size is out of range, ``id_count`` ids do not take ``id_bits`` bits, or a name is not text.
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
        check_sizes(self.image_size, self.tokens, self.sub_tokens, self.id_bits)
        count, names = self.id_count, (self.tokenizer, self.model, *self.classes)
        if count is not None and (type(count) is not int or count < 1 or (count - 1).bit_length() != self.id_bits):
            raise ValueError(f"{count} ids do not take {self.id_bits} bits.")
        if self.id_bits > MAX_ID_BITS or len(self.classes) > MAX_CLASSES:
            raise ValueError(f"An id has more than {MAX_ID_BITS} bits, or there are more than {MAX_CLASSES} classes.")
        if not all(isinstance(name, str) for name in names):
            raise ValueError("A name of the tokenizer, its model or a class is not text.")

    @property
    def vocab_size(self) -> int:
        return self.id_count or 1 << self.id_bits

    @property
    def ids(self) -> int:
        """Ids per image."""
        return self.tokens * self.sub_tokens

    @property
    def shape(self) -> str:
        """Ids and size of an image, in words. One native-size tokenizer can have several."""
        return f"{self.tokens} × {self.sub_tokens} ids an image of {self.image_size} pixels"


@dataclass(frozen=True, kw_only=True)
class TokenMetadata(Vocabulary):
    """Content of ``tokens.json``. Resuming requires equal metadata, except the device.

    Attributes:
        count: samples: images × crops, × 2 with ``flip``.
        items: hash of the images' keys and labels, in order, see ``Source.key``. Older folders have none.
        precision: in which the ids were computed, such as ``float32 (cpu)``. Older folders can have none, or several
            joined by " and ".

    Raises:
        ValueError: as ``Vocabulary``; or there are too many or too large shards.
    """

    source: str
    count: int
    shard_size: int
    crops: int = 1
    flip: bool = False
    seed: int = 0
    precision: str = ""
    items: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self.count, self.shard_size)
        if self.shard_bytes(0) > MAX_SHARD_BYTES:
            raise ValueError(f"A shard has more than {MAX_SHARD_BYTES} bytes. Choose a smaller --shard-size.")
        if self.shards > MAX_SHARDS:
            raise ValueError(f"There are more than {MAX_SHARDS} shards. Choose a larger --shard-size.")
        if len(bytes.fromhex(self.tokenizer)) != IDENTITY_BYTES or not isinstance(self.precision, str):
            raise ValueError("The tokenizer is not an identity of 16 hex digits, or the precision is not text.")

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

    @property
    def dtype(self) -> str:
        """``float32`` or ``bfloat16``. Empty if ``precision`` names none or several."""
        return "" if " and " in self.precision else self.precision.partition(" ")[0]

    def samples_identity(self) -> str:
        """16 hex digits that name the samples and their order, whatever device has computed them."""
        content = (self.tokenizer, self.classes, self.items, self.count, self.crops, self.flip, self.seed, self.dtype)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def difference(self, other: Self) -> str:
        """Describe how ``other`` differs. Empty if it does not, or only in the device."""
        mine, expected = asdict(self), asdict(other)
        found = [class_difference(mine.pop("classes"), expected.pop("classes"))]
        if {self.dtype, other.dtype} != {"float32", "bfloat16"}:  # their ids differ in a few bits
            del mine["precision"]
        if mine.pop("items") != expected["items"] and self.items and other.items:
            found.append("other images, or in another order")
        names = [name for name in mine if mine[name] != expected[name]]
        found += [f"{name} {mine[name]!r}, not {expected[name]!r}" for name in names]
        return ", ".join(filter(None, found))[:200]


@dataclass(frozen=True, order=True)
class Part:
    """One of ``count`` jobs that fill a folder together, counted from 1. Each writes consecutive shards.

    Raises:
        DataError: there is no such part.
    """

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise DataError(f"There is no part {self}. The parts of {self.count} run from 1 to {self.count}.")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``3/16``."""
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if not found:
            raise DataError(f"{text!r} is not a part. Write 3/16 for the third of 16.")
        return cls(int(found[1]), int(found[2]))

    @property
    def manifest(self) -> str:
        """Name of the file that holds this job's metadata."""
        return MANIFEST if self.count == 1 else f"part-{self.number:05d}-of-{self.count:05d}.json"

    def owner(self, shard: int, total: int) -> "Part":
        """Return the part that writes a shard, if there are as many as of this one."""
        return Part(-(-(shard + 1) * self.count // total), self.count)

    def shards(self, total: int) -> range:
        return range(total * (self.number - 1) // self.count, total * self.number // self.count)


WHOLE = Part()


def pack_shard(metadata: TokenMetadata, number: int, ids: np.ndarray, labels: Sequence[int]) -> bytes:
    """Content of a shard. ids: int64 samples × tokens × sub-tokens."""
    body = b"".join(pack_ids(row, metadata.id_bits) for row in ids)
    content = metadata.header(number) + body + np.asarray(labels, "<i4").tobytes()
    return content + CRC.pack(zlib.crc32(content))


def read_shard(folder: Path, metadata: TokenMetadata, number: int, verify: bool = True) -> np.ndarray:
    """Map a shard into memory and check it. Returns its bytes, uint8.

    Args:
        verify: compute the checksum, which reads the whole file.

    Raises:
        DataError: the shard is missing, truncated, damaged, or belongs to other tokens.
    """
    path, expected = folder / metadata.shard(number)[0], metadata.shard_bytes(number)
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise DataError(f"{path}: missing, or has {size} bytes instead of {expected}. Tokenize again to write it.")
    # unlike mmap and np.memmap, this keeps no file open
    content = torch.from_file(str(path), shared=False, size=expected, dtype=torch.uint8).numpy()
    if verify and zlib.crc32(content[: -CRC.size]) != CRC.unpack(content[-CRC.size :])[0]:
        raise DataError(f"{path}: damaged, the checksum differs. Remove the file and tokenize again.")
    header = content[: HEADER.size].tobytes()
    if header != metadata.header(number):
        identity = HEADER.unpack(header)[2].hex()
        other = f" ({identity}, not {metadata.tokenizer})" if identity != metadata.tokenizer else ""
        raise DataError(f"{path}: belongs to another tokenizer or folder than {MANIFEST} names{other}.")
    return content


def read_labels(folder: Path, metadata: TokenMetadata, number: int, verify: bool = False) -> np.ndarray:
    """Labels of a shard, int32. Raises as ``read_shard`` does."""
    content = read_shard(folder, metadata, number, verify)
    return content[metadata.labels_offset(number) : -CRC.size].view("<i4").astype(np.int32)


def missing_shards(folder: Path, metadata: TokenMetadata) -> list[int]:
    present = {path.name for path in folder.iterdir()}
    return [number for number in range(metadata.shards) if metadata.shard(number)[0] not in present]


def prepare_output_folder(folder: Path, name: str) -> bool:
    """Make a folder for output. Returns True if it holds the file ``name`` from an earlier call.

    Raises:
        DataError: it holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]  # hidden: files being written
    if (folder / name).is_file():  # listed first, because another job may be writing both
        return True
    if entries:
        raise DataError(f"{folder} holds something else. Name an empty folder.")
    return False


def manifest(metadata: TokenMetadata, complete: bool) -> str:
    """Content of ``tokens.json``."""
    return json.dumps({"flowmo_tokens": FORMAT, **asdict(metadata), "complete": complete}, indent=1)


def read_token_metadata(folder: str | Path, name: str = MANIFEST) -> TokenMetadata:
    """Read ``tokens.json``, or a part's file.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    path = Path(folder) / name
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["flowmo_tokens"] != FORMAT:
            raise DataError(f"{path}: written in another version of the format. This flowmo reads version {FORMAT}.")
        if not isinstance(tree["classes"], list):
            raise ValueError("Its classes are not a list.")
        known = {name: tree[name] for name in TokenMetadata.__dataclass_fields__ if name in tree}
        metadata = TokenMetadata(**{**known, "classes": tuple(tree["classes"])})
    except FileNotFoundError:
        occupied = Path(folder).is_dir() and any(Path(folder).iterdir())  # perhaps by the images
        example = f"{folder} --output TOKENS` and name TOKENS" if occupied else f"DATA --output {folder}`"
        advice = f"Make tokens with `flowmo tokenize {example}."
        raise DataError(f"{folder}: contains no {name}. {advice}") from None
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: not written by `flowmo tokenize`, or damaged ({one_line(error, 100)}).") from None
    return metadata


def find_parts(folder: Path) -> list[Part]:
    """Parts whose jobs have started, in order."""
    names = [re.fullmatch(r"part-(\d{5,9})-of-(\d{5,9})\.json", path.name) for path in folder.iterdir()]
    return sorted(Part(int(name[1]), int(name[2])) for name in names if name)
