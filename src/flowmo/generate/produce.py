"""Many generated pictures, as numbered files or one ``.npz``, by any number of processes; goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowmo.checkpoint.files import write_content, write_whole
from flowmo.distributed import World
from flowmo.errors import FlowMoError
from flowmo.evaluate.npz import write_npz
from flowmo.generate.generator import Generator
from flowmo.images import read_image, to_pil
from flowmo.streams import Stream, stream_seed
from flowmo.tokenizer import FlowMo

SETTINGS = "samples.json"


class ProductionError(FlowMoError, ValueError):
    """Pictures that cannot be made, or not there; the message says why."""


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; ``None`` is the generator's, or the tokenizer's, own."""

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    temperature: float | None = None
    last_temperature: float | None = None
    choice_temperature: float | None = None
    order: str | None = None
    decode_steps: int | None = None
    decode_guidance: float | None = None

    def sampling(self) -> dict:
        """Arguments of ``Generator.sample``."""
        names = ("steps", "guidance", "temperature", "last_temperature", "choice_temperature", "order")
        return {name: getattr(self, name) for name in names}


def image_seeds(seed: int, numbers: Iterable[int]) -> list[int]:
    """Of the pictures with these numbers in a larger set."""
    return [stream_seed(seed, Stream.GENERATED, number) for number in numbers]


def check_pair(generator: Generator, tokenizer: FlowMo) -> None:
    """Raise ``ProductionError`` where the generator's ids are not this tokenizer's."""
    ours, theirs = tokenizer.identity(), generator.vocabulary.tokenizer
    if ours != theirs:
        raise ProductionError(
            f"the generator draws ids of tokenizer {theirs} ({generator.vocabulary.model}), this one is {ours}; "
            "name the right one with --model"
        )


def draw(
    generator: Generator,
    tokenizer: FlowMo,
    labels: Sequence[int],
    numbers: Sequence[int],
    drawing: Drawing,
    ids: Tensor | None = None,
    keep: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Pictures b 3 h w in [−1, 1] of classes.

    Args:
        numbers: theirs in a larger set, which with the seed decide all that is random.
        ids, keep: see ``Generator.sample``.
    """
    seeds = image_seeds(drawing.seed, numbers)
    drawn = generator.sample(labels, seeds, **drawing.sampling(), ids=ids, keep=keep, progress=progress)
    return tokenizer.decode(drawn, drawing.decode_steps, seeds, guidance=drawing.decode_guidance)


def produce(
    generator: Generator,
    tokenizer: FlowMo,
    labels: Sequence[int],
    out: Path,
    drawing: Drawing,
    *,
    batch_size: int = 16,
    world: World = World(),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a picture a label to a folder, ``000000.png`` …, or to an ``.npz`` as the ADM evaluator reads it.

    All processes call this together and share the pictures, which do not depend on how many they are. For an ``.npz``
    the pictures lie in a folder beside it until they are all there.

    Raises:
        ProductionError: another tokenizer's ids, or a folder with something else in it.
    """
    check_pair(generator, tokenizer)
    folder = out.with_name(f"{out.name}.pictures") if out.suffix == ".npz" else out
    paths = [folder / f"{number:06d}.png" for number in range(len(labels))]
    if world.main:
        _claim(folder, generator, labels, drawing)
    world.barrier()
    todo = world.broadcast([number for number, path in enumerate(paths) if not path.is_file()])
    mine = todo[world.rank :: world.size]
    for start in range(0, len(mine), batch_size):
        some = mine[start : start + batch_size]
        for number, picture in zip(
            some, draw(generator, tokenizer, [labels[n] for n in some], some, drawing), strict=True
        ):
            write_whole(paths[number], partial(to_pil(picture).save, format="PNG"))
        if progress:
            progress(start + len(some), len(mine))
    world.barrier()
    if out.suffix == ".npz" and world.main:
        write_npz(out, _read(paths, batch_size), len(paths))
        shutil.rmtree(folder)
    world.barrier()


def _claim(folder: Path, generator: Generator, labels: Sequence[int], drawing: Drawing) -> None:
    """Write what is being drawn, or refuse a folder with something else in it."""
    facts = {**asdict(drawing), "generator": generator.identity(), "labels": [*labels]}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if path.is_file() and path.read_text() == json.dumps(facts):
        return
    if any(folder.iterdir()):
        raise ProductionError(f"{folder} holds other pictures; name an empty folder")
    write_content(path, json.dumps(facts))


def _read(paths: Sequence[Path], batch_size: int) -> Iterator[Tensor]:
    for start in range(0, len(paths), batch_size):
        rows = [np.asarray(read_image(path)) for path in paths[start : start + batch_size]]
        yield torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)


def parse_places(text: str, tokens: int) -> Tensor:
    """``0-31,40`` as bool tokens. Raises ``ProductionError``."""
    keep = torch.zeros(tokens, dtype=torch.bool)
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) >= tokens:
            raise ProductionError(
                f"{part!r} names no tokens; write numbers and ranges from 0 to {tokens - 1}, as 0-31,40"
            )
        keep[int(first) : int(last or first) + 1] = True
    return keep
