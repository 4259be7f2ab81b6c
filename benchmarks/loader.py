"""Pictures a second and core that training data comes in at, against plain Pillow in the same run.

    python benchmarks/loader.py [--json]

The photographs of ``examples/pictures`` are written as JPEGs (quality 90) of the sizes below, and read to the training
size by one process: once as a plain script would, once by ``flowmo.data``, once with ``data.draft``. The figures are
the best of several rounds; the last column is what a draft changes, as PSNR between the two training pictures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flowmo.data import ImageDataset, open_source
from flowmo.evaluate.metrics.pairs import psnr
from flowmo.images import read_image

SIZES = ((500, 375), (1600, 1200), (4000, 3000))
SIDES = (256, 128)
ROUNDS = 5
PICTURES = sorted((Path(__file__).parent.parent / "examples" / "pictures").glob("*.jpg"))[:4]


def plain_pillow(file: Path, side: int) -> torch.Tensor:
    """What every tutorial does: open, convert, resize the short side, crop, to a tensor."""
    picture = Image.open(file).convert("RGB")
    scale = side / min(picture.size)
    picture = picture.resize([max(side, round(length * scale)) for length in picture.size], Image.Resampling.BILINEAR)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def rates(readers: dict[str, Callable[[int], object]], count: int) -> dict[str, float]:
    """Pictures a second of each reader, best of ``ROUNDS`` rounds in turn of about half a second each."""
    best = dict.fromkeys(readers, 0.0)
    for _ in range(ROUNDS):
        for name, read in readers.items():
            start, done = time.perf_counter(), 0
            while time.perf_counter() - start < 0.5:
                read(done % count)
                done += 1
            best[name] = max(best[name], done / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for width, height in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            for i, file in enumerate(PICTURES):
                enlarged = read_image(file).resize((width, height), Image.Resampling.LANCZOS)
                enlarged.save(Path(folder) / f"{i}.jpg", quality=90)
            source = open_source(folder)
            count = len(source)
            for side in SIDES:
                views = {draft: ImageDataset(source, side, random_crop=True, draft=draft) for draft in (False, True)}
                whole, draft = (
                    torch.stack([ImageDataset(source, side, draft=d)[i, 0] for i in range(count)]) for d in views
                )
                readers = {
                    "plain_pillow": lambda i, f=source.files, s=side: plain_pillow(f[i], s),
                    "whole": lambda i, v=views: v[False][i, i],
                    "draft": lambda i, v=views: v[True][i, i],
                }
                difference = float(psnr(whole, draft).clamp(max=99).mean())
                rows.append(
                    {"size": f"{width}×{height}", "side": side, **rates(readers, count), "draft_psnr": difference}
                )
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print("images per second on one core    plain Pillow    flowmo   with draft   over Pillow   draft against whole")
    for row in rows:
        ratio = row["draft"] / row["plain_pillow"]
        same = "the same" if row["draft_psnr"] >= 99 else f"{row['draft_psnr']:.1f} dB"
        shown = f"{row['plain_pillow']:24.0f} {row['whole']:9.0f} {row['draft']:12.0f}"
        print(f"{row['size']:>12} to {row['side']:<4} {shown} {ratio:12.2f}x {same:>20}")


if __name__ == "__main__":
    main()
