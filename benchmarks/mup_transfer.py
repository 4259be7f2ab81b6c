"""Does µP transfer? Coordinate check and learning-rate sweeps over widths, with and without it: a table and a plot.

    python benchmarks/mup_transfer.py --data PICTURES --out docs/pictures/mup.png

Takes about ten minutes on two cores; ``--quick`` half of one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from mup_check import coordinate_check

from flowmo import Config
from flowmo.data import ImageDataset, open_source
from flowmo.train.trainer import Trainer

BASE = {
    "data": {"image_size": 32, "global_batch_size": 16, "max_microbatch": 16, "num_workers": 0},
    "model": {
        "patch_size": 8,
        "num_heads": 2,
        "enc_num_heads": 2,
        "hidden_size": 64,
        "enc_hidden_size": 64,
        "enc_depth": 2,
        "dec_depth": 3,
        "code_length": 16,
        "context_dim": 18,
    },
    "opt": {"lpips_weight": 0.0},
    "trainer": {
        "sample_every": 0,
        "checkpoint_every": "1000 epochs",
        "enable_bfloat16": False,
        "tensorboard": False,
    },
}
BASE_WIDTH = 128
LAYERS = ("encoder block 2", "encoder code_out", "decoder block 3", "decoder picture_out")


def final_loss(config: Config) -> float:
    """Mean loss of the last fifth of a run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Trainer(config, Path(folder), report=lambda line: None)
        run.train()
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="examples/pictures", help="folder of pictures (examples/pictures)")
    parser.add_argument("--out", type=Path, default=Path("mup.png"), help="plot to write; its figures go beside it")
    parser.add_argument("--quick", action="store_true", help="fewer widths, rates and steps")
    arguments = parser.parse_args()
    widths = [64, 128] if arguments.quick else [64, 128, 256, 512]
    swept = [64, 128] if arguments.quick else [64, 128, 256]
    rates = [1e-3, 4e-3] if arguments.quick else [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    steps = 10 if arguments.quick else 200
    config = Config.from_dict(BASE).override(f"data.train={arguments.data}")
    source = ImageDataset(open_source(arguments.data), config.data.image_size)
    images = torch.stack([source[i, 0] for i in range(8)])
    figures, axes = {}, plt.subplots(2, 3, figsize=(13, 7.5), constrained_layout=True)[1]
    for row, (name, base) in enumerate((("µP", BASE_WIDTH), ("release", 0))):
        parametrised = config.override(f"opt.mup_base_width={base}")
        checked = coordinate_check(parametrised.override("opt.lr=3e-3"), widths, images, steps=4)
        for axis, scales, what in ((axes[row, 0], checked.size, "size"), (axes[row, 1], checked.change, "change")):
            for layer in LAYERS:
                axis.plot(widths, scales[layer], "o-", label=layer)
            axis.set(xscale="log", yscale="log", xlabel="width", title=f"{name}: mean absolute {what} of activations")
            axis.set_xticks(widths, [str(w) for w in widths])
            axis.xaxis.minorticks_off()
            axis.set_ylim(0.05, 30)
            axis.grid(alpha=0.3)
        of_size, of_change = checked.slopes(checked.size), checked.slopes(checked.change)
        for layer in of_size:
            print(f"{name:8} {layer:22} grows as width^{of_size[layer]:+.2f}, its change as {of_change[layer]:+.2f}")
        sweep = {}
        for width in swept:
            losses = []
            for rate in rates:
                settings = (
                    f"model.hidden_size={width}",
                    f"model.enc_hidden_size={width}",
                    f"opt.lr={rate}",
                    f"trainer.max_steps={steps}",
                    f"trainer.log_every={steps // 5}",
                )
                losses.append(final_loss(parametrised.override(*settings)))
            sweep[width] = losses
            best = rates[losses.index(min(losses))]
            print(
                f"{name:8} width {width:4}: best rate {best:g}, losses {' '.join(f'{v:.4f}' for v in losses)}",
                flush=True,
            )
            axes[row, 2].plot(rates, losses, "o-", label=f"width {width}")
        axes[row, 2].set(xscale="log", xlabel="opt.lr", title=f"{name}: loss after {steps} steps of 16")
        axes[row, 2].grid(alpha=0.3)
        figures[name] = {
            "widths": widths,
            "size": checked.size,
            "change": checked.change,
            "rates": rates,
            "loss": sweep,
        }
    axes[0, 1].legend(fontsize=8)
    axes[0, 2].legend(fontsize=8)
    plt.savefig(arguments.out, dpi=90)
    arguments.out.with_suffix(".json").write_text(json.dumps(figures, indent=1))
    print(arguments.out)


if __name__ == "__main__":
    main()
