"""Draws eight images of a folder above their reconstructions, one row per model.

python examples/draw_models.py out.jpg letters/held_out nano results/letters_decoder results/letters
"""

import sys
from pathlib import Path

import torch

import flowmo
from flowmo.data import evenly_spread
from flowmo.evaluate.metrics.pairs import grid
from flowmo.images import resize_and_crop, to_pil, to_tensor

out, folder, *models = sys.argv[1:]
paths = sorted(Path(folder).iterdir())
tokenizers = [flowmo.load(model) for model in models]
side = tokenizers[0].config.data.image_size
chosen = [paths[index] for index in evenly_spread(8, len(paths))]
originals = torch.stack([to_tensor(resize_and_crop(flowmo.read_image(path), side)) for path in chosen])
rows = [originals, *(tok.decode(tok.encode(originals)) for tok in tokenizers)]
to_pil(grid(rows)).save(out, quality=85)
