"""Commands of stage 2: tokenize a dataset, fit a context model to its ids, generate images."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flowmo
from flowmo.cli.options import DATASET, FINITE, JSON, MODEL, POSITIVE, SEED, command, load, number, option, prepare
from flowmo.cli.output import UsageError, progress_bar, write
from flowmo.config import UNMASKING_ORDERS
from flowmo.data import DataError, Source, TokenDataset, evenly_spread, open_source
from flowmo.data.export import WRITERS
from flowmo.data.export import export as write_export
from flowmo.data.token_files import UNREADABLE, Part, TokenMetadata, missing_shards, read_labels
from flowmo.evaluate.metrics.pairs import grid
from flowmo.images import ImageError, read_image, to_pil
from flowmo.tokenizer import FlowMo

MAX_GRID_IMAGES = 1000
GRID_COLUMNS = 8
GUIDANCE = (
    "classifier-free guidance g of the ids: null + g (class - null), or with generator.guided_from=class, as the "
    "paper's, class + g (class - null); the paper's 1.5 is 2.5 of the first form (default: the generator's, 1.5)"
)


@command(
    "write a dataset's ids, which train a generator",
    option("images", metavar="PICTURES", help=DATASET),
    option("--out", type=Path, required=True, help="folder for the shards; an interrupted one is completed"),
    option("--crops", type=POSITIVE, default=1, help="crops per image: 1 is the central square, more are random"),
    option("--flip", action="store_true", help="add the mirror image of each crop"),
    option("--no-labels", action="store_true", help="leave out the classes"),
    option("--seed", type=SEED, default=0, help="seed of random crops"),
    option("--shard-size", type=POSITIVE, default=4096, help="samples per shard; an interruption loses at most one"),
    option("--workers", type=number(int, 0), default=0, help="processes that read images"),
    option("--part", default="1/1", metavar="K/N", help="write only the K-th of N parts, as one of N jobs"),
    *(*MODEL, JSON),
)
def tokenize(arguments: argparse.Namespace) -> tuple[str, dict] | None:
    """Write the ids of every image of a dataset, bit-packed in shards, for training a generator.

    Under torchrun the processes share the work. Run an interrupted command again to complete it.
    """
    from flowmo.distributed import join
    from flowmo.generate.tokenize import tokenize as write_tokens

    part = Part.parse(arguments.part)
    with join(arguments.device) as world:
        tokenizer = load(arguments, str(world.device))
        source = open_source(arguments.images)
        written = write_tokens(
            tokenizer,
            source,
            arguments.out,
            name=Path(arguments.images).name,
            model=Path(arguments.model).name,
            labels=not arguments.no_labels,
            batch_size=tokenizer.config.eval.batch_size,
            part=part,
            world=world,
            progress=progress_bar("tokenizing"),
            on_mixed=lambda message: print(f"flowmo: {message}", file=sys.stderr),
            **{name: getattr(arguments, name) for name in ("crops", "flip", "seed", "shard_size", "workers")},
        )
        return describe_tokens(arguments.out, written, part, source) if world.main else None


def describe_tokens(out: Path, written: TokenMetadata, part: Part, source: Source) -> tuple[str, dict]:
    """Describe what a job wrote. Prints the names of images that cannot be read."""
    shards = part.shards(written.shards)
    labels = [read_labels(out, written, number) for number in shards]
    count, missing = sum(map(len, labels)), len(missing_shards(out, written))
    first = shards.start * written.shard_size
    unreadable = [first + int(i) for i in np.flatnonzero(np.concatenate([*labels, []]) == UNREADABLE)]
    for index in sorted({sample % len(source) for sample in unreadable}):
        print(f"left out: {source.name(index)} cannot be read", file=sys.stderr)
    if part.count == 1 and len(unreadable) == count:
        raise DataError(f"{out}: none of its images could be read.")
    size, classes = count * written.item_bytes, len(written.classes)
    text = f"{out}: " + (f"part {part}, " if part.count > 1 else "") + f"{count} samples"
    text += f", {len(unreadable)} of which cannot be read" if unreadable else ""
    text += f", {classes} classes, {written.ids} ids of {written.id_bits} bits: "
    text += f"{size / 1e6:.2f} MB of ids in {len(shards)} shards"
    text += f"; {missing} of {written.shards} shards are still missing" if missing else ""
    data = {"folder": str(out), "samples": count, "readable": count - len(unreadable), "classes": classes}
    data |= {name: getattr(written, name) for name in ("ids", "id_bits", "shards", "tokenizer", "precision")}
    return text, data | {"bytes": size, "part": str(part), "missing_shards": missing}


@command(
    "convert tokens to WebDataset tars or a Hugging Face dataset",
    option("tokens", metavar="TOKENS", help="folder written by flowmo tokenize"),
    option("out", metavar="OUT", type=Path, help="folder for the files; an interrupted one is completed"),
    option("--to", choices=(*WRITERS,), required=True, help="webdataset: .tar files; datasets: .parquet files"),
    JSON,
)
def export(arguments: argparse.Namespace) -> tuple[str, dict]:
    """Convert a folder of tokens to files that other tools read: one for each shard, with its ids and labels."""
    dataset, out = TokenDataset(arguments.tokens), arguments.out
    files, written = write_export(dataset, out, arguments.to, progress_bar("exporting"))
    data = {"folder": str(out), "samples": len(dataset), "files": [str(file) for file in files], "written": written}
    return f"{out}: {len(dataset)} samples in {len(files)} files, {written} of them written now", data


@command(
    "fit a context model of a tokenizer's ids, which makes .flowmo files shorter",
    option("tokens", metavar="TOKENS", help="folder written by flowmo tokenize; native size: a dataset of images"),
    option("--out", type=Path, required=True, help="file to write, MODEL.context.safetensors"),
    option("--model", default="nano", help="tokenizer of the ids"),
    option("--held-out", metavar="TOKENS", help="other ids, or for native size images, to measure on"),
    option("--frequencies", action="store_true", help="only count how often each bit is set"),
    option("--count", type=POSITIVE, default=1000, help="native size: images to take of a dataset"),
    option("--hidden", type=POSITIVE, help="hidden units (default: 128; native size: 64)"),
    option("--fit-steps", type=POSITIVE, help="steps of 512 tokens (default: 4000; native size: 2000 of 1024 cells)"),
    option("--seed", type=SEED, default=0, help="seed of weights and order"),
    JSON,
)
def context(arguments: argparse.Namespace) -> tuple[str, dict]:
    """Fit a context model to the ids of many images: how likely each bit is, so that .flowmo files get shorter.

    TOKENS is a folder written by flowmo tokenize. For a tokenizer of native size it is a dataset of images, which are
    encoded first. The file belongs beside the tokenizer's: NAME.context.safetensors beside NAME.safetensors.
    """
    from flowmo.codec import fit, fit_planes

    tokenizer, named = flowmo.load(arguments.model), {"hidden": arguments.hidden, "steps": arguments.fit_steps}
    settings = {"seed": arguments.seed} | {name: value for name, value in named.items() if value is not None}
    read: Any = partial(TokenDataset, tokenizer=tokenizer.identity())
    frequencies: Any = fit.frequencies
    fit_context: Any = partial(fit.fit, layout=tokenizer.config.model.code_layout)
    if tokenizer.native_size:
        read = partial(encode_dataset, tokenizer=tokenizer, count=arguments.count)
        frequencies, fit_context = (partial(f, tokenizer=tokenizer) for f in (fit_planes.frequencies, fit_planes.fit))
    ids = read(arguments.tokens)
    models = {"frequencies": frequencies(ids)}
    if not arguments.frequencies:
        models["context"] = fit_context(ids, progress=progress_bar("fitting"), **settings)
    chosen = models.get("context", models["frequencies"])
    content = chosen.save()
    write(arguments.out, content)
    data: dict[str, Any] = {"file": str(arguments.out), "bytes": len(content), "identity": chosen.identity.hex()}
    lines = [f"{arguments.out}: {len(content) / 1024:.0f} KiB, context model {chosen.identity.hex()}"]
    if arguments.held_out:
        measure: Any = fit_planes.code_lengths if tokenizer.native_size else fit.code_lengths
        packed, lengths = measure(models, read(arguments.held_out))
        data |= {"pictures": len(packed), "packed": float(packed.mean() / 8)}
        lines.append(f"bytes of ids a picture, {len(packed)} others: packed {data['packed']:.1f}")
        for name, bits in lengths.items():
            size = bits.sum(axis=1) / 8
            data |= {name: float(size.mean()), f"{name}_spread": float(size.std())}
            lines[1] += f", by {name} {size.mean():.1f} ± {size.std():.1f}"
            if tokenizer.native_size:
                planes = (bits.sum(axis=0) / packed.sum() * bits.shape[1]).tolist()
                data[f"{name}_planes"] = planes
                lines.append(f"share of each plane by {name}: {' '.join(f'{share:.3f}' for share in planes)}")
    return "\n".join(lines), data


def encode_dataset(path: str, tokenizer: FlowMo, count: int) -> list[np.ndarray]:
    """Encode up to ``count`` images, evenly spread over a dataset. Returns ids rows × columns × planes of each."""
    from flowmo.codec.fit_planes import ids_on_lattice

    source, images = open_source(path), []
    chosen, show = evenly_spread(count, len(source)), progress_bar("encoding")
    for i, index in enumerate(chosen):
        try:
            images.append(ids_on_lattice(tokenizer.encode_image(source.read(index)), tokenizer))
        except ImageError as error:
            print(f"flowmo: left out: {error}", file=sys.stderr)
        if show:
            show(i + 1, len(chosen))
    return images


@command(
    "generate images of classes with a trained generator",
    option("generator", metavar="GENERATOR", help="generator's .safetensors file or training checkpoint"),
    option("--class", dest="classes", nargs="+", metavar="CLASS", help="name, WordNet id or index (default: all)"),
    option("--per-class", type=POSITIVE, default=8, help="images per class"),
    option("--count", type=POSITIVE, help="images in total, shared evenly by the classes"),
    option("--out", type=Path, default=Path("generated.png"), help="a .png, a folder or an .npz"),
    option("--edit", type=Path, metavar="PICTURE", help="start from the ids of this image"),
    option("--keep", default="0-0", metavar="TOKENS", help="with --edit: tokens to keep, such as 0-31,40"),
    option("--steps", type=POSITIVE, help="steps from masked ids to all ids (default: the generator's, 64)"),
    option("--guidance", type=FINITE, help=GUIDANCE),
    option("--temperature", type=FINITE, help="softmax temperature of the first step (default: 1.3)"),
    option("--last-temperature", type=FINITE, help="softmax temperature of the last step (default: 0.5)"),
    option("--choice-temperature", type=FINITE, help="noise in the choice of ids to keep (default: 4.5)"),
    option("--order", choices=UNMASKING_ORDERS, help="order in which ids are unmasked (default: confidence)"),
    option("--seed", type=SEED, default=0, help="seed of everything random"),
    option("--decode-steps", type=POSITIVE, help="sampling steps of the tokenizer (default: its own)"),
    option("--decode-guidance", type=FINITE, help="guidance of the tokenizer (default: its own)"),
    *(*MODEL, JSON),
)
def generate(arguments: argparse.Namespace) -> tuple[str, dict] | None:
    """Generate ids of classes and decode them with the tokenizer that the generator was trained on.

    Many images go to a folder, or to the .npz that FID reads, also under torchrun: --count 50000 --out samples.npz.
    With --edit, part of an image's ids is kept and the rest generated.
    """
    from flowmo.distributed import join
    from flowmo.generate.generator import load_generator
    from flowmo.generate.samples import SampleSettings, check_pair, parse_positions, sample_images, write_samples

    out, as_grid = arguments.out, arguments.out.suffix == ".png"
    if arguments.edit and not as_grid:
        raise UsageError("--edit writes one image. Name it with --out PICTURE.png.")
    with join(arguments.device) as world:
        generator = load_generator(arguments.generator, *arguments.settings, device=str(world.device))
        generator = prepare(generator, arguments)
        tokenizer = prepare(flowmo.load(arguments.model, device=str(world.device)), arguments)
        check_pair(generator, tokenizer)
        names = arguments.classes or [*range(len(generator.vocabulary.classes))] or [-1]
        classes = [generator.label(name) for name in names]
        shown = ", ".join(class_names := [generator.class_name(label) for label in classes])
        count, show = arguments.count or len(classes) * arguments.per_class, progress_bar("generating")
        class_rows = as_grid and not arguments.count  # one class below another
        labels = [classes[i // arguments.per_class if class_rows else i % len(classes)] for i in range(count)]
        settings = SampleSettings(**{field.name: getattr(arguments, field.name) for field in fields(SampleSettings)})
        data = {"file": str(out), "pictures": count, "classes": class_names, "indices": classes}
        data["guidance"] = guidance = generator.guidance_in_words(arguments.guidance)
        if not as_grid:
            write_samples(generator, tokenizer, labels, out, settings, world=world, progress=show)
            text = f"{guidance}\n{out}: {count} pictures of {len(classes)} classes"
            return (text + (f": {shown}" if arguments.classes else ""), data) if world.main else None
        if world.size > 1:
            raise UsageError(f"Several processes cannot write {out}. Name a folder or an .npz with --out.")
        if count > MAX_GRID_IMAGES:
            raise UsageError(f"{count} images are too many for one .png. Name a folder or an .npz with --out.")
        ids = keep = None
        if arguments.edit:
            codes = tokenizer.encode_image(read_image(arguments.edit), "crop")
            assert codes.ids is not None  # a generator's tokenizer has ids
            ids = codes.ids.expand(count, -1, -1)
            keep = parse_positions(arguments.keep, generator.vocabulary.tokens)[:, None].expand(ids.shape[1:])
        images = sample_images(generator, tokenizer, labels, range(count), settings, ids, keep, show)
        columns = min(count, arguments.per_class if class_rows and len(classes) > 1 else GRID_COLUMNS)
        blank = torch.ones_like(images[:1]).expand(-count % columns, -1, -1, -1)
        write(out, to_pil(grid([*torch.cat((images, blank)).split(columns)])))
        return f"{guidance}\n{out}: {count} pictures, rows of {columns}: {shown}", data | {"columns": columns}
