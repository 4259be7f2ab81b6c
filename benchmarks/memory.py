"""Memory of training and of decoding over the batch: by arithmetic for every preset, and measured beside it.

    python benchmarks/memory.py --json docs/performance/memory.json           # arithmetic, and nano on a CPU
    python benchmarks/memory.py --device cuda --measure small lo              # measured on a GPU
    python benchmarks/memory.py --cards docs/training.md                      # redraws what trains on one small GPU

Four policies of training are compared: every activation kept for the backward pass, or of each block (with
``trainer.activation_checkpointing``) its inputs and what ``trainer.checkpoint_keeps`` names: the results of all matrix
products, those of attention, or nothing more. The rest is computed again. Arithmetic counts the state (weights,
gradients, Adam's moments, EMA) and the peak of forward and backward pass on tensors without contents.
Each measurement is the peak of a process of its own: resident set on a CPU, allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import flowmo
from flowmo import Config, FlowMo
from flowmo.distributed import World
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.stages import Stage
from flowmo.train.cost import training_memory
from flowmo.train.ema import EMA
from flowmo.train.memory import used_memory
from flowmo.train.optimizer import build_optimizers
from flowmo.train.parallel import prepare

GIB = 2**30
POLICIES = ("all", "products", "attention", "inputs")
BATCHES = (2, 16, 32)
CARDS = (24, 80, 141)
"""GiB of the GPUs that the table says what fits on."""
STAGES = {
    "nano": ("nano", ()),
    "small": ("small", ()),
    "Lo and Hi": ("lo", ()),
    "Lo, stage 1B": ("lo", ("model.posttrain_sample=true", "opt.lpips_mode=resnet")),
}

SMALL_CARDS = (8, 12, 16, 24)
"""GB, of 10^9 bytes, of consumer GPUs."""
ON_SMALL_CARDS = {
    "nano": ("nano", ()),
    "native": ("native", ()),
    "small": ("small", ()),
    "Lo or Hi": ("lo", ()),
    "Lo or Hi, decoder only": ("lo", ("model.train=decoder",)),
}
BEGIN, END = "<!-- cards: begin -->", "<!-- cards: end -->"


def settings(preset: str, policy: str, *more: str) -> Config:
    if policy == "all":
        return flowmo.preset(preset).override("trainer.activation_checkpointing=false", *more)
    checkpointing = "trainer.activation_checkpointing=true", f"trainer.checkpoint_keeps={policy}"
    return flowmo.preset(preset).override(*checkpointing, *more)


# By arithmetic


def expected(preset: str, policy: str, more: tuple[str, ...]) -> tuple[float, float]:
    """GiB of all that no image adds to, and of each image."""
    memory = training_memory(settings(preset, policy, *more))
    return memory.peak_bytes(0) / GIB, memory.activation_bytes / GIB


def arithmetic() -> list[dict]:
    rows = []
    for name, (preset, more) in STAGES.items():
        for policy in POLICIES:
            if "model.posttrain_sample=true" in more and policy not in ("all", "inputs"):
                continue  # refused, since the chain's steps are computed again as it is
            state, picture = expected(preset, policy, more)
            fits = {str(card): max(int((0.9 * card - state) / picture), 0) for card in CARDS}
            rows.append({"what": name, "policy": policy, "state": state, "picture": picture, "fits": fits})
    return rows


def small_cards() -> str:
    """Table of the largest micro-batch of one small GPU, in bfloat16 with activation checkpointing."""
    cards = [f"{card} GB" for card in SMALL_CARDS]
    lines = ["| | stage | state | an image | " + " | ".join(cards) + " |", "|" + "---|" * (4 + len(cards))]
    for name, (preset, more) in ON_SMALL_CARDS.items():
        for stage, stages in (("1A", ()), ("1B", ("model.posttrain_sample=true", "opt.lpips_mode=resnet"))):
            state, image = expected(preset, "inputs", (*more, *stages))
            fits = (int((0.9 * card * 1e9 / GIB - state) / image) for card in SMALL_CARDS)
            cells = [name, stage, f"{state:.1f}", f"{image:.2f}", *(str(n) if n > 0 else "–" for n in fits)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def redraw(page: Path) -> None:
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{small_cards()}\n\n{END}{after}", encoding="utf-8")


# Measured


def train_once(preset: str, policy: str, batch: int, device: torch.device) -> None:
    """Two steps, so that Adam's moments are there when the second one's activations are."""
    config = settings(preset, policy, "opt.lpips_weight=0")
    tokenizer = FlowMo(config).to(device)
    stage = prepare(Stage(tokenizer, config.opt), World(device=device), config.trainer)
    (optimizer, *_), average = build_optimizers(tokenizer), EMA(tokenizer, batch)
    side = config.data.image_size
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    for step in range(2):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = stage(images, TrainingNoise.of(config, images, range(batch)))
        loss.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # gradients count to the state
        average.update(step)


@torch.no_grad()
def decode_once(preset: str, batch: int, device: torch.device) -> None:
    tokenizer = FlowMo(flowmo.preset(preset)).eval().to(device)
    tokenizer.chunk_size = batch
    side = tokenizer.config.data.image_size
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        tokenizer.decode(tokenizer.encode(torch.zeros(batch, 3, side, side)), 2)


def measure(what: str, preset: str, policy: str, batch: int, device: str) -> float | None:
    """GiB at most of a process of its own; ``None`` if it fails, as out of memory."""
    # Freed blocks go back to the system at once, so that the resident set is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--device", device, "--one", what, preset, policy, str(batch)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    return None if done.returncode else int(done.stdout) / GIB


def measured(presets: list[str], batches: list[int], device: str) -> list[dict]:
    """Rows of GiB at most, beyond those of a process that does nothing with the same libraries."""
    nothing = measure("nothing", "nano", "all", 0, device)
    if nothing is None:
        raise SystemExit(f"No memory can be measured on {device}.")
    rows = []
    for preset in presets:
        for what, policy in (*(("training", policy) for policy in POLICIES), ("decoding", "all")):
            peaks = [measure(what, preset, policy, batch, device) for batch in batches]
            found = [None if peak is None else peak - nothing for peak in peaks]
            row = {"what": what, "preset": preset, "policy": policy, "gib": dict(zip(batches, found, strict=True))}
            row["expected_picture"] = None
            if what == "training":
                more = "opt.lpips_weight=0", f"trainer.enable_bfloat16={str(device != 'cpu').lower()}"
                row["expected_picture"] = expected(preset, policy, more)[1]
            fitting = [(batch, gib) for batch, gib in zip(batches, found, strict=True) if gib is not None]
            (few, least), (many, most) = (fitting[0], fitting[-1]) if len(fitting) > 1 else ((0, 0.0), (0, 0.0))
            row["picture"] = (most - least) / (many - few) if many > few else None
            rows.append(row)
    return rows


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def tables(found: dict) -> str:
    lines = [
        "By arithmetic, GiB, in bfloat16 with LPIPS on VGG, or stage 1B's ResNet-50, in float32; a tenth is left free:",
        "",
        f"| training | kept | state | an image | {' | '.join(f'batch {b}' for b in BATCHES)} | "
        + " | ".join(f"fit in {card}" for card in CARDS)
        + " |",
        "|" + "---|" * (4 + len(BATCHES) + len(CARDS)),
    ]
    for row in found["arithmetic"]:
        peaks = (f"{row['state'] + batch * row['picture']:.1f}" for batch in BATCHES)
        cells = [row["what"], row["policy"], f"{row['state']:.1f}", f"{row['picture']:.2f}", *peaks]
        lines.append("| " + " | ".join([*cells, *map(str, row["fits"].values())]) + " |")
    if found["measured"]:
        batches = list(found["measured"][0]["gib"])
        lines += [
            "",
            f"Measured ({found['machine']}), GiB at most, without a perceptual network:",
            "",
            f"| | preset | kept | {' | '.join(f'batch {b}' for b in batches)} | an image | by arithmetic |",
            "|" + "---|" * (5 + len(batches)),
        ]
        for row in found["measured"]:
            cells = [row["what"], row["preset"], row["policy"] if row["what"] == "training" else "–"]
            cells += [number(value, 2) for value in row["gib"].values()]
            cells += [number(row["picture"], 3), number(row["expected_picture"], 3)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--measure", nargs="*", default=["nano"], help="presets that are run (nano)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16], help="theirs (1 4 16)")
    parser.add_argument("--json", type=Path, help="write all figures to this file too")
    parser.add_argument("--cards", type=Path, metavar="PAGE", help="only redraw the table of small GPUs in this page")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cards:
        redraw(arguments.cards)
        return
    device = torch.device(arguments.device)
    if arguments.one:
        what, preset, policy, batch = arguments.one
        if what == "training":
            train_once(preset, policy, int(batch), device)
        elif what == "decoding":
            decode_once(preset, int(batch), device)
        print(used_memory(device))
        return
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, float32, resident set"
    found: dict = {"torch": torch.__version__, "machine": machine}
    # First, while this process is small: the resident set of a process it starts is at least its own.
    found["measured"] = measured(arguments.measure, arguments.batches, arguments.device)
    found["arithmetic"] = arithmetic()
    print(tables(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
