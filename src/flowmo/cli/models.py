"""Commands on models: what they are, how fast, and in which file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import flowmo
from flowmo.checkpoint import files as checkpoint
from flowmo.checkpoint.distributed import is_sharded
from flowmo.cli.shared import UsageError, command, hasten, positive, tell, with_json, with_model
from flowmo.codec import file as codec
from flowmo.config import FIELDS, GENERATOR_PRESETS, PRESETS, Config
from flowmo.model import sampler as sample
from flowmo.tokenizer import FlowMo


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
        from flowmo.train.cost import describe_training

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

    bits, rate = config.bits_per_image, config.bits_per_pixel
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
        "bits_per_pixel": None if rate is None else round(rate, 4),
        "sampling_steps": s.sample_steps,
        "passes_per_picture": sample.network_passes(times, s.guidance, s.guidance_low, s.guidance_high),
        "settings": config.to_dict(),
    }


def describe_generator(config: Config) -> dict:
    """Parameters of a generator of 256 × 2 ids of 9 bits and 1000 classes, as the paper's."""
    from flowmo.data.tokens import Vocabulary
    from flowmo.generate.generator import Generator

    vocabulary = Vocabulary(
        tokenizer="", model="", image_size=256, tokens=256, sub_tokens=2, id_bits=9, classes=("",) * 1000
    )
    with torch.device("meta"):
        generator = Generator(config, vocabulary)
    own = config.generator
    return {
        "parameters": sum(p.numel() for p in generator.parameters()),
        "for": "512 ids of 9 bits, 1000 classes",
        "width": own.hidden_size,
        "network": own.network,
        "blocks": len(generator.network.blocks),
        "heads": own.num_heads,
        "sampling_steps": own.sample_steps,
        "guidance": generator.guidance_in_words(),
        "settings": config.to_dict(),
    }


def bench(arguments: argparse.Namespace) -> None:
    """How fast a model encodes and decodes here, beside what the machine can do at most."""
    from flowmo.evaluate.speed import measure

    tokenizer = flowmo.load(arguments.model, *arguments.settings, device=arguments.device)
    tokenizer.set_precision(arguments.precision)
    if arguments.pack and tokenizer.precision != "float32":
        raise UsageError("packed weights are float32; leave out --pack or --precision bfloat16")
    ready = partial(hasten, arguments=arguments)
    timings = measure(tokenizer, arguments.batch, tokenizer.precision == "bfloat16", arguments.repeats, ready=ready)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(timing) for timing in timings], indent=1))
        return
    print("\n".join(timing.line() for timing in timings))
    print(f"matrix rate {timings[0].matrix_rate / 1e12:.2f} TFLOP/s, copy rate {timings[0].copy_rate / 1e9:.0f} GB/s")


def convert(arguments: argparse.Namespace) -> None:
    """Rewrite any checkpoint, of a tokenizer or a generator, as one .safetensors file with its settings inside."""
    if arguments.output.suffix != ".safetensors":
        raise UsageError(f"{arguments.output}: the output is a .safetensors file")
    dtype = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}[arguments.dtype]
    if is_generator(arguments.source):
        from flowmo.generate.generator import load_generator, save_generator

        generator = load_generator(arguments.source, *arguments.settings, ema=not arguments.last_weights)
        save_generator(generator, arguments.output, dtype)
        size = arguments.output.stat().st_size
        line = f"{arguments.output}: {size / 2**20:.1f} MiB, a generator"
        facts = {"generator": generator.identity(), "tokenizer": generator.vocabulary.tokenizer}
        tell(arguments, line, file=str(arguments.output), bytes=size, **facts)
        return
    tokenizer = flowmo.load(arguments.source, *arguments.settings, ema=not arguments.last_weights)
    flowmo.save(tokenizer, arguments.output, dtype)
    # Of the file, whose weights are rounded.
    size, identity = arguments.output.stat().st_size, flowmo.load(arguments.output).identity()
    line = f"{arguments.output}: {size / 2**20:.1f} MiB, tokenizer {identity}"
    tell(arguments, line, file=str(arguments.output), bytes=size, tokenizer=identity)


def push(arguments: argparse.Namespace) -> None:
    """Upload a tokenizer to the Hugging Face Hub, with the context model that lies beside it and a model card.

    With --folder it is only written to a folder, in the same layout.
    """
    from flowmo.checkpoint import hub

    tokenizer = flowmo.load(arguments.source, *arguments.settings)
    context = codec.find_context(arguments.source, tokenizer)
    content = None if context is None else context.save()
    if arguments.folder:
        hub.write_folder(tokenizer, arguments.folder, content, arguments.name)
        files = sorted(path.name for path in arguments.folder.iterdir())
        tell(arguments, f"{arguments.folder}: {', '.join(files)}", folder=str(arguments.folder), files=files)
        return
    with tempfile.TemporaryDirectory() as folder:
        hub.write_folder(tokenizer, Path(folder), content, arguments.name)
        files = sorted(path.name for path in Path(folder).iterdir())
        address = hub.push(Path(folder), arguments.name, arguments.private)
        tell(arguments, address, address=address, files=files)


def is_generator(source: str) -> bool:
    """Whether a training checkpoint is of stage 2."""
    path = Path(source)
    if is_sharded(path):
        return checkpoint.read_shards(path)[0].get("stage") == checkpoint.GENERATOR
    return path.suffix == ".pth" and path.is_file() and checkpoint.read_pth(path).get("stage") == checkpoint.GENERATOR


def add_to(commands: Any) -> None:
    sub = command(info, "parameters, bits per pixel and passes of a preset or checkpoint", commands)
    sub.add_argument("source", nargs="?", default="nano", help="preset, settings file, or weights (nano)")
    with_json(sub)
    sub.add_argument("--training", action="store_true", help="also say what training it costs, by arithmetic")
    sub.add_argument("--settings", dest="settings_too", action="store_true", help="also list every setting")

    sub = command(bench, "how fast a model is on this machine", commands)
    sub.add_argument("--batch", type=positive, default=1, help="pictures at a time (1)")
    sub.add_argument("--repeats", type=positive, default=5, help="runs that the median is taken of (5)")
    with_model(sub)
    same = "the same as --precision bfloat16"
    sub.add_argument("--bfloat16", dest="precision", action="store_const", const="bfloat16", help=same)
    with_json(sub)

    sub = command(convert, "any checkpoint to .safetensors", commands)
    sub.add_argument("source", help="authors' or training checkpoint (.pth), or any other weights")
    sub.add_argument("output", type=Path, help="file to write, .safetensors")
    precision = "precision on disk (float32); int8 has a scale per output channel"
    sub.add_argument("--dtype", choices=("float32", "float16", "int8"), default="float32", help=precision)
    sub.add_argument("--last-weights", action="store_true", help="the last weights rather than their average")
    with_json(sub)

    sub = command(push, "a tokenizer to the Hugging Face Hub", commands)
    sub.add_argument("source", help="preset, file or folder of the weights")
    sub.add_argument("name", metavar="OWNER/NAME", help="the repository, which is made where there is none")
    sub.add_argument("--private", action="store_true", help="make it a private one")
    sub.add_argument("--folder", type=Path, help="only write the files, to this folder")
    with_json(sub)
