"""Commands on models: info, bench, convert, export, push, demo."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import flowmo
from flowmo.checkpoint import files as checkpoint
from flowmo.checkpoint.run_folder import is_sharded
from flowmo.cli.options import load, prepare, split_settings
from flowmo.cli.output import Progress, UsageError, check_outputs, require
from flowmo.codec.file import Codec, context_beside, context_path, find_context
from flowmo.config import FIELDS, GENERATOR_PRESETS, PRESETS, Config, flatten
from flowmo.model.sampler import network_passes
from flowmo.tokenizer import FlowMo

if TYPE_CHECKING:
    from flowmo.generate.generator import Generator

DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


def completion(arguments: argparse.Namespace) -> tuple[str, None]:
    require("shtab", "Completion", "shtab")
    import shtab

    from flowmo.cli import build_parser

    return shtab.complete(build_parser(), arguments.shell), None


def info(arguments: argparse.Namespace) -> tuple[str, dict]:
    source, settings = arguments.model, arguments.settings
    if source.endswith((".yaml", ".yml")) or source in PRESETS | GENERATOR_PRESETS:
        config = Config.from_yaml(source) if source.endswith((".yaml", ".yml")) else flowmo.preset(source)
        config = config.override(*settings)
        summary = describe_preset_generator(config) if config.generator.train else describe_tokenizer(config)
    else:
        config, summary = describe_weights(checkpoint.find(source), settings)
    if arguments.training and config.generator.train:
        raise UsageError("--training forecasts the training of tokenizers, not of generators.")
    if arguments.training:
        from flowmo.train.cost import describe_training

        summary |= describe_training(config)
    lines = [f"{name.replace('_', ' '):24} {value}" for name, value in summary.items()]
    if arguments.list_settings:
        for name, value in flatten(config).items():
            lines.append(f"{name}={value}".ljust(42) + f" {FIELDS[name].metadata['doc']}")
    return "\n".join(lines), summary | {"settings": config.to_dict()}


def describe_weights(path: Path, settings: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """Return the settings of a tokenizer's or a generator's file of weights, and describe it."""
    if "vocabulary" not in checkpoint.read_raw_metadata(path):
        config = checkpoint.read_config(path, tuple(settings))
        return config, describe_tokenizer(config)
    from flowmo.generate.generator import load_generator

    generator = load_generator(path, *settings)
    vocabulary = generator.vocabulary
    trained_on = {"tokenizer": vocabulary.tokenizer, "model": vocabulary.model, "image_size": vocabulary.image_size}
    return generator.config, describe_generator(generator) | trained_on


def describe_tokenizer(config: Config) -> dict[str, Any]:
    """Count parameters, bits and network passes of a tokenizer on the meta device."""
    with torch.device("meta"):
        tokenizer = FlowMo(config)
    s, bits, rate = config.eval.sampling, config.bits_per_image, config.bits_per_pixel
    return {
        "parameters": parameters(tokenizer),
        "encoder_parameters": parameters(tokenizer.encoder),
        "decoder_parameters": parameters(tokenizer.decoder),
        "image_size": f"{config.data.image_size}×{config.data.image_size}",
        "code_tokens": config.model.code_length,
        "channels_per_token": config.model.context_dim,
        "ids_per_token": tokenizer.quantizer.sub_tokens,
        "id_count": tokenizer.quantizer.id_count,
        "bytes_per_image": None if bits is None else math.ceil(bits / 8),
        "bits_per_pixel": None if rate is None else round(rate, 4),
        "sampling_steps": s.sample_steps,
        "passes_per_image": network_passes(s),
    }


def describe_preset_generator(config: Config) -> dict[str, Any]:
    """Describe a generator of the paper's 256 × 2 ids of 9 bits and 1000 classes, on the meta device."""
    from flowmo.data.tokens import Vocabulary
    from flowmo.generate.generator import Generator

    shape = {"image_size": 256, "tokens": 256, "sub_tokens": 2, "id_bits": 9}
    vocabulary = Vocabulary(tokenizer="", model="", classes=("",) * 1000, **shape)
    with torch.device("meta"):
        return describe_generator(Generator(config, vocabulary))


def describe_generator(generator: Generator) -> dict[str, Any]:
    settings, vocabulary = generator.config.generator, generator.vocabulary
    return {
        "parameters": parameters(generator),
        "for": f"{vocabulary.ids} ids of {vocabulary.id_bits} bits, {len(vocabulary.classes)} classes",
        "width": settings.hidden_size,
        "network": settings.network,
        "blocks": len(generator.network.blocks),
        "heads": settings.num_heads,
        "sampling_steps": settings.sample_steps,
        "guidance": generator.guidance_in_words(),
    }


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def bench(arguments: argparse.Namespace) -> tuple[str, list[dict]]:
    from flowmo.evaluate.speed import measure

    tokenizer = flowmo.load(arguments.model, *arguments.settings, device=arguments.device)
    tokenizer.set_precision(arguments.precision)
    ready = partial(prepare, arguments=arguments)
    in_bfloat16, progress = tokenizer.precision == "bfloat16", Progress("measuring")
    timings = measure(tokenizer, arguments.batch, in_bfloat16, arguments.repeats, ready=ready, progress=progress)
    rate = f"matrix rate {timings[0].matrix_rate / 1e12:.2f} TFLOP/s"
    return "\n".join([*(timing.line() for timing in timings), rate]), [asdict(timing) for timing in timings]


def convert(arguments: argparse.Namespace) -> tuple[str, dict]:
    source, output, dtype = arguments.source, arguments.output, DTYPES[arguments.dtype]
    if output.suffix != ".safetensors":
        raise UsageError(f"Cannot write {output}: converted weights are .safetensors. Use a name that ends so.")
    check_outputs([output], arguments.force)
    if is_generator(path := checkpoint.find(source)):
        from flowmo.generate.generator import load_generator, save_generator

        generator = load_generator(path, *arguments.settings, ema=not arguments.last_weights)
        save_generator(generator, output, dtype)
        name, summary = "a generator", {"generator": generator.identity(), "tokenizer": generator.vocabulary.tokenizer}
    else:
        tokenizer = flowmo.load(source, *arguments.settings, ema=not arguments.last_weights)
        context = context_beside(source, tokenizer)
        check_outputs([context_path(output)] if context else [], arguments.force)
        flowmo.save(tokenizer, output, dtype)
        identity = flowmo.load(output).identity()  # of the file, whose weights are rounded
        if context and context.tokenizer == identity:
            checkpoint.write_content(context_path(output), context.save())
        name, summary = f"tokenizer {identity}", {"tokenizer": identity}
    size = output.stat().st_size
    return f"{output}: {size / 2**20:.1f} MiB, {name}", {"file": str(output), "bytes": size, **summary}


def is_generator(path: Path) -> bool:
    """Return whether a file or folder of weights is a generator's."""
    return (path.is_file() or is_sharded(path)) and "vocabulary" in checkpoint.read_raw_metadata(path)


def push(arguments: argparse.Namespace) -> tuple[str, dict]:
    from flowmo.checkpoint import hub

    if arguments.output:
        check_outputs([arguments.output / name for name in hub.FILES], arguments.force)
    else:
        require("huggingface_hub", "The Hub", "'flowmo[hub]'")
    metrics = read_metrics(arguments.evaluation) if arguments.evaluation else None
    tokenizer = flowmo.load(arguments.source, *arguments.settings)
    context = context_beside(arguments.source, tokenizer)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        tokenizer.save_pretrained(folder, arguments.name, None if context is None else context.save(), metrics)
        if context is None:  # one that --force overwrites is of another model
            (folder / hub.CONTEXT_FILE).unlink(missing_ok=True)
        files = sorted(name for name in hub.FILES if (folder / name).is_file())
        if arguments.output:
            return f"{folder}: {', '.join(files)}", {"folder": str(folder), "files": files}
        address = hub.push(folder, arguments.name, arguments.private)
        return address, {"address": address, "files": files}


def read_metrics(path: Path) -> dict:
    """Read the output of ``flowmo evaluate --json``; of several rows, the first."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not the output of flowmo evaluate --json ({error}).") from None
    row = content[0] if isinstance(content, list) and content else content
    if not isinstance(row, dict):
        raise UsageError(f"{path} holds no metrics. Use the output of flowmo evaluate --json.")
    return row


def export(arguments: argparse.Namespace) -> tuple[str, dict]:
    from flowmo.web.export import export as export_graphs
    from flowmo.web.export import file_names

    if arguments.dtype and arguments.kind == "torch":
        raise UsageError("--dtype is the type of weights in ONNX files. Leave it out: --torch writes float32.")
    if (arguments.runtime or arguments.examples) and arguments.kind != "page":
        raise UsageError("--runtime and --examples are parts of a page. Add --page, or leave them out.")
    names = [Path(path).name for path in arguments.examples]
    if len({*names}) < len(names):
        raise UsageError("Two examples have the same name. Rename one.")
    check_outputs([arguments.output / name for name in file_names(arguments.kind, names)], arguments.force)
    if arguments.kind != "torch":
        require("onnxscript", "ONNX export", "'flowmo[export]'")
    tokenizer, name = flowmo.load(arguments.source, *arguments.settings), Path(arguments.source).stem
    dtype = arguments.dtype or "float16"
    options = (arguments.output, arguments.kind, name, dtype, arguments.runtime, arguments.examples)
    sizes = {str(file): file.stat().st_size for file in export_graphs(tokenizer, *options)}
    text = "\n".join(f"{file}: {size / 1e6:.2f} MB" for file, size in sizes.items())
    return f"{text}\n{sum(sizes.values()) / 1e6:.1f} MB in all", {"files": sizes}


def demo(arguments: argparse.Namespace) -> None:
    from flowmo.web.server import Demo, serve

    generator = None
    if arguments.generator:
        from flowmo.generate.generator import load_generator

        arguments.settings, of_generator = split_settings(arguments.settings)
        generator = load_generator(arguments.generator, *of_generator, device=arguments.device)
        generator = prepare(generator, arguments)
    tokenizer = load(arguments)
    codec, name = Codec(tokenizer, find_context(arguments.model, tokenizer)), Path(arguments.model).stem
    with serve(Demo(tokenizer, codec, generator, name, arguments.examples), arguments.host, arguments.port) as server:
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        print(f"FlowMo at http://{host}:{arguments.port}; Ctrl-C ends it", flush=True)
        server.serve_forever()
