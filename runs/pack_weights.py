"""Packs the trained networks of LPIPS in float16, half their size, to be brought where they cannot be downloaded.

    python runs/pack_weights.py OUT [--weights FOLDER] [--networks vgg alex]

OUT becomes a folder for ``FLOWMO_WEIGHTS``: 28 MiB for VGG, 5 MiB for AlexNet, heads included. They are loaded into
float32. LPIPS changes by less than a thousandth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from flowmo.checkpoint.files import write_whole
from flowmo.checkpoint.pth import read_pth
from flowmo.losses.perceptual import BACKBONES, HEADS, find_weights


def pack_weights(out: Path, networks: list[str], weights: Path | None = None) -> list[Path]:
    """Write features and heads of some LPIPS networks in float16, named as ``losses.perceptual`` looks for them."""
    written = []
    for network in networks:
        for names, url in (BACKBONES[network], HEADS[network]):
            found = find_weights(names, url, weights)
            values = read_pth(found).items()
            kept = {name: value.half() for name, value in values if not name.startswith("classifier")}
            path = out / found.name
            write_whole(path, lambda temporary, kept=kept: torch.save(kept, temporary))
            written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--weights", type=Path, help="folder to look in first (FLOWMO_WEIGHTS)")
    parser.add_argument("--networks", nargs="+", choices=tuple(BACKBONES), default=["vgg", "alex"], help="(both)")
    arguments = parser.parse_args()
    for path in pack_weights(arguments.out, arguments.networks, arguments.weights):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
