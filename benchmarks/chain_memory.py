"""Memory of stage 1B over the number of steps in its chain, with and without recomputation.

    python benchmarks/chain_memory.py [--device cuda] [--json]

Each measurement is the peak of a process of its own that builds a model, takes one step with a chain of n, and tells
the most memory that it held (resident set on a CPU, allocated memory on a GPU). The n states that the method keeps, a
float32 picture each, are subtracted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import torch

from flowmo import Config, FlowMo
from flowmo.train.loop import used_memory
from flowmo.train.stages import Draws, posttrain_loss, sample_chain

BATCH = 4
STEPS = (1, 2, 4, 8, 16)
SETTINGS = (
    *("data.image_size=128", "model.patch_size=8", "model.hidden_size=384", "model.num_heads=6", "model.dec_depth=6"),
    *("model.enc_hidden_size=192", "model.enc_num_heads=3", "model.enc_depth=2", "model.code_length=64"),
    *("model.posttrain_sample=true", "opt.lpips_weight=1"),
)


def one_step(steps: int, recompute: bool, device: torch.device) -> int:
    """Most bytes held by a post-training step; 0 steps measure the flow loss alone."""
    config = Config().override(*SETTINGS, f"model.posttrain_sample_k={max(steps, 1)}")
    torch.manual_seed(0)
    tokenizer = FlowMo(config).to(device)
    images = torch.rand(BATCH, 3, 128, 128, device=device)
    draws = Draws.of(config, images, range(BATCH))

    def distance(x, y):
        return (x - y).square().mean(dim=(1, 2, 3))

    if not steps:
        posttrain_loss(tokenizer, images, draws, None).total.backward()
    elif recompute:
        posttrain_loss(tokenizer, images, draws, distance).total.backward()
    else:
        code = tokenizer.quantizer.quantize(tokenizer.encoder(images))[0].detach()
        loss = posttrain_loss(tokenizer, images, draws, None).total
        (loss + distance(images, sample_chain(tokenizer, code, draws.chain, recompute=False)).mean()).backward()
    return used_memory(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--one", nargs=2, metavar=("STEPS", "RECOMPUTE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(one_step(int(arguments.one[0]), arguments.one[1] == "True", torch.device(arguments.device)))
        return
    state = BATCH * 3 * 128 * 128 * 4

    def measure(steps: int, recompute: bool) -> int:
        # Freed blocks go back to the system at once, so that the resident set is what is in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, "--device", arguments.device, "--one", str(steps), str(recompute)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)

    alone = measure(0, True)
    rows = []
    for steps in STEPS:
        recomputed = measure(steps, True) - steps * state
        kept = measure(steps, False) if steps <= 8 else None
        rows.append({"steps": steps, "recomputed_mib": recomputed / 2**20, "kept_mib": kept and kept / 2**20})
    spread = max(row["recomputed_mib"] for row in rows) / min(row["recomputed_mib"] for row in rows) - 1
    if arguments.json:
        print(json.dumps({"without_chain_mib": alone / 2**20, "rows": rows, "spread": spread}, indent=1))
        return
    print(f"flow loss alone: {alone / 2**20:.0f} MiB; one state {state / 2**20:.2f} MiB")
    print("steps   recomputed, less the states   kept")
    for row in rows:
        kept = f"{row['kept_mib']:9.0f} MiB" if row["kept_mib"] else "        not measured"
        print(f"{row['steps']:5} {row['recomputed_mib']:20.0f} MiB {kept}")
    print(f"largest over smallest, recomputed: {spread:+.1%}")


if __name__ == "__main__":
    main()
