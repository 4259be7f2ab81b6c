"""Encode an image dataset into a folder of tokens, with any number of jobs and processes. An interrupted call resumes.

Every sample has a number: image i with crop c, plain or mirrored. A shard holds a range of numbers and appears only
when it is whole, so interruptions neither lose nor repeat a sample.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowmo.checkpoint.files import write_content
from flowmo.data import DataError, ImageDataset, Source
from flowmo.data import token_files as files
from flowmo.data.sources.base import identity_of, require_labels
from flowmo.data.token_files import WHOLE, Part, TokenMetadata
from flowmo.distributed import World
from flowmo.errors import one_line
from flowmo.images import ImageError
from flowmo.images.pixels import ChannelsError, PixelFormat
from flowmo.precision import describe
from flowmo.streams import Stream, stream_seed
from flowmo.tokenizer import FlowMo

SHARD_SIZE = 4096


class Sample(NamedTuple):
    """Image c × side × side and label. An unreadable one is grey, its label ``UNREADABLE``, and it has a reason.

    Errors are values: a DataLoader would wrap an exception in its own traceback.
    """

    image: Tensor
    label: int
    reason: str = ""
    wrong_channels: bool = False


class Samples(Dataset):
    """Samples of a source by number."""

    def __init__(self, source: Source, metadata: TokenMetadata, pixels: PixelFormat):
        self.source, self.metadata = source, metadata
        self.crops = ImageDataset(source, metadata.image_size, random_crop=metadata.crops > 1, pixels=pixels)

    def __len__(self) -> int:
        return self.metadata.count

    def __getitem__(self, number: int) -> Sample:
        metadata = self.metadata
        epoch, index = divmod(number, len(self.source))
        crop, mirrored = (epoch // 2, epoch % 2 == 1) if metadata.flip else (epoch, False)
        try:
            image = self.crops[index, stream_seed(metadata.seed, Stream.TOKENIZED, index, crop)]
        except ImageError as error:
            grey = torch.zeros(self.crops.pixels.channels, metadata.image_size, metadata.image_size)
            return Sample(grey, files.UNREADABLE, str(error), isinstance(error, ChannelsError))
        label = self.source.label(index) if metadata.classes else None
        return Sample(image.flip(-1) if mirrored else image, files.NO_CLASS if label is None else label)


def tokenize(
    tokenizer: FlowMo,
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
    part: Part = WHOLE,
    world: World = World(),
    progress: Callable[[int, int], None] | None = None,
) -> TokenMetadata:
    """Write the ids of every image of a source to a folder, as far as they are missing.

    All ranks call this together; each takes whole shards. Unreadable images are marked in the folder. The next call
    tries them again.

    Args:
        tokenizer: a ``FlowMo``, or any object with its ``quantizer``, ``config``, ``identity`` and ``encode``.
        name, model: names of the source and the tokenizer for ``tokens.json``.
        crops: 1 takes the central square of each image. More take random squares along its longer side.
        flip: also add every crop mirrored.
        labels: store the source's classes. Then all images must have one, or none.
        part: write only this job's shards. The ids do not depend on the number of jobs.
        progress: called with (samples done, total samples) of this rank.

    Raises:
        DataError: the folder holds something else, the tokenizer has no ids, only some images have a label, more
            images of a shard than one and than ``data.max_bad_share`` are unreadable, or a worker died.
        ImageError: an image has other channels than the tokenizer takes.
    """
    metadata = _metadata(
        tokenizer, source, labels, source=name, model=model, crops=crops, flip=flip, seed=seed, shard_size=shard_size
    )
    if world.main:
        _record_metadata(out, metadata, part)
    world.barrier()
    samples, done = Samples(source, metadata, PixelFormat.of(tokenizer.config)), 0
    shards = part.shards(metadata.shards) if world.main else ()
    missing = world.broadcast([shard for shard in shards if not _is_intact(out, samples, shard)])
    mine = missing[world.rank :: world.size]
    total = sum(len(metadata.shard(shard)[1]) for shard in mine)
    for shard in mine:
        path, numbers = metadata.shard(shard)
        ids: list[Tensor] = []
        found: list[int] = []
        reasons: dict[int, str] = {}
        for batch in _loaded(DataLoader(samples, batch_size, sampler=numbers, num_workers=workers)):
            codes = tokenizer.encode(batch.image)
            assert codes.ids is not None, "its bottleneck has ids"
            ids.append(codes.ids.cpu())
            reasons |= {(len(found) + i): reason for i, reason in enumerate(batch.reason) if reason}
            found += batch.label.tolist()
            done += len(batch.label)
            if progress:
                progress(done, total)
        most = tokenizer.config.data.max_bad_share * min(metadata.shard_size, len(source))
        _check_unreadable(reasons, numbers, len(source), most)
        write_content(out / path, files.pack_shard(metadata, shard, torch.cat(ids).numpy(), found))
    world.barrier()
    if world.main:
        complete = not files.missing_shards(out, metadata)
        write_content(out / part.manifest, files.manifest(files.read_token_metadata(out, part.manifest), complete=True))
        write_content(out / files.MANIFEST, files.manifest(files.read_token_metadata(out), complete))
    world.barrier()
    return metadata


def _loaded(loader: DataLoader) -> Iterator[Any]:
    """Yield a loader's batches. An image of other channels, or a worker that died, is an error of one line."""
    try:
        for batch in loader:
            wrong = [reason for reason, is_wrong in zip(batch.reason, batch.wrong_channels, strict=True) if is_wrong]
            if wrong:
                raise ChannelsError(wrong[0])
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        if "DataLoader worker" not in str(error) and isinstance(error, RuntimeError):
            raise
        raise DataError(f"Data loading failed: {one_line(error)}. Run the same command again to resume.") from None


def _check_unreadable(reasons: Mapping[int, str], numbers: Sequence[int], count: int, most: float) -> None:
    """Raise ``DataError`` if more than one and than ``most`` of a shard's images are unreadable."""
    bad, images = ({numbers[i] % count for i in positions} for positions in (reasons, range(len(numbers))))
    if len(bad) > max(1, most):
        raise DataError(
            f"{len(bad)} of the {len(images)} images of a shard cannot be read, more than data.max_bad_share allows. "
            f"One is {next(iter(reasons.values()))}"
        )


def _metadata(tokenizer: FlowMo, images: Source, labels: bool, **options: Any) -> TokenMetadata:
    sub_tokens, id_count = tokenizer.quantizer.sub_tokens, tokenizer.quantizer.id_count
    if sub_tokens is None or id_count is None:
        raise DataError("This tokenizer is continuous and has no ids.")
    if labels:
        require_labels(images)
    precision = getattr(tokenizer, "precision", "")
    try:
        return TokenMetadata(
            tokenizer=tokenizer.identity(),
            image_size=tokenizer.config.data.image_size,
            tokens=tokenizer.code_length,
            sub_tokens=sub_tokens,
            id_bits=(id_count - 1).bit_length(),
            id_count=None if id_count.bit_count() == 1 else id_count,  # absent in older folders
            count=len(images) * options["crops"] * (2 if options["flip"] else 1),
            classes=tuple(images.classes) if labels else (),
            precision=precision and describe(precision, tokenizer.device),
            items=identity_of(images, labels),
            **options,
        )
    except ValueError as error:
        raise DataError(str(error)) from None


def _record_metadata(out: Path, metadata: TokenMetadata, part: Part) -> None:
    """Write the metadata to the folder, or refuse a folder with other content."""
    begun = files.prepare_output_folder(out, files.MANIFEST)
    for name in (files.MANIFEST, part.manifest):
        if begun and (out / name).is_file():
            different = files.read_token_metadata(out, name).difference(metadata)
            if different:
                raise DataError(f"{out} holds other tokens ({different}). Name an empty folder.")
        else:
            write_content(out / name, files.manifest(metadata, complete=False))


def _is_intact(out: Path, samples: Samples, shard: int) -> bool:
    """True if a shard is whole, and its unreadable images still are."""
    try:
        labels = files.read_labels(out, samples.metadata, shard, verify=True)
    except DataError:
        return False
    numbers = samples.metadata.shard(shard)[1]
    return all(samples[numbers[i]].reason for i in np.flatnonzero(labels == files.UNREADABLE))
