"""The command line: thin, every command is a few calls of the library.

Errors that a user can mend are one line on standard error and exit status 2; an interrupt exits with 130.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import flowmo
from flowmo import checkpoint, codec, sample
from flowmo.codec import CodecError
from flowmo.config import FIELDS, GENERATOR_PRESETS, PRESETS, REVEALING_ORDERS, Config
from flowmo.data import Source, build_index, default_index, evenly_spread, open_source
from flowmo.distributed import World
from flowmo.errors import FlowMoError
from flowmo.evaluate.figures import grid, psnr
from flowmo.evaluate.reconstruction import Judges, Reconstructor
from flowmo.pictures import Tiling, read_picture, resize_and_crop, to_picture, to_rgb, to_tensor
from flowmo.sharded import is_sharded
from flowmo.studies import SCALES, STUDIES
from flowmo.tokenizer import FlowMo

SETTING = re.compile(r"([a-z_]+(\.[a-z_0-9]+)+|global_seed)=.*", re.DOTALL)
SUFFIX = ".flowmo"
MOST_IN_A_GRID = 1000
GRID_COLUMNS = 8


class UsageError(FlowMoError):
    """Arguments that make no sense together."""


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    settings = [word for word in words if SETTING.fullmatch(word)]
    parser = build_parser()
    arguments = parser.parse_args([word for word in words if word not in settings])
    arguments.settings = settings
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("flowmo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FlowMoError, OSError) as error:
        print(f"flowmo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


# Commands


def reconstruct(arguments: argparse.Namespace) -> None:
    """Encode and decode pictures; write each beside its original and print what it cost."""
    tokenizer = load(arguments)
    outputs = [arguments.out / f"{path.stem}.png" for path in arguments.pictures]
    refuse_clash(outputs)
    originals = [read_picture(path) for path in arguments.pictures]  # refuse before anything is written
    print(f"{'picture':28} {'size':>11} {'bytes':>7} {'bits/pixel':>10} {'PSNR dB':>8}")
    for path, original, output in zip(arguments.pictures, originals, outputs, strict=True):
        codes = tokenizer.encode_image(original, arguments.fit)
        if arguments.fit == "crop":
            original = resize_and_crop(to_rgb(original), tokenizer.config.data.image_size)
        decoded = tokenizer.decode_image(codes, **sampling(arguments), progress=progress_bar(path.name))
        pair = torch.stack((to_tensor(original), to_tensor(decoded)))
        checkpoint.write_whole(output, lambda name, pair=pair: to_picture(grid([pair])).save(name, "PNG"))
        quality = float(psnr(pair[:1], pair[1:]))
        size = f"{original.width}×{original.height}"
        print(f"{path.name[:28]:28} {size:>11} {codes.nbytes:>7} {codes.bits_per_pixel:>10.4f} {quality:>8.2f}")
    print(f"original | reconstruction in {arguments.out}/")


def encode(arguments: argparse.Namespace) -> None:
    """Write the ids of a picture to a .flowmo file."""
    if arguments.output is not None and len(arguments.pictures) > 1:
        raise UsageError("--output names one file, for one picture; --out-dir takes many")
    tokenizer = load(arguments)
    outputs = [
        arguments.output or (arguments.out_dir or path.parent) / f"{path.stem}{SUFFIX}" for path in arguments.pictures
    ]
    refuse_clash(outputs)
    originals = [read_picture(path) for path in arguments.pictures]  # refuse before anything is written
    for original, output in zip(originals, outputs, strict=True):
        codes = tokenizer.encode_image(original, arguments.fit)
        content = codec.pack(codes, tokenizer)
        checkpoint.write_whole(output, lambda name, content=content: Path(name).write_bytes(content))
        print(f"{output}: {codes.nbytes} bytes of ids, {len(content)} with the header")


def decode(arguments: argparse.Namespace) -> None:
    """Draw the picture of a .flowmo file."""
    tokenizer = load(arguments)
    size = arguments.file.stat().st_size
    if size > codec.MAX_BYTES:
        raise CodecError(f"{arguments.file}: {size} bytes are more than a .flowmo file can have")
    try:
        codes = codec.unpack(arguments.file.read_bytes(), tokenizer)
    except CodecError as error:
        raise CodecError(f"{arguments.file}: {error}") from None
    output = arguments.output or arguments.file.with_suffix(".png")
    if arguments.ids:
        print(json.dumps(codes.ids.tolist()))
        return
    picture = tokenizer.decode_image(codes, **sampling(arguments), progress=progress_bar(arguments.file.name))
    checkpoint.write_whole(output, lambda name: picture.save(name, "PNG"))
    print(f"{output}: {picture.width}×{picture.height} from {codes.nbytes} bytes of ids")


def tokenize(arguments: argparse.Namespace) -> None:
    """The ids of every picture of a dataset, bit-packed in shards: what a generator is trained on.

    Under torchrun the processes share the work. Run again after an interruption, it goes on.
    """
    from flowmo.data.tokens import Tokens
    from flowmo.distributed import join
    from flowmo.generate.tokenize import tokenize as write_tokens

    with join(arguments.device) as world:
        tokenizer = flowmo.load(arguments.model, *arguments.settings, device=str(world.device))
        facts = write_tokens(
            tokenizer,
            open_source(arguments.pictures),
            arguments.out,
            name=Path(arguments.pictures).name,
            model=Path(arguments.model).name,
            crops=arguments.crops,
            flip=arguments.flip,
            seed=arguments.seed,
            shard_size=arguments.shard_size,
            batch_size=tokenizer.config.eval.batch_size,
            workers=arguments.workers,
            world=world,
            progress=progress_bar("tokenizing"),
        )
        if world.main:
            readable = len(Tokens(arguments.out))
            missing = f", {facts.count - readable} of which cannot be read" if readable < facts.count else ""
            print(
                f"{arguments.out}: {facts.count} samples{missing}, {len(facts.classes)} classes, {facts.ids} ids of "
                f"{facts.id_bits} bits: {facts.count * facts.record / 1e6:.2f} MB of ids in {facts.shards} shards"
            )


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
        tokenizer = flowmo.load(arguments.model, device=str(world.device))
        check_pair(generator, tokenizer)
        names = arguments.classes or [str(i) for i in range(len(generator.vocabulary.classes))] or ["-1"]
        classes = [generator.label(name) for name in names]
        count = arguments.count or len(classes) * arguments.per_class
        labels = [classes[i * len(classes) // count] for i in range(count)]
        sampled = ("steps", "guidance", "temperature", "last_temperature", "choice_temperature", "order", "seed")
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
                print(f"{arguments.out}: {count} pictures of {len(classes)} classes")
            return
        if world.size > 1:
            raise UsageError(f"several processes write a folder or an .npz, not {arguments.out}")
        if count > MOST_IN_A_GRID:
            raise UsageError(f"{count} pictures are too many for one; name a folder or an .npz with --out")
        ids = keep = None
        if arguments.edit:
            ids = tokenizer.encode_image(read_picture(arguments.edit), "crop").ids.expand(count, -1, -1)
            keep = parse_places(arguments.keep, generator.vocabulary.tokens)[:, None].expand(ids.shape[1:])
        show = progress_bar("drawing")
        drawn = draw(generator, tokenizer, labels, range(count), drawing, ids, keep, show)
        columns = min(count, arguments.per_class if len(classes) > 1 and not arguments.count else GRID_COLUMNS)
        blank = torch.ones_like(drawn[:1]).expand(-count % columns, -1, -1, -1)
        rows = torch.cat((drawn, blank)).split(columns)
        checkpoint.write_whole(arguments.out, lambda name: to_picture(grid(list(rows))).save(name, "PNG"))
        print(f"{arguments.out}: {count} pictures, rows of {columns}: {', '.join(map(generator.class_name, classes))}")


def info(arguments: argparse.Namespace) -> None:
    """What a preset, checkpoint or settings make, without allocating weights."""
    config = described_config(arguments)
    if config.generator.train:
        facts = describe_generator(config)
    else:
        with torch.device("meta"):
            tokenizer = FlowMo(config)
        facts = describe(tokenizer)
    if arguments.training and not config.generator.train:
        from flowmo.train.account import describe_training

        facts |= describe_training(config)
    if arguments.json:
        print(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        if name != "settings":
            print(f"{name.replace('_', ' '):24} {value}")
    if arguments.settings_too:
        for name, field in FIELDS.items():
            section, value = config, None
            for part in name.split("."):
                section = value = getattr(section, part)
            print(f"{name}={value}".ljust(42) + f" {field.metadata['doc']}")


def described_config(arguments: argparse.Namespace) -> Config:
    source = str(arguments.source)
    if source.endswith((".yaml", ".yml")):
        return Config.from_yaml(source).override(*arguments.settings)
    if source in PRESETS | GENERATOR_PRESETS:
        return flowmo.preset(source).override(*arguments.settings)
    return checkpoint.read_config(checkpoint.find(source), tuple(arguments.settings))


def describe(tokenizer: FlowMo) -> dict:
    """Parameters, rate and passes of a tokenizer, which may be on the meta device."""
    config, s = tokenizer.config, tokenizer.config.eval.sampling
    times = sample.evaluations(s.solver, sample.shifted_times(s.sample_steps, s.rho))

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    bits = config.bits_per_picture
    return {
        "parameters": count(tokenizer),
        "encoder_parameters": count(tokenizer.encoder),
        "decoder_parameters": count(tokenizer.decoder),
        "picture_size": f"{config.data.image_size}×{config.data.image_size}",
        "code_tokens": config.model.code_length,
        "channels_per_token": config.model.context_dim,
        "ids_per_token": tokenizer.quantizer.sub_tokens,
        "id_count": tokenizer.quantizer.id_count,
        "bytes_per_picture": None if bits is None else math.ceil(bits / 8),
        "bits_per_pixel": None if bits is None else round(config.bits_per_pixel, 4),
        "sampling_steps": s.sample_steps,
        "passes_per_picture": sample.network_passes(times, s.guidance, s.guidance_low, s.guidance_high),
        "settings": config.to_dict(),
    }


def describe_generator(config: Config) -> dict:
    """Parameters of a generator of 256 × 2 ids of 9 bits and 1000 classes, as the paper's."""
    from flowmo.data.tokens import Vocabulary
    from flowmo.generate.generator import Generator

    shape = {"tokens": 256, "sub_tokens": 2, "id_bits": 9, "classes": ("",) * 1000}
    with torch.device("meta"):
        generator = Generator(config, Vocabulary(tokenizer="", model="", image_size=256, **shape))
    own = config.generator
    return {
        "parameters": sum(p.numel() for p in generator.parameters()),
        "for": "512 ids of 9 bits, 1000 classes",
        "width": own.hidden_size,
        "blocks": own.depth,
        "heads": own.num_heads,
        "sampling_steps": own.sample_steps,
        "settings": config.to_dict(),
    }


def bench(arguments: argparse.Namespace) -> None:
    """How fast a model encodes and decodes here, beside what the machine can do at most."""
    from flowmo.bench import measure

    tokenizer = load(arguments)
    timings = measure(tokenizer, arguments.batch, arguments.bfloat16, arguments.repeats)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(timing) for timing in timings], indent=1))
        return
    print("\n".join(timing.line() for timing in timings))
    print(f"matrix rate {timings[0].matrix_rate / 1e12:.2f} TFLOP/s, copy rate {timings[0].copy_rate / 1e9:.0f} GB/s")


def convert(arguments: argparse.Namespace) -> None:
    """Rewrite any checkpoint, of a tokenizer or a generator, as one .safetensors file with its settings inside."""
    if arguments.output.suffix != ".safetensors":
        raise UsageError(f"{arguments.output}: the output is a .safetensors file")
    dtype = {"float32": torch.float32, "float16": torch.float16}[arguments.dtype]
    if is_generator(arguments.source):
        from flowmo.generate.generator import load_generator, save_generator

        generator = load_generator(arguments.source, *arguments.settings, ema=not arguments.last_weights)
        save_generator(generator, arguments.output, dtype)
        print(f"{arguments.output}: {arguments.output.stat().st_size / 2**20:.1f} MiB, a generator")
        return
    tokenizer = flowmo.load(arguments.source, *arguments.settings, ema=not arguments.last_weights)
    flowmo.save(tokenizer, arguments.output, dtype)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 2**20:.1f} MiB, tokenizer {tokenizer.identity()}")


def index(arguments: argparse.Namespace) -> None:
    """Write the index of each tar of pictures, or of tars, so that training reads it without unpacking."""
    if arguments.output is not None and len(arguments.tars) > 1:
        raise UsageError("--output names one index, of one tar; many have theirs beside them")
    for tar in arguments.tars:
        output = arguments.output or default_index(tar)
        entries = build_index(tar)
        checkpoint.write_whole(output, lambda name, entries=entries: Path(name).write_text(json.dumps(entries)))
        print(f"{output}: {len(entries)} pictures")


def train(arguments: argparse.Namespace) -> None:
    """Stage 1A on pictures; with model.posttrain_sample=true stage 1B; with a generator's preset stage 2, on tokens."""
    from flowmo.distributed import join
    from flowmo.train.loop import Run

    config = flowmo.preset(arguments.preset)
    if arguments.config:
        config = Config.from_yaml(arguments.config, config)
    config = config.override(*arguments.settings)
    if not config.data.train:
        raise UsageError(
            "data.train is not set; name a folder or a .tar of pictures, data.train=PATH; of tokens for a generator"
        )
    folder = arguments.results_dir / arguments.experiment_name
    with join(arguments.device, group=config.trainer.parallel == "fsdp") as world:
        Run(config, folder, world, arguments.resume_from_ckpt, lambda line: print(line, flush=True)).train()


def evaluate(arguments: argparse.Namespace) -> None:
    """How close reconstructions come to pictures, or how good generated pictures are.

    With PICTURES: PSNR, SSIM, LPIPS, rFID and bits per pixel of a model, beside codecs with --peers; as files with
    --report. With --reference: FID and its companions of generated PICTURES. Without PICTURES: the newest checkpoint
    of a run, eval.eval_dir=results/RUN, or with eval.continuous=true each as it comes.
    """
    from flowmo.distributed import join
    from flowmo.evaluate.features import build_features
    from flowmo.evaluate.follow import Follower
    from flowmo.evaluate.generation import GenerationSummary, look, open_pictures

    def say(line: str, to: Any = None) -> None:
        if world.main:
            print(line, file=to, flush=True)

    with join(arguments.device) as world:
        if arguments.reference:
            if not arguments.pictures or arguments.features == "none":
                raise UsageError("--reference compares generated PICTURES by a feature network; name both")
            sets = [open_pictures(path) for path in (arguments.pictures, arguments.reference)]
            network = build_features(arguments.features).to(world.device)
            show = progress_bar("looking")
            seen = [look(pictures, network, device=world.device, world=world, progress=show) for pictures in sets]
            found = GenerationSummary.of(*seen, network, tuple(pictures.name for pictures in sets))
            say(json.dumps(found.as_dict(), indent=1) if arguments.json else "\n".join(found.lines()))
            return
        source = open_source(arguments.pictures) if arguments.pictures else None
        judges, missing = Judges.find(() if arguments.no_lpips else ("alex", "vgg"), arguments.features)
        judges.to(world.device)
        if source is None:
            folder = arguments.results_dir / arguments.experiment_name
            Follower(arguments.settings, folder, judges, world, say).evaluate()
        else:
            compare(arguments, source, judges, world, say)
        for line in missing:
            say(line, sys.stderr)


def compare(arguments: argparse.Namespace, source: Source, judges: Judges, world: World, say: Callable) -> None:
    """A model beside its peers on some pictures."""
    from flowmo.evaluate.codecs import FORMATS, CodecReconstructor
    from flowmo.evaluate.peers import SIDE, build_peer
    from flowmo.evaluate.reconstruction import FlowMoReconstructor, Pace, measure
    from flowmo.evaluate.report import Entry, weights_hash, write_report
    from flowmo.evaluate.summary import Summary

    tokenizer = flowmo.load(arguments.model, *arguments.settings, device=str(world.device))
    own, preset = tokenizer.config.data.image_size, tokenizer.config.eval
    side = arguments.size or own
    steps, guidance = arguments.steps or preset.sampling.sample_steps, arguments.guidance or preset.sampling.guidance
    name = Path(arguments.model).stem
    candidates: list[Reconstructor] = [
        FlowMoReconstructor(tokenizer, arguments.steps, arguments.seed, arguments.guidance, name)
    ]
    model = tokenizer.config.model
    tiles = len(Tiling(side, side, own).corners)
    budget = math.ceil(tiles * (tokenizer.config.bits_per_picture or 32 * model.code_length * model.context_dim) / 8)
    for peer in arguments.peers:
        kind, _, weights = peer.partition("=")
        if kind in FORMATS:
            candidates += [CodecReconstructor(kind, budget, headers) for headers in (True, False)]
            continue
        if side != SIDE:
            raise UsageError(f"{kind} works at {SIDE} × {SIDE}, not at {side} × {side}; add --size {SIDE}")
        candidates.append(build_peer(kind, weights or None, world.device))
    judges.remember = len(candidates) > 1
    depends = {"steps": steps, "seed": arguments.seed, "guidance": guidance, "budget": budget}
    depends["identity"] = tokenizer.identity()
    entries = []
    for candidate in candidates:
        pace = Pace()
        measured = measure(
            candidate,
            source,
            side,
            judges,
            limit=arguments.limit,
            batch_size=preset.batch_size,
            device=world.device,
            world=world,
            enlarge=arguments.enlarge,
            folder=arguments.report / "measured" / candidate.name if arguments.report else None,
            facts=depends,
            pace=pace,
            progress=progress_bar(candidate.name),
        )
        summary = Summary.of(candidate.name, measured, side, judges.features)
        entries.append(Entry(candidate, measured, summary, pace))
        if not arguments.json:
            say(f"{candidate.name}: {summary.pictures} pictures, short side resized to {side}, central square")
            say("\n".join(summary.lines()) + "\n")
    if arguments.json:
        rows = [{**entry.summary.as_dict(), "steps": steps, "seed": arguments.seed} for entry in entries]
        say(json.dumps(rows[0] if len(rows) == 1 else rows, indent=1))
    if arguments.report and world.main:
        chosen = evenly_spread(arguments.limit or len(source), len(source))
        networks = {"LPIPS (AlexNet)": judges.lpips_alex, "LPIPS (VGG)": judges.lpips_vgg, "features": judges.features}
        facts = {
            "pictures": f"{shown_path(arguments.pictures)}: {len(chosen)} of {len(source)}, evenly spread",
            "protocol": f"short side resized to {side} (bilinear, antialiased), central square of {side} × {side}",
            "model": f"{shown_path(arguments.model)}, tokenizer {tokenizer.identity()}",
            "tiles a picture": tiles,
            "sampling": f"{steps} steps, seed {arguments.seed}, guidance {guidance}",
            "judges' weights": {key: weights_hash(network) for key, network in networks.items() if network is not None},
        }
        if arguments.peers:
            facts["codecs"] = f"highest quality within {budget} bytes a picture: whole files, and without their headers"
        write_report(arguments.report, entries, source, chosen, side, facts)
        say(f"report in {arguments.report}/index.html")


def study(arguments: argparse.Namespace) -> None:
    """A table or figure of the paper as a recipe: train what it needs, measure, write a table and plots."""
    from flowmo.distributed import join
    from flowmo.studies.study import Place

    recipe = importlib.import_module(STUDIES[arguments.name])
    with join(arguments.device) as world:
        places = {"train": arguments.data, "held_out": arguments.held_out, "out": arguments.out}
        place = Place(
            arguments.name,
            arguments.scale,
            **places,
            results=arguments.results_dir,
            world=world,
            models=(*arguments.models,),
        )
        if arguments.redraw:
            recipe.draw(place)
            return
        if not (arguments.data and arguments.held_out):
            raise UsageError("name the pictures: --data PICTURES --held-out OTHER_PICTURES")
        judges, missing = Judges.find()
        print("\n".join(missing), file=sys.stderr)
        judges.remember = True
        recipe.run(place, judges.to(world.device))


# Shared by commands


def shown_path(name: str) -> str:
    """What a report calls a file or folder; where it lies on this machine is nobody else's business."""
    return Path(name).name if Path(name).exists() else name


def is_generator(source: str) -> bool:
    """Whether a training checkpoint is of stage 2."""
    path = Path(source)
    if is_sharded(path):
        return checkpoint.read_shards(path)[0].get("stage") == checkpoint.GENERATOR
    return path.suffix == ".pth" and path.is_file() and checkpoint.read_pth(path).get("stage") == checkpoint.GENERATOR


def load(arguments: argparse.Namespace) -> FlowMo:
    return flowmo.load(arguments.model, *arguments.settings, device=arguments.device)


def refuse_clash(outputs: Sequence[Path]) -> None:
    clash = next((path for path in outputs if outputs.count(path) > 1), None)
    if clash:
        raise UsageError(f"two pictures would both be written to {clash}; give them other names")


def sampling(arguments: argparse.Namespace) -> dict:
    return {"steps": arguments.steps, "seed": arguments.seed, "guidance": arguments.guidance}


def progress_bar(name: str) -> Callable[[int, int], None] | None:
    """A counter on a terminal's standard error; nothing elsewhere."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        sys.stderr.write(f"\r{name[:40]} {done}/{total}" + ("\r\033[K" if done == total else ""))
        sys.stderr.flush()

    return show


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2^63 − 1")
    return value


def device(text: str) -> str:
    try:
        if torch.device(text).type == "cuda":  # asked, not touched: eight processes would all settle on the first GPU
            there = torch.cuda.is_available() and (torch.device(text).index or 0) < torch.cuda.device_count()
        else:
            there = torch.empty(0, device=text) is not None
    except (RuntimeError, AssertionError):
        there = False
    if not there:
        raise argparse.ArgumentTypeError(f"no device {text!r} on this machine")
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flowmo", description="Pictures to a short string of bits and back.")
    parser.add_argument("--version", action="version", version=f"flowmo {flowmo.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(run: Callable, text: str, commands: Any = commands) -> argparse.ArgumentParser:
        note = "Settings are changed by section.name=value, e.g. eval.sampling.rho=1; see flowmo info --settings."
        sub = commands.add_parser(run.__name__, help=text, description=run.__doc__, epilog=note)
        sub.set_defaults(run=run)
        return sub

    def with_model(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model", default="nano", help="preset, file, folder or Hub id of the weights (nano)")
        sub.add_argument("--device", type=device, default="cpu", help="cpu, cuda, mps … (cpu)")

    def with_sampling(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--steps",
            type=positive,
            help="steps from noise to picture (the model's own: 1 of nano, 25 of the paper's)",
        )
        sub.add_argument("--seed", type=seed, default=0, help="seed of the noise (0)")
        sub.add_argument("--guidance", type=finite, help="classifier-free guidance (the preset's: 1.5); 1 is none")

    def with_fit(sub: argparse.ArgumentParser) -> None:
        help_text = "tile: the whole picture, in blended tiles; crop: the central square at the trained size"
        sub.add_argument("--fit", choices=("tile", "crop"), default="tile", help=help_text)

    sub = command(reconstruct, "pictures beside what their bits decode to")
    sub.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    sub.add_argument("--out", type=Path, default=Path("reconstructions"), help="folder to write to (reconstructions)")
    with_model(sub), with_sampling(sub), with_fit(sub)

    sub = command(encode, "picture to .flowmo file")
    sub.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    sub.add_argument("--output", "-o", type=Path, help="file to write (PICTURE with .flowmo)")
    sub.add_argument("--out-dir", type=Path, help="folder to write many to (beside each picture)")
    with_model(sub), with_fit(sub)

    sub = command(decode, ".flowmo file to picture")
    sub.add_argument("file", type=Path, metavar="FILE")
    sub.add_argument("--output", "-o", type=Path, help="picture to write (FILE with .png)")
    sub.add_argument("--ids", action="store_true", help="print the ids as JSON instead of drawing the picture")
    with_model(sub), with_sampling(sub)

    sub = command(info, "parameters, bits per pixel and passes of a preset or checkpoint")
    sub.add_argument("source", nargs="?", default="nano", help="preset, settings file, or weights (nano)")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--training", action="store_true", help="also say what training it costs, by arithmetic")
    sub.add_argument("--settings", dest="settings_too", action="store_true", help="also list every setting")

    sub = command(bench, "how fast a model is on this machine")
    sub.add_argument("--batch", type=positive, default=1, help="pictures at a time (1)")
    sub.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16")
    sub.add_argument("--repeats", type=positive, default=5, help="runs that the median is taken of (5)")
    sub.add_argument("--json", action="store_true", help="print JSON")
    with_model(sub)

    sub = command(convert, "any checkpoint to .safetensors")
    sub.add_argument("source", help="authors' or training checkpoint (.pth), or any other weights")
    sub.add_argument("output", type=Path, help="file to write, .safetensors")
    sub.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="precision on disk (float32)")
    sub.add_argument("--last-weights", action="store_true", help="the last weights rather than their average")

    group = commands.add_parser("data", help="prepare training pictures", description="Prepare training pictures.")
    data_commands = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    sub = command(index, "index of tars of pictures", data_commands)
    sub.add_argument(
        "tars", nargs="+", type=Path, metavar="TAR", help="uncompressed; the tars inside it are looked through too"
    )
    sub.add_argument("--output", "-o", type=Path, help="file to write (TAR with .index.json)")

    sub = command(tokenize, "a dataset's ids, for a generator to learn")
    sub.add_argument(
        "pictures", metavar="PICTURES", help="folder, .tar with its index, WebDataset shards, hf:NAME:SPLIT"
    )
    sub.add_argument("--out", type=Path, required=True, help="folder to write the shards to, or to go on with")
    sub.add_argument("--crops", type=positive, default=1, help="1 is the central square; more are random ones (1)")
    sub.add_argument("--flip", action="store_true", help="each crop mirrored as well")
    sub.add_argument("--seed", type=seed, default=0, help="seed of random crops (0)")
    sub.add_argument("--shard-size", type=positive, default=4096, help="samples a shard, which are lost at most (4096)")
    sub.add_argument("--workers", type=int, default=0, help="processes that read pictures (0)")
    with_model(sub)

    sub = command(generate, "pictures of a class, by a trained generator")
    sub.add_argument("generator", metavar="GENERATOR", help="file of a generator: .safetensors, or a checkpoint")
    sub.add_argument("--class", dest="classes", nargs="+", metavar="CLASS", help="name, WordNet id or number (all)")
    sub.add_argument("--per-class", type=positive, default=8, help="pictures of each (8)")
    sub.add_argument("--count", type=positive, help="pictures in all, shared evenly by the classes")
    sub.add_argument("--out", type=Path, default=Path("generated.png"), help="a .png, a folder or .npz (generated.png)")
    sub.add_argument("--edit", type=Path, metavar="PICTURE", help="start from a picture's code")
    sub.add_argument("--keep", default="0-0", metavar="TOKENS", help="of --edit: tokens that stay, such as 0-31,40")
    sub.add_argument("--steps", type=positive, help="steps from hidden ids to all (the generator's: 64)")
    sub.add_argument("--guidance", type=finite, help="classifier-free guidance of the ids (the generator's: 1.5)")
    sub.add_argument("--temperature", type=finite, help="softmax temperature of the first step (1.3)")
    sub.add_argument("--last-temperature", type=finite, help="and of the last (0.5)")
    sub.add_argument("--choice-temperature", type=finite, help="noise in which ids are kept (4.5)")
    sub.add_argument("--order", choices=REVEALING_ORDERS, help="which ids are revealed first (confidence)")
    sub.add_argument("--seed", type=seed, default=0, help="seed of everything (0)")
    sub.add_argument("--decode-steps", type=positive, help="Euler steps of the tokenizer (its own)")
    sub.add_argument("--decode-guidance", type=finite, help="guidance of the tokenizer (its own)")
    with_model(sub)

    sub = command(train, "a stage of training: 1A, 1B, or 2, the generator")
    sub.add_argument(
        "--preset", choices=tuple(PRESETS | GENERATOR_PRESETS), default="lo", help="settings to start from (lo)"
    )
    sub.add_argument("--config", type=Path, help="YAML file of settings over the preset's")
    sub.add_argument("--experiment-name", default="my_experiment", help="folder of the run (my_experiment)")
    sub.add_argument("--results-dir", type=Path, default=Path("results"), help="where runs are kept (results)")
    sub.add_argument("--resume-from-ckpt", type=Path, help="training checkpoint to start from")
    sub.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")

    sub = command(evaluate, "PSNR, SSIM, LPIPS, rFID of reconstructions; FID of generated pictures")
    sub.add_argument("pictures", nargs="?", help="folder, .tar with its index, WebDataset shards, hf:NAME:SPLIT")
    sub.add_argument("--limit", type=positive, help="this many pictures, spread over the folder")
    size = "side of the squares that are compared, in tiles where it is not the model's own (the model's)"
    sub.add_argument("--size", type=positive, help=size)
    peers = "measure beside: codecs at equal bytes (jpeg webp avif jxl), tokenizers by their weights (llamagen16=FILE)"
    sub.add_argument("--peers", nargs="+", default=[], metavar="PEER", help=peers)
    sub.add_argument("--report", type=Path, help="folder to write a page, tables, plots and pictures to")
    sub.add_argument("--reference", help="PICTURES are generated: compare with these, a folder or ADM's .npz")
    sub.add_argument("--no-lpips", action="store_true", help="leave LPIPS out, which needs trained networks")
    features = "network of the Fréchet distance; auto takes FID's Inception where its weights are (auto)"
    sub.add_argument("--features", choices=("auto", "inception", "resnet", "none"), default="auto", help=features)
    sub.add_argument("--enlarge", action="store_true", help="take pictures smaller than the crop too")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument(
        "--experiment-name", default="my_evaluation", help="folder of an evaluation of a run's checkpoints"
    )
    sub.add_argument("--results-dir", type=Path, default=Path("results"), help="where that folder is (results)")
    with_model(sub), with_sampling(sub)
    sub = command(study, "a table or figure of the paper, at any scale")
    sub.add_argument("name", choices=tuple(STUDIES), help="which")
    sub.add_argument("--scale", choices=SCALES, default="smoke", help="how large (smoke): a minute, hours on a CPU, …")
    sub.add_argument("--data", default="", help="training pictures, as data.train")
    sub.add_argument("--held-out", default="", help="pictures to judge on")
    sub.add_argument("--out", type=Path, default=Path("docs/studies"), help="folder of tables and plots (docs/studies)")
    sub.add_argument("--results-dir", type=Path, default=Path("results"), help="where runs are kept (results)")
    models = "trained tokenizers, for studies of those: presets or files (nano)"
    sub.add_argument("--models", nargs="+", default=["nano"], metavar="MODEL", help=models)
    sub.add_argument("--redraw", action="store_true", help="only draw the table and plots of the results in --out")
    sub.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())
