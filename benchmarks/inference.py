"""Encoding and decoding against the machine's limits and against the plain reading of the paper.

    python benchmarks/inference.py                                             # nano and small on a CPU
    python benchmarks/inference.py --device cuda --bfloat16 --presets small lo # on a GPU

Weights are random, which changes no time. FLOPs are counted, not estimated; the floor is the larger of FLOPs over the
measured matrix rate and bytes (weights once, the residual streams in and out of every block) over the measured copy
rate. ``plain`` is ``benchmarks/plain.py`` on the same weights in the same run; it, ours and the matrix rate are
measured in turns, a large preset's decoding once. Before anything is timed, the two must agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import plain
import torch

import flowmo
from flowmo.bench import Timing, measure, parts
from flowmo.studies.study import machine

AGREEMENT = 1e-4


def compare(name: str, device: torch.device, bfloat16: bool, repeats: int) -> list[dict]:
    """Rows of one preset: ours by ``flowmo.bench``, then ours and the plain way alternating."""
    torch.manual_seed(0)
    tokenizer = flowmo.FlowMo(flowmo.preset(name)).to(device).eval().requires_grad_(False)
    for parameter in tokenizer.decoder.parameters():  # open the gates, or the blocks would not show
        parameter.add_(0.02 * torch.randn_like(parameter))
    own, side = tokenizer.config.eval.sampling, tokenizer.config.data.image_size
    ours = parts(tokenizer)
    images, noise, code = plain.inputs(tokenizer)
    theirs = {
        "encode": lambda: plain.encode(tokenizer, images),
        "decoder pass": lambda: plain.velocity(tokenizer, noise, plain.marked(code), 1.0),
        "decode": lambda: plain.decode(tokenizer, code, own.sample_steps, own.guidance, noise),
    }
    with torch.no_grad():
        for part in ("encode", "decoder pass"):
            difference = (ours[part]() - theirs[part]()).abs().max()
            assert difference < AGREEMENT, f"{name} at {side}: {part} differs by {difference}"
    rows = []
    count = dict.fromkeys(theirs, repeats) if name == "nano" else {"encode": 3, "decoder pass": 3, "decode": 1}
    for timing in measure(tokenizer, 1, bfloat16, count, theirs):
        facts = dataclasses.asdict(timing)
        rows.append({"preset": name, "floor": timing.floor, "plain_seconds": facts.pop("other_seconds"), **facts})
        print(line(name, timing), flush=True)
    return rows


def line(name: str, timing: Timing) -> str:
    return (
        f"| {name} | {timing.part} | {timing.flops / 1e9:.1f} | {timing.moved / 1e6:.0f} | {1e3 * timing.floor:.1f} | "
        f"{1e3 * timing.seconds:.1f} | {timing.matrix_share:.0%} | {timing.other_seconds / timing.seconds:.2f} |"
    )


HEADER = (
    "| preset | part | GFLOP | MB | floor, ms | measured, ms | of the matrix rate | plain / ours |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["nano", "small"])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    print(HEADER)
    rows = [
        row
        for name in arguments.presets
        for row in compare(name, arguments.device, arguments.bfloat16, arguments.repeats)
    ]
    about = {"machine": machine(arguments.device), "torch": torch.__version__, "bfloat16": arguments.bfloat16}
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
