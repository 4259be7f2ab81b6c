"""Draws the picture at the top of the README: the example photographs above what the bundled model decodes.

python examples/draw_demo.py docs/pictures/demo.png
"""

import sys
from pathlib import Path

import torch
from PIL import Image

import flowmo
from flowmo.evaluate.figures import grid
from flowmo.pictures import resize_and_crop, to_picture, to_tensor

tok = flowmo.load("nano")
side = tok.config.data.image_size
files = sorted((Path(__file__).parent / "pictures").glob("*.jpg"))
photographs = torch.stack([to_tensor(resize_and_crop(Image.open(file).convert("RGB"), side)) for file in files])
decoded = tok.decode(tok.encode(photographs).ids)
to_picture(grid([photographs, decoded])).save(sys.argv[1])
