"""Writes the training images of the ``native`` preset: photographs as they are, and rendered text.

    python runs/native_images.py OUT FOLDER [FOLDER ...] --without HELD_OUT [HELD_OUT ...] --fonts FOLDER --text 3000

Photographs that look like a held-out one are left out and listed. Text is drawn with the fonts below ``--fonts`` whose
names say that they have Latin letters: paragraphs, signs, lines of code, and captions over photographs.
"""

from __future__ import annotations

import argparse
import random
import shutil
import string
from pathlib import Path

import numpy as np
from nano_pictures import check_empty, files, unlike
from PIL import Image, ImageDraw, ImageFont

SIDE = 256
LATIN = ("DejaVu", "Liberation", "Free", "NotoSans-", "NotoSerif-", "NotoMono", "NotoSansMono-")
WORDS = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8").split()
QUALITY = 95


def phrase(draw: random.Random, length: int) -> str:
    """``length`` words: of the licence, numbers, and random letters, so that no spelling helps to guess them."""

    def word() -> str:
        kind = draw.random()
        if kind < 0.6:
            return draw.choice(WORDS)
        if kind < 0.8:
            return str(draw.randrange(10 ** draw.randint(1, 6)))
        return "".join(draw.choices(string.ascii_letters, k=draw.randint(2, 9)))

    text = " ".join(word() for _ in range(length))
    return draw.choice((str, str.upper, str.title))(text)


def text_image(seed: int, fonts: list[Path], photographs: list[Path]) -> Image.Image:
    """Lines of text of one font, on a plain colour or over a photograph."""
    draw = random.Random(f"text {seed}")
    ground = tuple(draw.randrange(256) for _ in range(3))
    if draw.random() < 0.5:
        ground = draw.choice(((255, 255, 255), (0, 0, 0), (250, 245, 230), (30, 30, 30)))
    image = Image.new("RGB", (SIDE, SIDE), ground)
    if photographs and draw.random() < 0.3:
        image = Image.open(draw.choice(photographs)).convert("RGB").resize((SIDE, SIDE))
    dark = np.asarray(image, np.float32).mean() < 128
    ink = tuple(draw.randrange(160, 256) if dark else draw.randrange(0, 96) for _ in range(3))
    size = round(10 * 5 ** draw.random())  # 10 to 50 pixels, small ones as often as large ones
    font = ImageFont.truetype(str(draw.choice(fonts)), size)
    canvas = ImageDraw.Draw(image)
    top, step = draw.randrange(size), round(size * draw.uniform(1.1, 1.6))
    for line in range(top, SIDE, step):
        if draw.random() < 0.85:
            canvas.text((draw.randrange(-size, 2 * size), line), phrase(draw, 8), font=font, fill=ink)
    return (
        image.rotate(draw.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=ground) if draw.random() < 0.2 else image
    )


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("photographs", type=Path, nargs="+", help="folders of photographs")
    parser.add_argument("--without", type=Path, nargs="*", default=[], help="folders of held-out photographs")
    parser.add_argument(
        "--fonts", type=Path, default=Path("/usr/share/fonts"), help="folder of fonts (/usr/share/fonts)"
    )
    parser.add_argument("--text", type=int, default=3000, help="images of rendered text (3000)")
    arguments = parser.parse_args()
    fonts = sorted(f for f in arguments.fonts.rglob("*.ttf") if f.name.startswith(LATIN))
    if arguments.text and not fonts:
        raise SystemExit(f"no fonts named {', '.join(LATIN)} below {arguments.fonts}; give --fonts FOLDER or --text 0")
    check_empty(arguments.out)
    chosen = unlike(files(arguments.photographs), files(arguments.without))
    for number, path in enumerate(chosen):
        folder = arguments.out / f"{number % 100:02}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"{number:06}{path.suffix.lower()}")
    for number in range(arguments.text):
        folder = arguments.out / f"text{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        text_image(number, fonts, chosen).save(folder / f"{number:05}.jpg", quality=QUALITY, subsampling=0)
    print(f"{len(chosen)} photographs, {arguments.text} images of text")


if __name__ == "__main__":
    main()
