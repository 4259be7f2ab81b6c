"""Draws images beside their decodings at several rates, enlarged, one file per image, to look for artefacts.

    python examples/draw_fifty.py IMAGES OUT
    python examples/draw_fifty.py IMAGES OUT --model native --limit 50 --bpp 0.0352 0.2813 --columns 3

IMAGES is sorted by name, and ``--limit`` images are spread evenly over it. Each file holds the original, then the
decodings from the lowest rate to the highest, ``--columns`` in a row. Nearest-neighbour enlargement adds nothing of its
own to them.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

import flowmo
from flowmo.data import evenly_spread, open_source
from flowmo.evaluate.metrics.pairs import grid
from flowmo.images import to_pil, to_tensor
from flowmo.model.sampler import image_seed

parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("images")
parser.add_argument("out", type=Path)
parser.add_argument("--model", default="native")
parser.add_argument("--limit", type=int, default=50)
parser.add_argument("--bpp", type=float, nargs="+", default=[0.0352, 0.1407, 0.2813], help="bits per pixel")
parser.add_argument("--columns", type=int, default=2)
parser.add_argument("--scale", type=int, default=2)
arguments = parser.parse_args()
arguments.out.mkdir(parents=True, exist_ok=True)
source, tokenizer = open_source(arguments.images), flowmo.load(arguments.model)
written = set()
for index in evenly_spread(arguments.limit, len(source)):
    image = source.read(index)
    seed = image_seed(0, index)
    codes = [tokenizer.encode_image(image, bits_per_pixel=rate) for rate in arguments.bpp]
    shown = [to_tensor(x) for x in (image, *(tokenizer.decode_image(code, seed=seed) for code in codes))]
    shown += [torch.ones_like(shown[0])] * (-len(shown) % arguments.columns)
    rows = [torch.stack(shown[i : i + arguments.columns]) for i in range(0, len(shown), arguments.columns)]
    sheet = to_pil(grid(rows))
    size = (sheet.width * arguments.scale, sheet.height * arguments.scale)
    stem = Path(source.name(index)).stem
    stem = stem if stem not in written else f"{stem}-{index}"  # of another folder
    written.add(stem)
    sheet.resize(size, Image.Resampling.NEAREST).save(arguments.out / f"{stem}.png")
