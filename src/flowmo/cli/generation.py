"""Commands of stage 2: tokenize a dataset, export its ids, generate images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import flowmo
from flowmo.cli.options import load, prepare, split_settings
from flowmo.cli.output import Progress, UsageError, check_outputs, require, write
from flowmo.data import DataError, Source, TokenDataset, open_source
from flowmo.data.export import export as write_export
from flowmo.data.token_files import UNREADABLE, Part, TokenMetadata, missing_shards, read_labels
from flowmo.evaluate.metrics.pairs import grid
from flowmo.images import ImageError, resize_and_crop, to_pil, to_tensor
from flowmo.images.pixels import PixelFormat

if TYPE_CHECKING:
    from flowmo.generate.generator import Generator

MAX_GRID_IMAGES = 1000
GRID_COLUMNS = 8
SAMPLING = (
    *("seed", "steps", "guidance", "temperature", "last_temperature", "choice_temperature", "order"),
    *("decode_steps", "decode_guidance"),
)
"""Options of ``generate`` that ``sample_images`` takes."""


def tokenize(arguments: argparse.Namespace) -> tuple[str, dict] | None:
    from flowmo.distributed import join
    from flowmo.generate.tokenize import tokenize as write_tokens

    part = Part.parse(arguments.part)
    with join(arguments.device) as world:
        tokenizer = load(arguments, str(world.device))
        source = open_source(arguments.images)
        written = write_tokens(
            tokenizer,
            source,
            arguments.output,
            name=Path(arguments.images).name,
            model=Path(arguments.model).name,
            labels=not arguments.no_labels,
            batch_size=tokenizer.config.eval.batch_size,
            part=part,
            world=world,
            progress=Progress("tokenizing"),
            **{name: getattr(arguments, name) for name in ("crops", "flip", "seed", "shard_size", "workers")},
        )
        return describe_tokens(arguments.output, written, part, source, tokenizer.pixels) if world.main else None


def describe_tokens(
    out: Path, written: TokenMetadata, part: Part, source: Source, pixels: PixelFormat
) -> tuple[str, dict]:
    """Describe what a job wrote. Prints why images are left out."""
    shards = part.shards(written.shards)
    labels = [read_labels(out, written, number) for number in shards]
    count, missing = sum(map(len, labels)), len(missing_shards(out, written))
    first = shards.start * written.shard_size
    unreadable = [first + int(i) for i in np.flatnonzero(np.concatenate([*labels, []]) == UNREADABLE)]
    for index in sorted({sample % len(source) for sample in unreadable}):
        try:
            source.read(index, pixels=pixels)
        except ImageError as error:
            print(f"left out: {error}", file=sys.stderr)
        else:
            print(f"left out: {source.name(index)} could not be read before. Run the command again.", file=sys.stderr)
    if count and len(unreadable) == count:
        raise DataError(f"{out}: none of its images could be read.")
    size, classes = count * written.item_bytes, len(written.classes)
    text = f"{out}: " + (f"part {part}, " if part.count > 1 else "") + f"{count} samples"
    text += f", {len(unreadable)} unreadable" if unreadable else ""
    text += f", {classes} classes, {written.ids} ids of {written.id_bits} bits: "
    text += f"{size / 1e6:.2f} MB of ids in {len(shards)} shards"
    text += f"; {missing} of {written.shards} shards are still missing" if missing else ""
    data = {"folder": str(out), "samples": count, "readable": count - len(unreadable), "classes": classes}
    data |= {name: getattr(written, name) for name in ("ids", "id_bits", "shards", "tokenizer", "precision")}
    return text, data | {"bytes": size, "part": str(part), "missing_shards": missing}


def export(arguments: argparse.Namespace) -> tuple[str, dict]:
    if arguments.to == "datasets":
        require("datasets", "Parquet", "datasets")
    dataset, out = TokenDataset(arguments.tokens), arguments.output
    files = write_export(dataset, out, arguments.to, Progress("exporting"))
    data = {"folder": str(out), "samples": len(dataset), "files": [str(file) for file in files]}
    return f"{out}: {len(dataset)} samples in {len(files)} files", data


def refuse_without_effect(generator: Generator, arguments: argparse.Namespace) -> None:
    """Raise ``UsageError`` for options of sampling that this generator would ignore."""
    settings = generator.config.generator
    order = arguments.order or settings.order
    if arguments.choice_temperature is not None and order != "confidence" and settings.drawing == "categorical":
        raise UsageError(f"--choice-temperature changes nothing in the order {order}. Leave it out.")
    if arguments.guidance is not None and not generator.null_class:
        raise UsageError("--guidance changes nothing: this generator has no classes. Leave it out.")


def generate(arguments: argparse.Namespace) -> tuple[str, dict] | None:
    from flowmo.distributed import join
    from flowmo.generate.generator import load_generator
    from flowmo.generate.samples import check_pair, parse_positions, sample_images, write_samples

    out, as_grid = arguments.output, arguments.output.suffix.lower() == ".png"
    if arguments.edit and not as_grid:
        raise UsageError("--edit writes one image. Name it with --output PICTURE.png.")
    if arguments.keep != arguments.parser.get_default("keep") and not arguments.edit:
        raise UsageError("--keep names tokens of the image of --edit. Add it.")
    if arguments.count and arguments.per_class != arguments.parser.get_default("per_class"):
        raise UsageError("--count is a number of images, --per-class one for each class. Write one of them.")
    if out.suffix:
        check_outputs([out], arguments.force, (".png", ".npz"), [arguments.edit] if arguments.edit else [])
    of_tokenizer, of_generator = split_settings(arguments.settings)
    with join(arguments.device) as world:
        generator = load_generator(arguments.generator, *of_generator, device=str(world.device))
        generator = prepare(generator, arguments)
        tokenizer = prepare(flowmo.load(arguments.model, *of_tokenizer, device=str(world.device)), arguments)
        check_pair(generator, tokenizer)
        refuse_without_effect(generator, arguments)
        names = arguments.classes or [*range(len(generator.vocabulary.classes))] or [-1]
        classes = [generator.label(name) for name in names][: arguments.count or None]
        shown = ", ".join(class_names := [generator.class_name(label) for label in classes])
        count, show = arguments.count or len(classes) * arguments.per_class, Progress("generating")
        class_rows = as_grid and not arguments.count  # one class below another
        labels = [classes[i // arguments.per_class if class_rows else i % len(classes)] for i in range(count)]
        settings = {name: getattr(arguments, name) for name in SAMPLING}
        data = {"file": str(out), "images": count, "classes": class_names, "indices": classes}
        data["guidance"] = guidance = generator.guidance_in_words(arguments.guidance)
        if not as_grid:
            write_samples(generator, tokenizer, labels, out, settings, world=world, progress=show)
            text = f"{guidance}\n{out}: {count} images of {len(classes)} classes"
            return (text + (f": {shown}" if arguments.classes else ""), data) if world.main else None
        if world.size > 1:
            raise UsageError(f"Several processes cannot write {out}. Name a folder or an .npz with --output.")
        if count > MAX_GRID_IMAGES:
            raise UsageError(f"{count} images are too many for one .png. Name a folder or an .npz with --output.")
        if arguments.edit:
            image = resize_and_crop(tokenizer.pixels.read(arguments.edit), generator.vocabulary.image_size)
            codes = tokenizer.encode(to_tensor(image)[None])
            assert codes.ids is not None  # a generator's tokenizer has ids
            ids = codes.ids.expand(count, -1, -1)
            keep = parse_positions(arguments.keep, generator.vocabulary.tokens)[:, None].expand(ids.shape[1:])
            settings |= {"ids": ids, "keep": keep}
        images = sample_images(generator, tokenizer, labels, range(count), **settings, progress=show)
        images = tokenizer.pixels.visible(images)
        columns = min(count, arguments.per_class if class_rows and len(classes) > 1 else GRID_COLUMNS)
        blank = torch.ones_like(images[:1]).expand(-count % columns, -1, -1, -1)
        write(out, to_pil(grid([*torch.cat((images, blank)).split(columns)])))
        return f"{guidance}\n{out}: {count} images, rows of {columns}: {shown}", data | {"columns": columns}
