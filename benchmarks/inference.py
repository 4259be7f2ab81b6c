"""Encoding and decoding against the machine's limits and against the plain reading of the paper.

    python benchmarks/inference.py                                             # nano and small on a CPU
    python benchmarks/inference.py --device cuda --bfloat16 --presets small lo # on a GPU

Weights are random, which changes no time. FLOPs are counted, not estimated; the floor is the larger of FLOPs over the
measured matrix rate and bytes (weights once, the residual streams in and out of every block) over the measured copy
rate. ``plain`` is ``benchmarks/plain.py`` on the same weights in the same run, alternating. Before anything is timed,
the two must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import plain
import torch
from torch.utils.flop_counter import FlopCounterMode

import flowmo
from flowmo.sample import network_passes, shifted_times
from flowmo.studies.study import machine
from flowmo.train.account import peak_flops

AGREEMENT = 1e-4


def copy_rate(device: torch.device) -> float:
    """Bytes a second that are read and written by copying 256 MiB."""
    a = torch.empty(64 * 2**20, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(timed(lambda: b.copy_(a), device) for _ in range(5))


def timed(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def stream_bytes(network: torch.nn.Module, tokens: int, item: int) -> float:
    """Weights once, and every block's residual streams read and written."""
    weights = sum(p.numel() for p in network.parameters()) * item
    return weights + 2 * 4 * tokens * network.shape.width * len(network.blocks)


def measure(name: str, device: torch.device, bfloat16: bool, repeats: int) -> list[dict]:
    torch.manual_seed(0)
    tokenizer = flowmo.FlowMo(flowmo.preset(name)).to(device).eval().requires_grad_(False)
    for parameter in tokenizer.decoder.parameters():  # open the gates, or the blocks would not show
        parameter.add_(0.02 * torch.randn_like(parameter))
    config, side = tokenizer.config, tokenizer.config.data.image_size
    own, images = config.eval.sampling, torch.rand(1, 3, side, side, device=device) * 2 - 1
    code = torch.randn(1, tokenizer.code_length, config.model.context_dim, device=device).sign()
    noise = torch.randn(1, 3, side, side, device=device)
    decoder = tokenizer.decoder
    embedded, at_t = decoder.embed_code(code), decoder.modulate(torch.ones(1, device=device))
    ones = torch.nn.functional.pad(code, (0, 1), value=1.0)
    passes = network_passes(
        shifted_times(own.sample_steps, own.rho)[:-1], own.guidance, own.guidance_low, own.guidance_high
    )
    pairs = {
        "encode": (lambda: tokenizer.encoder(images), lambda: plain.encode(tokenizer, images)),
        "decoder pass": (
            lambda: decoder(noise, embedded, at_t),
            lambda: plain.velocity(tokenizer, noise, ones, 1.0),
        ),
        "decode": (
            lambda: tokenizer._decode_from(noise, code, None, None),
            lambda: plain.decode(tokenizer, code, own.sample_steps, own.guidance, [0]),
        ),
    }
    tokens = (side // config.model.patch_size) ** 2 + tokenizer.code_length
    item = 2 if bfloat16 else 4
    sizes = {
        "encode": stream_bytes(tokenizer.encoder, tokens, item),
        "decoder pass": stream_bytes(decoder, tokens, item),
        "decode": passes * stream_bytes(decoder, tokens, item),
    }
    rows = []
    precision = torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()
    with torch.no_grad():
        difference = (pairs["encode"][0]() - pairs["encode"][1]()).abs().max()
        difference = max(difference, (pairs["decoder pass"][0]() - pairs["decoder pass"][1]()).abs().max())
        assert difference < AGREEMENT, f"{name}: the two differ by {difference}"
        for part, (ours, theirs) in pairs.items():
            with FlopCounterMode(display=False) as counter, precision:
                ours()
            count = max(repeats if part != "decode" or name == "nano" else 1, 1)
            times = {"ours": [], "plain": []}
            with precision:
                for _ in range(count):
                    times["ours"].append(timed(ours, device))
                    times["plain"].append(timed(theirs, device))
            rate, copied = peak_flops(device, bfloat16)[0], copy_rate(device)
            flops = counter.get_total_flops()
            floor = max(flops / rate, sizes[part] / copied)
            seconds = {key: statistics.median(values) for key, values in times.items()}
            rows.append(
                {
                    "preset": name,
                    "part": part,
                    "passes": passes if part == "decode" else 1,
                    "gflop": flops / 1e9,
                    "mbytes": sizes[part] / 1e6,
                    "floor_s": floor,
                    "seconds": seconds["ours"],
                    "over_floor": seconds["ours"] / floor,
                    "matrix_rate_share": flops / seconds["ours"] / rate,
                    "plain_seconds": seconds["plain"],
                    "plain_over_ours": seconds["plain"] / seconds["ours"],
                    "repeats": count,
                    "matrix_tflops": rate / 1e12,
                    "copy_gbytes": copied / 1e9,
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict) -> str:
    return (
        f"| {row['preset']} | {row['part']} | {row['gflop']:.1f} | {row['mbytes']:.0f} | {1e3 * row['floor_s']:.1f} | "
        f"{1e3 * row['seconds']:.1f} | {row['matrix_rate_share']:.0%} | {row['plain_over_ours']:.2f} |"
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
        for row in measure(name, arguments.device, arguments.bfloat16, arguments.repeats)
    ]
    about = {"machine": machine(arguments.device), "torch": torch.__version__, "bfloat16": arguments.bfloat16}
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
