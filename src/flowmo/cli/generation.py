"""Commands of stage 2: ids, generators, and the pictures that they draw."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flowmo
from flowmo.checkpoint import files as checkpoint
from flowmo.cli.shared import (
    UsageError,
    command,
    finite,
    hasten,
    load,
    positive,
    progress_bar,
    seed,
    tell,
    with_json,
    with_model,
)
from flowmo.codec.context import IntegerModel
from flowmo.config import REVEALING_ORDERS
from flowmo.data import evenly_spread, open_source
from flowmo.evaluate.metrics.pairs import grid
from flowmo.images import ImageError, read_image, to_pil
from flowmo.tokenizer import FlowMo

MOST_IN_A_GRID = 1000
GRID_COLUMNS = 8
GUIDANCE = (
    "classifier-free guidance g of the ids (the generator's: 1.5): null + g (class - null), where the generator has "
    "generator.guided_from=class, as the paper's, class + g (class - null); the paper's 1.5 is 2.5 of the first form"
)


def tokenize(arguments: argparse.Namespace) -> None:
    """The ids of every picture of a dataset, bit-packed in shards: what a generator is trained on.

    Under torchrun the processes share the work. Run again after an interruption, it goes on.
    """
    from flowmo.data.tokens import Tokens
    from flowmo.distributed import join
    from flowmo.generate.tokenize import tokenize as write_tokens

    with join(arguments.device) as world:
        tokenizer = load(arguments, str(world.device))
        source = open_source(arguments.pictures)
        facts = write_tokens(
            tokenizer,
            source,
            arguments.out,
            name=Path(arguments.pictures).name,
            model=Path(arguments.model).name,
            crops=arguments.crops,
            flip=arguments.flip,
            labels=not arguments.no_labels,
            seed=arguments.seed,
            shard_size=arguments.shard_size,
            batch_size=tokenizer.config.eval.batch_size,
            workers=arguments.workers,
            world=world,
            progress=progress_bar("tokenizing"),
        )
        if world.main:
            tokens = Tokens(arguments.out)
            readable = len(tokens)
            unreadable = sorted({number % len(source) for number in {*range(facts.count)} - {*tokens.samples.tolist()}})
            missing = f", {facts.count - readable} of which cannot be read" if readable < facts.count else ""
            for index in unreadable:
                print(f"left out: {source.name(index)} cannot be read", file=sys.stderr)
            tell(
                arguments,
                f"{arguments.out}: {facts.count} samples{missing}, {len(facts.classes)} classes, {facts.ids} ids of "
                f"{facts.id_bits} bits: {facts.count * facts.item_bytes / 1e6:.2f} MB of ids in {facts.shards} shards",
                folder=str(arguments.out),
                samples=facts.count,
                readable=readable,
                classes=len(facts.classes),
                ids=facts.ids,
                id_bits=facts.id_bits,
                bytes=facts.count * facts.item_bytes,
                shards=facts.shards,
                tokenizer=facts.tokenizer,
            )


def context(arguments: argparse.Namespace) -> None:
    """Learn from the ids of many pictures how likely each bit is, so that .flowmo files get shorter.

    TOKENS is a folder that flowmo tokenize wrote. For a tokenizer of native size it is a dataset of pictures, which are
    encoded first. The file belongs beside the tokenizer's, as NAME.context.safetensors beside NAME.safetensors.
    """
    tokenizer = flowmo.load(arguments.model)
    models, packed, bits = (native_contexts if tokenizer.native_size else fixed_contexts)(arguments, tokenizer)
    chosen = list(models.values())[-1]
    content = chosen.save()
    checkpoint.write_content(arguments.out, content)
    facts: dict[str, Any] = {"file": str(arguments.out), "bytes": len(content), "identity": chosen.identity.hex()}
    lines = [f"{arguments.out}: {len(content) / 1024:.0f} KiB, context model {chosen.identity.hex()}"]
    if arguments.held_out:
        facts |= {"pictures": len(packed), "packed": float(packed.mean())}
        lines.append(f"bytes of ids a picture, {len(packed)} others: packed {facts['packed']:.1f}")
        for name, costs in bits.items():
            size = costs.sum(axis=1) / 8
            facts |= {name: float(size.mean()), f"{name}_spread": float(size.std())}
            lines[1] += f", by {name} {size.mean():.1f} ± {size.std():.1f}"
            if tokenizer.native_size:
                planes = (costs.sum(axis=0) / (8 * packed.sum()) * costs.shape[1]).tolist()
                facts[f"{name}_planes"] = planes
                lines.append(f"share of each plane by {name}: {' '.join(f'{share:.3f}' for share in planes)}")
    tell(arguments, "\n".join(lines), **facts)


Contexts = tuple[dict[str, IntegerModel], np.ndarray, dict[str, np.ndarray]]
"""Models by name; of held-out pictures the bytes of packed ids, n, and the bits by each model, n × planes."""


def fixed_contexts(arguments: argparse.Namespace, tokenizer: FlowMo) -> Contexts:
    from flowmo.codec import fit as fitting
    from flowmo.codec.context import cost
    from flowmo.data.tokens import Tokens

    tokens = Tokens(arguments.tokens, tokenizer.identity())
    models = {"frequencies": fitting.frequencies(tokens)}
    if not arguments.frequencies:
        layout = tokenizer.config.model.code_layout
        models["context"] = fitting.fit(tokens, layout, **fit_settings(arguments))
    if not arguments.held_out:
        return {**models}, np.zeros(0), {}
    others = Tokens(arguments.held_out, tokenizer.identity())
    bits = fitting.image_bits(others, range(len(others)))
    costs = {name: cost(model, bits)[:, None] for name, model in models.items()}
    return {**models}, np.full(len(bits), bits[0].size / 8), costs


def native_contexts(arguments: argparse.Namespace, tokenizer: FlowMo) -> Contexts:
    from flowmo.codec import fit_planes

    def ids_of(path: str, show: str) -> list[np.ndarray]:
        source = open_source(path)
        chosen, report = evenly_spread(arguments.count, len(source)), progress_bar(show)
        images = []
        for i, index in enumerate(chosen):
            try:
                codes = tokenizer.encode_image(source.read(index))
            except ImageError as error:
                print(f"flowmo: left out: {error}", file=sys.stderr)
                continue
            images.append(fit_planes.ids_on_lattice(codes, tokenizer))
            if report:
                report(i + 1, len(chosen))
        return images

    images = ids_of(arguments.tokens, "encoding")
    models = {"frequencies": fit_planes.frequencies(images, tokenizer)}
    if not arguments.frequencies:
        models["context"] = fit_planes.fit(images, tokenizer, **fit_settings(arguments))
    if not arguments.held_out:
        return {**models}, np.zeros(0), {}
    others = ids_of(arguments.held_out, "encoding others")
    costs = {name: np.stack([fit_planes.plane_costs(m, ids) for ids in others]) for name, m in models.items()}
    return {**models}, np.array([ids.size * models["frequencies"].shape[1] / 8 for ids in others]), costs


def fit_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that are given; the fits have defaults of their own."""
    given = {"hidden": arguments.hidden, "steps": arguments.fit_steps, "seed": arguments.seed}
    return {"progress": progress_bar("fitting"), **{name: value for name, value in given.items() if value is not None}}


def generate(arguments: argparse.Namespace) -> None:
    """Pictures of classes, drawn by a generator and decoded by the tokenizer whose ids it has learnt.

    Many of them under torchrun, to a folder or to the .npz that FID is taken of: --count 50000 --out samples.npz.
    With --edit, part of a picture's code is kept and the rest drawn anew.
    """
    from flowmo.distributed import join
    from flowmo.generate.generator import load_generator
    from flowmo.generate.produce import Drawing, check_pair, draw, parse_places, produce

    with join(arguments.device) as world:
        generator = load_generator(arguments.generator, *arguments.settings, device=str(world.device))
        generator = hasten(generator, arguments)
        tokenizer = hasten(flowmo.load(arguments.model, device=str(world.device)), arguments)
        check_pair(generator, tokenizer)
        names = arguments.classes or [*range(len(generator.vocabulary.classes))] or [-1]
        classes = [generator.label(name) for name in names]
        class_names = [generator.class_name(label) for label in classes]
        count = arguments.count or len(classes) * arguments.per_class
        rows = (
            arguments.out.suffix == ".png" and not arguments.count
        )  # a picture of pictures, classes one below another
        labels = [classes[i // arguments.per_class if rows else i % len(classes)] for i in range(count)]
        sampled = ("steps", "guidance", "temperature", "last_temperature", "choice_temperature", "order", "seed")
        guided = {"guidance": generator.guidance_in_words(arguments.guidance)}
        drawing = Drawing(
            **{name: getattr(arguments, name) for name in sampled},
            decode_steps=arguments.decode_steps,
            decode_guidance=arguments.decode_guidance,
        )
        if arguments.out.suffix != ".png":
            if arguments.edit:
                raise UsageError("--edit writes one picture; name it with --out PICTURE.png")
            produce(generator, tokenizer, labels, arguments.out, drawing, world=world, progress=progress_bar("drawing"))
            if world.main:
                named = f": {', '.join(class_names)}" if arguments.classes else ""
                line = f"{guided['guidance']}\n{arguments.out}: {count} pictures of {len(classes)} classes{named}"
                told = {"pictures": count, "classes": class_names, "indices": classes, **guided}
                tell(arguments, line, file=str(arguments.out), **told)
            return
        if world.size > 1:
            raise UsageError(f"several processes write a folder or an .npz, not {arguments.out}")
        if count > MOST_IN_A_GRID:
            raise UsageError(f"{count} pictures are too many for one; name a folder or an .npz with --out")
        ids = keep = None
        if arguments.edit:
            codes = tokenizer.encode_image(read_image(arguments.edit), "crop")
            assert codes.ids is not None  # the generator has learnt ids of this tokenizer
            ids = codes.ids.expand(count, -1, -1)
            keep = parse_places(arguments.keep, generator.vocabulary.tokens)[:, None].expand(ids.shape[1:])
        show = progress_bar("drawing")
        drawn = draw(generator, tokenizer, labels, range(count), drawing, ids, keep, show)
        columns = min(count, arguments.per_class if len(classes) > 1 and not arguments.count else GRID_COLUMNS)
        blank = torch.ones_like(drawn[:1]).expand(-count % columns, -1, -1, -1)
        rows = torch.cat((drawn, blank)).split(columns)
        checkpoint.write_whole(arguments.out, lambda name: to_pil(grid(list(rows))).save(name, "PNG"))
        drawn_as = f"{count} pictures, rows of {columns}: {', '.join(class_names)}"
        line = f"{guided['guidance']}\n{arguments.out}: {drawn_as}"
        tell(
            arguments,
            line,
            file=str(arguments.out),
            pictures=count,
            classes=class_names,
            indices=classes,
            columns=columns,
            **guided,
        )


def add_to(commands: Any) -> None:
    sub = command(tokenize, "a dataset's ids, for a generator to learn", commands)
    sub.add_argument("pictures", metavar="PICTURES", help="folder, .tar, WebDataset shards, hf:NAME:SPLIT")
    sub.add_argument("--out", type=Path, required=True, help="folder to write the shards to, or to go on with")
    sub.add_argument("--crops", type=positive, default=1, help="1 is the central square; more are random ones (1)")
    sub.add_argument("--flip", action="store_true", help="each crop mirrored as well")
    sub.add_argument("--no-labels", action="store_true", help="leave the classes out")
    sub.add_argument("--seed", type=seed, default=0, help="seed of random crops (0)")
    sub.add_argument("--shard-size", type=positive, default=4096, help="samples a shard, which are lost at most (4096)")
    sub.add_argument("--workers", type=int, default=0, help="processes that read pictures (0)")
    with_model(sub)
    with_json(sub)

    sub = command(context, "a model of a tokenizer's ids that makes .flowmo files shorter", commands)
    sub.add_argument(
        "tokens", metavar="TOKENS", help="folder that flowmo tokenize wrote; a dataset of pictures for native size"
    )
    sub.add_argument("--out", type=Path, required=True, help="file to write, MODEL.context.safetensors")
    sub.add_argument("--model", default="nano", help="the tokenizer whose ids they are (nano)")
    sub.add_argument("--held-out", metavar="TOKENS", help="other pictures or their ids, to measure on")
    sub.add_argument("--frequencies", action="store_true", help="only count how often each bit is set")
    sub.add_argument("--count", type=positive, default=1000, help="native size: pictures to take of a dataset (1000)")
    sub.add_argument("--hidden", type=positive, help="hidden units (128; native size: 64)")
    sub.add_argument("--fit-steps", type=positive, help="steps of 512 tokens (4000; native size: 2000 of 1024 cells)")
    sub.add_argument("--seed", type=seed, default=0, help="seed of weights and order (0)")
    with_json(sub)

    sub = command(generate, "pictures of a class, by a trained generator", commands)
    sub.add_argument("generator", metavar="GENERATOR", help="file of a generator: .safetensors, or a checkpoint")
    sub.add_argument(
        "--class",
        dest="classes",
        nargs="+",
        metavar="CLASS",
        help="name, WordNet id, or index where no class has that name (all)",
    )
    sub.add_argument("--per-class", type=positive, default=8, help="pictures of each (8)")
    sub.add_argument("--count", type=positive, help="pictures in all, shared evenly by the classes")
    sub.add_argument("--out", type=Path, default=Path("generated.png"), help="a .png, a folder or .npz (generated.png)")
    sub.add_argument("--edit", type=Path, metavar="PICTURE", help="start from a picture's code")
    sub.add_argument("--keep", default="0-0", metavar="TOKENS", help="of --edit: tokens that stay, such as 0-31,40")
    sub.add_argument("--steps", type=positive, help="steps from hidden ids to all (the generator's: 64)")
    sub.add_argument("--guidance", type=finite, help=GUIDANCE)
    sub.add_argument("--temperature", type=finite, help="softmax temperature of the first step (1.3)")
    sub.add_argument("--last-temperature", type=finite, help="and of the last (0.5)")
    sub.add_argument("--choice-temperature", type=finite, help="noise in which ids are kept (4.5)")
    sub.add_argument("--order", choices=REVEALING_ORDERS, help="which ids are revealed first (confidence)")
    sub.add_argument("--seed", type=seed, default=0, help="seed of everything (0)")
    sub.add_argument("--decode-steps", type=positive, help="Euler steps of the tokenizer (its own)")
    sub.add_argument("--decode-guidance", type=finite, help="guidance of the tokenizer (its own)")
    with_model(sub)
    with_json(sub)
