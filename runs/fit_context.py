"""Fits a context model of a tokenizer's ids, which makes .flowmo files shorter.

    flowmo tokenize IMAGES --model model.safetensors --output tokens --flip
    python runs/fit_context.py tokens --model model.safetensors --output model.context.safetensors --held-out OTHERS

TOKENS is a folder written by ``flowmo tokenize``. For a tokenizer of native size it is a dataset of images, which are
encoded first. The file belongs beside the tokenizer's: NAME.context.safetensors beside NAME.safetensors.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import context_planes
import context_tokens
import numpy as np

import flowmo
from flowmo.cli.options import POSITIVE, SEED
from flowmo.cli.output import Progress, check_outputs, status_of, write
from flowmo.data import TokenDataset, evenly_spread, open_source
from flowmo.images import ImageError
from flowmo.tokenizer import FlowMo


def encode_dataset(path: str, tokenizer: FlowMo, count: int) -> list[np.ndarray]:
    """Encode up to ``count`` images, evenly spread over a dataset. Returns ids rows × columns × planes of each."""
    source, ids = open_source(path), []
    chosen, show = evenly_spread(count, len(source)), Progress("encoding")
    for i, index in enumerate(chosen):
        try:
            codes = tokenizer.encode_image(source.read(index, pixels=tokenizer.pixels))
            ids.append(context_planes.ids_on_lattice(codes, tokenizer))
        except ImageError as error:
            print(f"fit_context: left out: {error}", file=sys.stderr)
        show(i + 1, len(chosen))
    return ids


def run(arguments: argparse.Namespace) -> None:
    check_outputs([arguments.output], arguments.force)
    tokenizer = flowmo.load(arguments.model)
    kind: Any = context_planes if tokenizer.native_size else context_tokens
    if tokenizer.native_size:
        read: Any = partial(encode_dataset, tokenizer=tokenizer, count=arguments.limit)
        about: dict[str, Any] = {"tokenizer": tokenizer}
        settings = about
    else:
        read, about = partial(TokenDataset, tokenizer=tokenizer.identity()), {}
        settings = {"layout": tokenizer.config.model.code_layout}
    for name in ("hidden", "steps"):
        if getattr(arguments, name) is not None:
            settings = settings | {name: getattr(arguments, name)}
    ids = read(arguments.tokens)
    models = {"frequencies": kind.frequencies(ids, **about)}
    if not arguments.frequencies:
        models["context"] = kind.fit(ids, seed=arguments.seed, progress=Progress("fitting"), **settings)
    chosen = models.get("context", models["frequencies"])
    content = chosen.save()
    write(arguments.output, content)
    result = {"file": str(arguments.output), "bytes": len(content), "identity": chosen.identity.hex()}
    lines = [f"{arguments.output}: {len(content) / 1024:.0f} KiB, context model {chosen.identity.hex()}"]
    if arguments.held_out:
        result |= (measured := measure(*kind.code_lengths(models, read(arguments.held_out))))
        lines += describe(measured, [*models])
    print(json.dumps(result, indent=1) if arguments.json else "\n".join(lines))


def measure(packed: np.ndarray, lengths: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean bytes of an image's ids, packed and by each model, from bits; of several planes also their shares."""
    found: dict[str, Any] = {"images": len(packed), "packed": float(packed.mean() / 8)}
    for name, bits in lengths.items():
        size = bits.sum(axis=1) / 8
        found |= {name: float(size.mean()), f"{name}_spread": float(size.std())}
        if bits.shape[1] > 1:
            found[f"{name}_planes"] = (bits.sum(axis=0) / packed.sum() * bits.shape[1]).tolist()
    return found


def describe(found: dict[str, Any], names: list[str]) -> list[str]:
    by = "".join(f", by {name} {found[name]:.1f} ± {found[f'{name}_spread']:.1f}" for name in names)
    lines = [f"bytes of ids per image, {found['images']} others: packed {found['packed']:.1f}{by}"]
    for name in names:
        shares = found.get(f"{name}_planes", [])
        if shares:
            lines.append(f"share of each plane by {name}: {' '.join(f'{share:.3f}' for share in shares)}")
    return lines


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("tokens", help="folder written by flowmo tokenize; native size: a dataset of images")
    parser.add_argument("--output", "-o", type=Path, required=True, help="file to write, MODEL.context.safetensors")
    parser.add_argument("--model", default="nano", help="tokenizer of the ids (nano)")
    parser.add_argument("--held-out", help="other ids, or for native size images, to measure on")
    parser.add_argument("--frequencies", action="store_true", help="only count how often each bit is set")
    parser.add_argument("--limit", type=POSITIVE, default=1000, help="native size: use this many images (1000)")
    parser.add_argument("--hidden", type=POSITIVE, help="hidden units (128; native size: 64)")
    parser.add_argument("--steps", type=POSITIVE, help="steps of 512 tokens (4000; native size: 2000 of 1024 cells)")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of weights and order (0)")
    parser.add_argument("--force", action="store_true", help="overwrite a file that exists")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    arguments = parser.parse_args(words)
    return status_of("fit_context", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
