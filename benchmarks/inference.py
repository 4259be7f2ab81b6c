"""Encoding and decoding against the machine's limits, the plain reading of the paper and the authors' own model.

    python benchmarks/inference.py                                             # nano and small on a CPU
    python benchmarks/inference.py --compile --authors FlowMo --presets nano narrow small
    python benchmarks/inference.py --device cuda --bfloat16 --presets small lo # on a GPU

Weights are random, which changes no time. FLOPs are counted, not estimated; the floor is the larger of FLOPs over the
measured matrix rate and bytes (weights once, the residual streams in and out of every block) over the measured copy
rate. The ways to do the work are measured in turns on the same weights, and the matrix rate before each turn; large
presets decode once. Before anything is timed, all ways must agree in encoding and in a
pass.

- ``loaded``: a tokenizer as ``flowmo.load`` gives it.
- ``compiled``: after ``.compile()``, with ``--compile``.
- ``plain``: ``benchmarks/plain.py``.
- ``authors``: their code run as it is written, with ``--authors FOLDER`` (see ``benchmarks/authors.py``), and
  ``authors compiled``: as they run it, under ``torch.compile``. Of the presets that their model has the form of;
  ``narrow`` is such a one about as large as nano.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import authors
import plain
import torch

import flowmo
from flowmo import Config, FlowMo
from flowmo.evaluate.speed import Timing, count_work, matrix_rate, parts, timed
from flowmo.precision import computing

sys.path.append(str(Path(__file__).parent.parent))
from reproduce.runner import machine

AGREEMENT = 1e-4
COPIED = 256 * 2**20
NARROW = ("mup_width=2", "enc_mup_width=2", "enc_depth=4", "dec_depth=8", "patch_size=8", "code_length=128")
QUICK = ("nano", "narrow")
WAYS = ("loaded", "compiled", "plain", "authors", "authors compiled")
Parts = dict[str, Callable[[], torch.Tensor]]


def settings(name: str) -> Config:
    if name == "narrow":
        return Config().override("data.image_size=128", *(f"model.{setting}" for setting in NARROW))
    return flowmo.preset(name)


def opened(tokenizer: FlowMo) -> FlowMo:
    for parameter in tokenizer.decoder.parameters():  # open the gates, or the blocks would not show
        parameter.add_(0.02 * torch.randn_like(parameter))
    return tokenizer


def plain_parts(tokenizer: FlowMo) -> Parts:
    own = tokenizer.config.eval.sampling
    images, noise, code = plain.inputs(tokenizer)
    return {
        "encode": partial(plain.encode, tokenizer, images),
        "decoder pass": partial(plain.velocity, tokenizer, noise, plain.marked(code), 1.0),
        "decode": partial(plain.decode, tokenizer, code, own.sample_steps, own.guidance, noise),
    }


def authors_parts(tokenizer: FlowMo, theirs: dict[str, Callable[..., torch.Tensor]], stance: str) -> Parts:
    images, noise, code = plain.inputs(tokenizer)
    arguments = {
        "encode": (images,),
        "decoder pass": (noise, plain.marked(code)),
        "decode": (noise, plain.marked(code)),
    }

    def run(part: str) -> torch.Tensor:
        with torch.compiler.set_stance(stance):
            return theirs[part](*arguments[part])

    return {part: partial(run, part) for part in arguments}


def compare(name: str, arguments: argparse.Namespace) -> list[dict]:
    """Rows of one preset."""
    device, config = arguments.device, settings(name)
    torch.manual_seed(0)
    torch._dynamo.reset()  # or a second preset would be compiled for any size
    with torch.no_grad():
        if arguments.authors and config.model.code_layout == "diagonal" and config.model.prediction == "velocity":
            tokenizer, theirs = authors.both(arguments.authors, config)
        else:
            tokenizer, theirs = opened(FlowMo(config).eval().requires_grad_(False)), None
    tokenizer.to(device).chunk_size = 1  # a GPU's default would decode 16 images for one
    ways = {"plain": plain_parts(tokenizer)}
    if theirs and device.type == "cpu":
        ways["authors"] = authors_parts(tokenizer, theirs, "force_eager")
        if arguments.compile:
            ways["authors compiled"] = authors_parts(tokenizer, theirs, "default")
    if arguments.compile:
        ways["compiled"] = parts(copy.deepcopy(tokenizer).compile())
    with torch.no_grad():
        ours = parts(tokenizer)
        for part in ("encode", "decoder pass"):
            expected = ours[part]()
            for way, functions in ways.items():
                difference = (functions[part]() - expected).abs().max()
                assert difference < AGREEMENT, f"{name}: {part}, {way} differs by {difference}"
        for way in ways:
            if "compiled" in way:  # pictures with and without the null code are two shapes
                with precision(device, arguments.bfloat16):
                    ways[way]["decode"]()
    rows = []
    moved, copied = bytes_moved(tokenizer, arguments.bfloat16), copy_rate(device)
    for timing, seconds in measure_in_turns(name, tokenizer, ways, arguments):
        least = moved[timing.part] * timing.passes
        floor = max(timing.flops / timing.matrix_rate, least / copied)
        limits = {"preset": name, "floor": floor, "moved": least, "copy_rate": copied}
        rows.append({**limits, **dataclasses.asdict(timing), "seconds": seconds})
        print(line(rows[-1]), flush=True)
    return rows


def bytes_moved(tokenizer: FlowMo, bfloat16: bool) -> dict[str, float]:
    """Bytes that one pass of each part reads and writes at least: weights, residual streams in and out of blocks."""
    config = tokenizer.config
    tokens = (config.data.image_size // config.model.patch_size) ** 2 + tokenizer.code_length
    moved = {}
    for part, network in (("encode", tokenizer.encoder), ("decoder pass", tokenizer.decoder)):
        weights = sum(parameter.numel() for parameter in network.parameters()) * (2 if bfloat16 else 4)
        moved[part] = weights + 2 * 4 * tokens * network.width * len(network.blocks)  # float32 in and out
    return moved | {"decode": moved["decoder pass"]}


def copy_rate(device: torch.device) -> float:
    """Bytes per second that copying reads and writes."""
    a = torch.empty(COPIED // 4, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(timed(lambda: b.copy_(a), device) for _ in range(5))


@torch.no_grad()
def measure_in_turns(
    name: str, tokenizer: FlowMo, ways: dict[str, Parts], arguments: argparse.Namespace
) -> Iterator[tuple[Timing, dict[str, float]]]:
    """Time each part in all ways in turns, because clock rates drift. Yields medians by way."""
    device, bfloat16 = tokenizer.device, arguments.bfloat16
    work = count_work(tokenizer, 1, bfloat16)
    for part in work:
        functions = {
            "loaded": parts(tokenizer)[part],
            **{way: each[part] for way, each in ways.items() if part in each},
        }
        repeats = arguments.repeats if name in QUICK else 1 if part == "decode" else 3
        rates, seconds = [], []
        for _ in range(1 + repeats):  # the first warms up
            rates.append(matrix_rate(device, bfloat16))
            with precision(device, bfloat16):
                seconds.append([timed(call, device) for call in functions.values()])
        medians = dict(zip(functions, map(statistics.median, zip(*seconds[1:], strict=True)), strict=True))
        timing = Timing(part, 1, *work[part], medians["loaded"], statistics.median(rates[1:]))
        yield timing, medians


def precision(device: torch.device, bfloat16: bool) -> AbstractContextManager:
    return computing("bfloat16" if bfloat16 else "float32", device)


def line(row: dict) -> str:
    share, seconds = row["flops"] / row["matrix_rate"], row["seconds"]
    cells = (f"{1e3 * seconds[way]:.1f} ({share / seconds[way]:.0%})" if way in seconds else "–" for way in WAYS)
    details = f"{row['flops'] / 1e9:.1f} | {row['moved'] / 1e6:.0f} | {1e3 * row['floor']:.1f}"
    return f"| {row['preset']} | {row['part']} | {details} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["nano", "small"])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--compile", action="store_true", help="compiled networks too")
    parser.add_argument("--authors", type=Path, metavar="FOLDER", help="a clone of the authors' repository")
    parser.add_argument("--repeats", type=int, default=21, help="of the small ones (21)")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    print("Milliseconds, and of the matrix rate:\n")
    print("| preset | part | GFLOP | MB | floor, ms | " + " | ".join(WAYS) + " |")
    print("|" + "---|" * (5 + len(WAYS)))
    rows = [row for name in arguments.presets for row in compare(name, arguments)]
    about = {"machine": machine(arguments.device), "torch": torch.__version__, "bfloat16": arguments.bfloat16}
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
