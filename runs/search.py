"""The native recipe's decisions at small scale, one changed at a time.

    python runs/search.py OUT HELD_OUT IMAGES [--images 3840] [--limit 48] [--only base lfq]

Trains a small native network once per decision on the same images in the same order, with the learning rate falling
to zero over the second half. Measures each on whole HELD_OUT images at the lowest, the middle and the highest rate.
Finished runs are not repeated; an interrupted one goes on. Prints a Markdown table and writes OUT/search.json, which
belongs to one HELD_OUT, IMAGES, ``--images`` and ``--limit``.

Cost: about 4 minutes per run on one core with bfloat16 matrix units.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import flowmo
from flowmo.checkpoint.files import write_content
from flowmo.checkpoint.run_folder import ENDED, best_checkpoint
from flowmo.config import Config
from flowmo.data import open_source
from flowmo.evaluate.reconstruction import Evaluators, FlowMoReconstructor, measure
from flowmo.evaluate.summary import Summary
from flowmo.train.trainer import Trainer

SMALL = (
    *("model.hidden_size=256", "model.num_heads=2", "model.dec_depth=3"),
    *("model.enc_hidden_size=256", "model.enc_num_heads=2", "model.enc_depth=1", "model.ema_decay=0.98"),
    *("opt.cooldown=0.5", "opt.warmup=480 images", "trainer.sample_every=0", "trainer.keep_every=0"),
    *("opt.lpips_mode=vgg", "opt.lpips_weight=0.2", "opt.lpips_bfloat16=false"),
)
DECISIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "base": ((), "FSQ, Muon, heads of 128, LPIPS (VGG) of 64-pixel crops"),
    "seed": (("trainer.seed=1",), "the spread: another seed changes little beside the rest"),
    "lfq": (
        (
            *("model.quantization_type=lfq", "model.context_dim=72", "model.codebook_size_for_entropy=9"),
            *("model.entropy_loss_weight=0.05", "model.commit_loss_weight=0.02"),
        ),
        "worse by 1 dB or more: a bit per channel carries less gradient than a level of eight",
    ),
    "adam": (("opt.optimizer=adam",), "worse: nano needed three fifths of the images with Muon"),
    "heads of 64": (("model.num_heads=4", "model.enc_num_heads=4"), "equal within the spread, and slower"),
    "whole LPIPS": (("opt.lpips_crop=0",), "a little better per image, at half the images per second"),
    "LPIPS (AlexNet)": (("opt.lpips_mode=alex", "opt.lpips_crop=0"), "better in AlexNet, worse in VGG, and faster"),
    "both LPIPS": (
        ("opt.lpips_mode=vgg+alex", "opt.lpips_weight=0.4", "opt.lpips_bfloat16=true"),
        "nearly as good as each alone in its own metric, and faster by bfloat16",
    ),
    "always t = 1": (("opt.anchor=1.0",), "better in one pass: no capacity goes to denoising"),
    "one rate": (("model.nested_dropout=0.0",), "better at the highest rate, useless below it"),
}
"""Name: the settings that differ from the base, and what was expected before measuring."""

SECONDS = "seconds"


def train(name: str, arguments: argparse.Namespace) -> tuple[Path, float]:
    """Train one variant, or find it trained; its checkpoint and the seconds that training took."""
    folder = arguments.out / name.replace(" ", "_")
    config = Config.from_yaml(Path(__file__).parent.parent / "configs" / "native.yaml")
    data = (f"data.train={arguments.train}", "data.num_workers=1")
    length = (f"trainer.duration={arguments.images} images", f"trainer.checkpoint_every={arguments.images} images")
    config = config.override(*SMALL, *data, *length, *DECISIONS[name][0])
    if not (folder / ENDED).is_file():
        start = time.process_time() - cpu_seconds(folder)
        Trainer(config, folder, report=lambda line: print(f"{name}: {line}", flush=True)).train()
        write_content(folder / SECONDS, f"{time.process_time() - start:.0f}")
        if not (folder / ENDED).is_file():
            raise SystemExit(f"{name} was stopped. Run the same command again to resume.")
    checkpoint = best_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint, cpu_seconds(folder)


def cpu_seconds(folder: Path) -> float:
    """Seconds that training has taken so far, up to the last call that was not killed."""
    path = folder / SECONDS
    return float(path.read_text()) if path.is_file() else 0.0


def evaluate(checkpoint: Path, arguments: argparse.Namespace, evaluators: Evaluators) -> list[dict[str, Any]]:
    """Metrics at three rates on whole images; at the only rate of a model that has one."""
    tokenizer, source = flowmo.load(checkpoint), open_source(arguments.held_out)
    rates: list[float | None] = [None]
    if tokenizer.variable_rate:
        possible = tokenizer.rates(224, 224)
        rates = [
            possible[0] * 1.1,
            possible[len(possible) // 2 - 1] * 1.1,
            None,
        ]  # images of other sizes: a little more
    found = []
    for rate in rates:
        candidate = FlowMoReconstructor(tokenizer, bits_per_pixel=rate)
        summary = Summary.of("", measure(candidate, source, None, evaluators, limit=arguments.limit))
        found.append(summary.as_dict())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("held_out")
    parser.add_argument("train")
    parser.add_argument("--images", type=int, default=3840)
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--only", nargs="+", choices=DECISIONS, default=list(DECISIONS))
    arguments = parser.parse_args()
    path = arguments.out / "search.json"
    same = {name: getattr(arguments, name) for name in ("held_out", "train", "images", "limit")}
    found = json.loads(path.read_text()) if path.is_file() else {**same, "rows": {}}
    if changed := [f"{name}={found.get(name)}" for name, value in same.items() if found.get(name) != value]:
        raise SystemExit(f"{path} was made with {', '.join(changed)}. Name another OUT.")
    rows = found["rows"]
    write_content(path, json.dumps(found, indent=1) + "\n")
    evaluators, missing = Evaluators.find(features="none")
    if missing:
        raise SystemExit("\n".join(missing))
    for name in arguments.only:
        if name not in rows:
            checkpoint, seconds = train(name, arguments)
            rows[name] = {"settings": DECISIONS[name][0], "expected": DECISIONS[name][1], "cpu_seconds": seconds}
            rows[name]["metrics"] = evaluate(checkpoint, arguments, evaluators)
            write_content(path, json.dumps(found, indent=1) + "\n")
    columns = ["", "expected", "CPU seconds", "bits/pixel", "PSNR (dB)", "LPIPS (AlexNet)", "LPIPS (VGG)"]
    print(f"| {' | '.join(columns)} |\n|---|---" + "|--:" * 5 + "|")
    for name, row in rows.items():
        cells = [
            " / ".join(f"{metrics[key]:.{digits}f}" for metrics in row["metrics"])
            for key, digits in (("bits_per_pixel", 3), ("psnr", 2), ("lpips_alex", 3), ("lpips_vgg", 3))
        ]
        print(f"| {name} | {row['expected']} | {row['cpu_seconds']:.0f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
