"""A dataset of pictures to a folder of tokens, by any number of processes; an interrupted pass goes on.

Every sample has its number: picture i of crop c, plain or mirrored. A shard holds a range of numbers and appears whole
or not at all, so however often the work is broken off, no sample is lost and none is there twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowmo.checkpoint.files import write_content
from flowmo.config import Config
from flowmo.data import DataError, ImageDataset, Source
from flowmo.data.sources.base import class_difference, require_labels
from flowmo.data.tokens import (
    MANIFEST,
    NO_CLASS,
    UNREADABLE,
    TokenMetadata,
    manifest,
    pack_shard,
    read_metadata,
    read_shard,
)
from flowmo.distributed import World
from flowmo.images import ImageError
from flowmo.model.quantizers import Quantizer
from flowmo.streams import Stream, stream_seed
from flowmo.tokenizer import Codes

SHARD_SIZE = 4096


class Tokenizer(Protocol):
    """What a generator needs of a tokenizer: a ``FlowMo``, or another that pictures are drawn with for comparison."""

    config: Config
    quantizer: Quantizer

    @property
    def code_length(self) -> int: ...

    def identity(self) -> str: ...

    def encode(self, images: Tensor) -> Codes: ...

    def decode(self, codes: Codes | Tensor, *, seed: int | Sequence[int] = 0) -> Tensor: ...


class Samples(Dataset):
    """Sample number n of a source as (image 3 × side × side, label); an unreadable one is black and says so."""

    def __init__(self, source: Source, facts: TokenMetadata):
        self.source, self.facts = source, facts
        self.views = ImageDataset(source, facts.image_size, random_crop=facts.crops > 1)

    def __len__(self) -> int:
        return self.facts.count

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        pass_, index = divmod(number, len(self.source))
        crop, mirrored = (pass_ // 2, pass_ % 2 == 1) if self.facts.flip else (pass_, False)
        try:
            image = self.views[index, stream_seed(self.facts.seed, Stream.TOKENIZED, index, crop)]
        except ImageError:
            return torch.zeros(3, *(2 * [self.facts.image_size])), UNREADABLE
        label = self.source.label(index) if self.facts.classes else None
        return image.flip(-1) if mirrored else image, NO_CLASS if label is None else label


def tokenize(
    tokenizer: Tokenizer,
    source: Source,
    out: Path,
    *,
    name: str = "",
    model: str = "",
    crops: int = 1,
    flip: bool = False,
    labels: bool = True,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    batch_size: int = 16,
    workers: int = 0,
    world: World = World(),
    progress: Callable[[int, int], None] | None = None,
) -> TokenMetadata:
    """Write the ids of every picture of a source, or what is missing of them, to a folder.

    All processes call this together; each takes whole shards.

    Args:
        name, model: what the source and the tokenizer are called in the folder's ``tokens.json``.
        crops: 1 takes each picture's central square; more take so many at random places along its longer side.
        flip: each crop mirrored as well.
        labels: keep the source's classes; then either all of its images have one, or none.
        progress: called with (samples done, samples in all), both of this process.

    Raises:
        DataError: the folder holds something else, the tokenizer has no ids, or an image has no label and others have.
            A picture that cannot be read is no
            error; it is marked, and whoever reads the folder passes over it.
    """
    sub_tokens, id_count = tokenizer.quantizer.sub_tokens, tokenizer.quantizer.id_count
    if sub_tokens is None or id_count is None:
        raise DataError("this tokenizer is continuous and has no ids")
    if labels:
        require_labels(source)
    facts = TokenMetadata(
        tokenizer=tokenizer.identity(),
        model=model,
        image_size=tokenizer.config.data.image_size,
        tokens=tokenizer.code_length,
        sub_tokens=sub_tokens,
        id_bits=(id_count - 1).bit_length(),
        id_count=None if id_count.bit_count() == 1 else id_count,  # what older folders lack, where it tells nothing
        source=name,
        count=len(source) * crops * (2 if flip else 1),
        shard_size=shard_size,
        crops=crops,
        flip=flip,
        seed=seed,
        classes=tuple(source.classes) if labels else (),
    )
    if world.main:
        _claim(out, facts)
    world.barrier()
    todo = world.broadcast([number for number in range(facts.shards) if not _is_sound(out, facts, number)])
    mine = todo[world.rank :: world.size]
    samples, done = Samples(source, facts), 0
    total = sum(len(facts.shard(number)[1]) for number in mine)
    for shard in mine:
        path, numbers = facts.shard(shard)
        rows, found = [], []
        for images, some in DataLoader(samples, batch_size, sampler=numbers, num_workers=workers):
            ids = tokenizer.encode(images).ids
            assert ids is not None, "its bottleneck has ids"
            rows.append(ids.cpu())
            found += some.tolist()
            done += len(some)
            if progress:
                progress(done, total)
        write_content(out / path, pack_shard(facts, shard, torch.cat(rows).numpy(), found))
    world.barrier()
    if world.main:
        _write(out, facts, complete=True)
    world.barrier()
    return facts


def _claim(out: Path, facts: TokenMetadata) -> None:
    """Write what the folder is to be, or refuse one that is something else."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / MANIFEST).is_file():
        there, ours = asdict(read_metadata(out)[0]), asdict(facts)
        classes = class_difference(there.pop("classes"), ours.pop("classes"))
        other = [classes] * bool(classes)
        other += [f"{key} {there[key]!r}, not {ours[key]!r}" for key in ours if there[key] != ours[key]]
        if other:
            raise DataError(f"{out} holds other tokens ({', '.join(other)[:200]}); name an empty folder")
        return
    if any(out.iterdir()):
        raise DataError(f"{out} holds something else; name an empty folder")
    _write(out, facts, complete=False)


def _is_sound(out: Path, facts: TokenMetadata, number: int) -> bool:
    try:
        read_shard(out / facts.shard(number)[0], facts, number)
    except DataError:
        return False
    return True


def _write(out: Path, facts: TokenMetadata, complete: bool) -> None:
    write_content(out / MANIFEST, manifest(facts, complete))
