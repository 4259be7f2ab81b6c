"""Generate images of classes, and write many of them with any number of processes. An interrupted call resumes."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmo.checkpoint.files import write_content, write_whole
from flowmo.data.npz import write_npz
from flowmo.data.token_files import prepare_output_folder
from flowmo.distributed import World
from flowmo.generate.classes import GenerationError
from flowmo.generate.generator import Generator
from flowmo.images import read_image, to_bytes, to_tensor
from flowmo.streams import Stream, stream_seed
from flowmo.tokenizer import FlowMo

SETTINGS_FILE = "samples.json"


def image_seeds(seed: int, indices: Iterable[int]) -> list[int]:
    """Seeds of the images with these indices in a larger set."""
    return [stream_seed(seed, Stream.GENERATED, index) for index in indices]


def check_pair(generator: Generator, tokenizer: FlowMo) -> None:
    """Raise ``GenerationError`` if the generator was trained on another tokenizer's ids.

    A tokenizer of native size has one identity at every size; images then have the size of the generator's tokens.
    """
    given, needed = tokenizer.identity(), generator.vocabulary.tokenizer
    if given != needed:
        raise GenerationError(
            f"The generator needs tokenizer {needed} ({generator.vocabulary.model}), but this one is {given}. "
            "Name the right one with --model."
        )


def sample_images(
    generator: Generator,
    tokenizer: FlowMo,
    labels: Sequence[int],
    indices: Sequence[int],
    seed: int = 0,
    decode_steps: int | None = None,
    decode_guidance: float | None = None,
    **sampling: Any,
) -> Tensor:
    """Generate images of classes: b × c × h × w in [−1, 1].

    Args:
        indices: of the images in a larger set. With the seed they determine all randomness.
        decode_steps, decode_guidance: of ``FlowMo.decode``; ``None`` is the tokenizer's own.
        sampling: keyword arguments of ``Generator.sample``.
    """
    seeds = image_seeds(seed, indices)
    ids = generator.sample(labels, seeds, **sampling)
    size = (generator.vocabulary.image_size,) * 2
    return tokenizer.decode(ids, decode_steps, seeds, guidance=decode_guidance, size=size)


def write_samples(
    generator: Generator,
    tokenizer: FlowMo,
    labels: Sequence[int],
    out: Path,
    settings: Mapping[str, Any],
    *,
    batch_size: int = 16,
    world: World = World(),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write one image per label to a folder as ``000000.png`` …, or to an ``.npz`` for the ADM evaluator.

    All ranks call this together and share the images, which do not depend on the world size. The images of an ``.npz``
    stay in a folder beside it until all exist.

    Args:
        settings: keyword arguments of ``sample_images``.

    Raises:
        GenerationError: the generator and the tokenizer do not match, or the folder holds something else.
    """
    check_pair(generator, tokenizer)
    pixels = tokenizer.pixels
    packed = out.suffix.lower() == ".npz"
    if packed and not pixels.is_rgb:
        raise GenerationError(f"{out}: an .npz holds 8-bit RGB, unlike these images. Name a folder.")
    folder = out.with_name(f"{out.name}.pictures") if packed else out
    paths = [folder / f"{index:06d}{pixels.suffix}" for index in range(len(labels))]
    if world.main:
        # tokenizers that differ only in the decoder share their identity
        models = {"generator": generator.identity(), "tokenizer": tokenizer.weights_identity()}
        own = [str(generator.config.generator), str(tokenizer.config.eval.sampling)]
        precisions = [generator.precision, tokenizer.precision]
        _record_settings(folder, {**settings, **models, "own": own, "precisions": precisions, "labels": [*labels]})
    world.barrier()
    missing = world.broadcast([index for index, path in enumerate(paths) if not path.is_file()])
    mine = missing[world.rank :: world.size]
    for start in range(0, len(mine), batch_size):
        batch = mine[start : start + batch_size]
        images = sample_images(generator, tokenizer, [labels[index] for index in batch], batch, **settings)
        for index, image in zip(batch, images, strict=True):
            write_content(paths[index], pixels.to_file(image, paths[index].suffix))
        if progress:
            progress(start + len(batch), len(mine))
    world.barrier()
    if packed and world.main:
        images = (to_bytes(to_tensor(read_image(path)))[None] for path in paths)
        write_whole(out, lambda temporary: write_npz(temporary, images, len(paths)))
        shutil.rmtree(folder)
    world.barrier()


def _record_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Record the samples' settings in the folder, or refuse a folder with other content."""
    content, path = json.dumps(settings), folder / SETTINGS_FILE
    if not prepare_output_folder(folder, SETTINGS_FILE):
        write_content(path, content)
    elif path.read_text() != content:
        raise GenerationError(f"{folder} holds other images. Name an empty folder.")


def parse_positions(text: str, tokens: int) -> Tensor:
    """Parse token positions such as ``0-31,40`` into a bool mask. Raises ``GenerationError``."""
    mask = torch.zeros(tokens, dtype=torch.bool)
    for part in text.split(","):
        found = re.fullmatch("([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (tokens, tokens)
        if not first <= last < tokens:
            raise GenerationError(
                f"{part!r} names no tokens. Give numbers and ranges from 0 to {tokens - 1}, such as 0-31,40."
            )
        mask[first : last + 1] = True
    return mask
