"""Memory of stage 1B: the forecast of ``flowmo.train.cost`` beside the peak of real steps.

    python benchmarks/chain_memory.py [--device cuda] [--json FILE]

Three sizes of model and three lengths of the chain. Each measurement is the peak of a process of its own that takes two
steps of stage 1B in float32, with a ResNet-50 of random weights: resident set on a CPU, allocated memory on a GPU. What
an image adds is the difference of two batches over the difference of their sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from flowmo import Config, FlowMo
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.perceptual import build_distance
from flowmo.losses.stages import Stage
from flowmo.train.cost import training_memory
from flowmo.train.memory import used_memory

MIB = 2**20
STEPS = (1, 4, 8)
BATCHES = (2, 6)
COMMON = (
    "model.posttrain_sample=true",
    "opt.lpips_mode=resnet",
    "opt.lpips_weight=0.01",
    "trainer.enable_bfloat16=false",
)
SIZES = {
    "width 256, 128 px": (
        *(
            "data.image_size=128",
            "model.patch_size=8",
            "model.hidden_size=256",
            "model.num_heads=4",
            "model.dec_depth=4",
        ),
        *("model.enc_hidden_size=128", "model.enc_num_heads=2", "model.enc_depth=2", "model.code_length=64"),
    ),
    "width 384, 128 px": (
        *(
            "data.image_size=128",
            "model.patch_size=8",
            "model.hidden_size=384",
            "model.num_heads=6",
            "model.dec_depth=8",
        ),
        *("model.enc_hidden_size=192", "model.enc_num_heads=3", "model.enc_depth=2", "model.code_length=64"),
    ),
    "width 256, 192 px": (
        *(
            "data.image_size=192",
            "model.patch_size=8",
            "model.hidden_size=256",
            "model.num_heads=4",
            "model.dec_depth=6",
        ),
        *("model.enc_hidden_size=128", "model.enc_num_heads=2", "model.enc_depth=2", "model.code_length=64"),
    ),
}


def settings(size: str, steps: int) -> Config:
    return Config().override(*COMMON, *SIZES[size], f"model.posttrain_sample_k={steps}")


def two_steps(size: str, steps: int, batch: int, device: torch.device) -> int:
    """Most bytes held; the gradients of the first step are there in the second."""
    config = settings(size, steps)
    torch.manual_seed(0)
    tokenizer = FlowMo(config).to(device)
    tokenizer.encoder.requires_grad_(False)
    stage = Stage(tokenizer, config.opt, build_distance("resnet", pretrained=False).to(device))
    side = config.data.image_size
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    for _ in range(2):
        stage(images, TrainingNoise.of(config, images, range(batch))).loss.backward()
    return used_memory(device)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        size, steps, batch = arguments.one
        print(two_steps(size, int(steps), int(batch), torch.device(arguments.device)))
        return

    def measure(size: str, steps: int, batch: int) -> int | None:
        # Freed blocks go back to the system at once, so that the resident set is what is in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, "--device", arguments.device, "--one", size, str(steps), str(batch)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        return None if done.returncode else int(done.stdout)

    rows = []
    print("| model | chain | forecast, MiB per image | measured | ratio |\n|---|---|---|---|---|")
    for size in SIZES:
        for steps in STEPS:
            few, many = (measure(size, steps, batch) for batch in BATCHES)
            if few is None or many is None:
                print(f"| {size} | {steps} | failed, see above |", flush=True)
                continue
            measured = (many - few) / (BATCHES[1] - BATCHES[0]) / MIB
            forecast = training_memory(settings(size, steps)).activation_bytes / MIB
            rows.append({"model": size, "steps": steps, "forecast_mib": forecast, "measured_mib": measured})
            print(f"| {size} | {steps} | {forecast:.1f} | {measured:.1f} | {forecast / measured:.2f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": arguments.device, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
