"""Draws what a bundled model fails at, for its card: letters, a face, many small things, regular lines.

python examples/draw_failures.py docs/pictures/failures.jpg
python examples/draw_failures.py docs/pictures/failures-native.jpg native

Each square of 128 × 128 pixels is 288 bytes of ids, which is half of native's full rate.
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import flowmo
from flowmo.evaluate.metrics.pairs import grid
from flowmo.images import to_pil, to_tensor

PICTURES = Path(__file__).parent / "pictures"
SIDE = 128
CROPS = (("astronaut", (76, 16, 172, 112)), ("boats", (40, 100, 200, 260)), ("temple", (90, 70, 218, 198)))
"""Squares of photographs: left, top, right and bottom."""


def letters() -> Image.Image:
    page = Image.new("RGB", (SIDE, SIDE), (245, 243, 235))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for line, words in enumerate(
        ("A picture in 288", "bytes of token ids,", "and back: these", "lines are 12 pixels", "high.")
    ):
        draw.text((6, 8 + 22 * line), words, fill=(30, 30, 40), font=font)
    return page


squares = [letters()]
for name, box in CROPS:
    photograph = flowmo.read_image(PICTURES / f"{name}.jpg")
    squares.append(photograph.crop(box).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
originals = torch.stack([to_tensor(square) for square in squares])
tok = flowmo.load(*sys.argv[2:] or ["nano"])
codes = tok.encode(originals, 8 * 288 / SIDE**2 if tok.variable_rate else None)
both = to_pil(grid([originals, tok.decode(codes)]))
both.resize((both.width * 2, both.height * 2), Image.Resampling.NEAREST).save(sys.argv[1], quality=90)
