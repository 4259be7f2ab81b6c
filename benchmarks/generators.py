"""Bits that ids cost under an autoregressive and a masked generator, and the size of files that they code.

    python benchmarks/generators.py --gpt gpt.pt --maskgit maskgit.pth --tokens TOKENS --held-out HELD_OUT \\
        --images HELD_OUT_IMAGES --json generators.json --picture generators.jpg
    python benchmarks/generators.py --json generators.json        # the tables again

--gpt       file of ``examples/gpt.py``
--maskgit   checkpoint of ``flowmo train``; its last weights, because the EMA of a short run holds untrained ones
--context   context model of ``runs/fit_context.py``
--steps     steps in which the MaskGIT unmasks the ids, 16 in files
--limit     held-out images whose likelihood is measured
--files     held-out images that are written as files and read again

Frequencies are those of each bit at its position among TOKENS. Files do not know the class. ± is the standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowmo
from flowmo.checkpoint.files import write_content
from flowmo.codec.context import ContextModel
from flowmo.codec.file import Codec, Context
from flowmo.codec.generator import GeneratorModel
from flowmo.data import TokenDataset, evenly_spread, open_source
from flowmo.data.bits import token_bits
from flowmo.evaluate.metrics.pairs import grid
from flowmo.generate.generator import Generator, load_generator
from flowmo.images import to_pil

sys.path += [str(Path(__file__).parent.parent / folder) for folder in ("examples", "runs")]
from context_tokens import frequencies, ideal_code_length
from gpt import GPT, GPTCoder, load_gpt, read_tokens

CHUNK = 16
SHOWN = 3
"""Images of a class and a guidance in the picture."""
GUIDANCES = (1.0, 2.0)


def likelihood_row(name: str, bits: Tensor, ids: int) -> dict[str, Any]:
    """Row of the first table from the bits of each image."""
    error = bits.std() / math.sqrt(len(bits))
    return {"name": name, "images": len(bits), "bits_per_id": float(bits.mean()) / ids, "error": float(error) / ids}


@torch.no_grad()
def gpt_bits(model: GPT, ids: Tensor, labels: Tensor) -> Tensor:
    chunks = zip(ids.split(CHUNK), labels.split(CHUNK), strict=True)
    return -torch.cat([model.log_prob(*chunk).double().sum(dim=1) for chunk in chunks]) / math.log(2)


def likelihoods(
    model: GPT, generator: Generator, steps: list[int], contexts: dict[str, ContextModel], ids: Tensor, labels: Tensor
) -> Iterator[dict[str, Any]]:
    v, none = model.vocabulary, torch.full_like(labels, model.no_class)
    for name, context in contexts.items():
        yield likelihood_row(
            name, torch.from_numpy(ideal_code_length(context.run, token_bits(ids.numpy(), v.id_bits))), v.ids
        )
    for known, given in (("class", labels), ("no class", none)):
        for count in steps:
            bits = -generator.log_prob(ids, given, steps=count) / math.log(2)
            yield likelihood_row(f"MaskGIT in {count} steps, {known}", bits, v.ids)
        yield likelihood_row(f"GPT, {known}", gpt_bits(model, ids, given), v.ids)


def file_row(name: str, tokenizer: flowmo.FlowMo, coder: Context | None, codes: list[flowmo.Codes]) -> dict[str, Any]:
    """Write each image's codes as a file and read it again: mean bytes and mean seconds of CPU time."""
    codec, start = Codec(tokenizer, coder), time.process_time()
    files = [codec.pack(each) for each in codes]
    middle = time.process_time()
    for file, each in zip(files, codes, strict=True):
        if not torch.equal(codec.unpack(file).ids, each.ids):
            raise RuntimeError(f"A file of {name} decodes to other ids.")
    n, end = len(codes), time.process_time()
    row = {"name": name, "images": n, "bytes": sum(map(len, files)) / n}
    return row | {"write_seconds": (middle - start) / n, "read_seconds": (end - middle) / n}


def draw(model: GPT, tokenizer: flowmo.FlowMo, path: Path) -> None:
    """Samples in one row per class: ``SHOWN`` columns per guidance, from the same seed."""
    labels = torch.arange(model.no_class).repeat_interleave(SHOWN)
    columns = []
    for guidance in GUIDANCES:
        ids = model.sample(labels, torch.Generator().manual_seed(0), guidance)
        columns.append(tokenizer.decode(ids, seed=list(range(len(ids)))).unflatten(0, (-1, SHOWN)))
    to_pil(grid([*torch.cat(columns, dim=1)])).save(path, quality=60)


def measure(a: argparse.Namespace) -> dict[str, Any]:
    model, generator = load_gpt(a.gpt), load_generator(a.maskgit, ema=False)
    tokenizer = flowmo.load(model.vocabulary.model)
    train = TokenDataset(a.tokens, tokenizer.identity())
    ids, labels, _ = read_tokens(a.held_out, tokenizer.identity())
    contexts = {"frequencies": frequencies(train)}
    if a.context:
        contexts["context model"] = ContextModel.read(a.context)
    chosen = evenly_spread(a.limit, len(ids))
    content: dict[str, Any] = {
        "training_images": len(train),
        "ids": model.vocabulary.ids,
        "parameters": {
            name: sum(p.numel() for p in network.parameters())
            for name, network in (("GPT", model), ("MaskGIT", generator.network))
        },
        "likelihoods": [],
        "files": [],
    }
    for row in likelihoods(model, generator, a.steps, contexts, ids[chosen], labels[chosen]):
        content["likelihoods"].append(row)
        print(row, flush=True)
    source = open_source(a.images)
    codes = [tokenizer.encode_image(source.read(i)) for i in evenly_spread(a.files, len(source))]
    coders = {"packed": None, **contexts, "MaskGIT in 16 steps": GeneratorModel(generator), "GPT": GPTCoder(model)}
    for name, coder in coders.items():
        content["files"].append(file_row(name, tokenizer, coder, codes))
        print(content["files"][-1], flush=True)
    if a.picture:
        draw(model, tokenizer, a.picture)
    return content


def tables(content: dict[str, Any]) -> str:
    lines = ["| | bits per id | bytes per image |", "|---|--:|--:|"]
    ids = content["ids"]
    for row in content["likelihoods"]:
        size = row["bits_per_id"] * ids / 8
        lines.append(f"| {row['name']} | {row['bits_per_id']:.3f} ± {row['error']:.3f} | {size:.1f} |")
    lines += ["", "| | bytes of a file | seconds to write | seconds to read |", "|---|--:|--:|--:|"]
    for row in content["files"]:
        seconds = f"{row['write_seconds']:.2f} | {row['read_seconds']:.2f}"
        lines.append(f"| {row['name']} | {row['bytes']:.1f} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--gpt", "--maskgit", "--tokens", "--held-out", "--images", "--context", "--picture"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--json", type=Path, required=True)
    for name, value in (("--limit", 40), ("--files", 24)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--steps", type=int, nargs="+", default=[16])
    a = parser.parse_args()
    if a.gpt:
        write_content(a.json, json.dumps(measure(a), indent=1) + "\n")
    print(tables(json.loads(a.json.read_text())))


if __name__ == "__main__":
    main()
