"""Draws images of text, to try fine-tuning with: a training set, and a held-out set of other words in other fonts.

python examples/letters.py letters --train 3000 --held-out 100

Writes ``letters/train``, ``letters/held_out`` and ``letters/held_out.json``, which holds the text of each held-out
image. Every image is square and shows lines of one font, dark on light or light on dark. Needs DejaVu and Liberation
for training and FreeFont to hold out. On Debian: apt-get install fonts-dejavu-core fonts-liberation
fonts-freefont-ttf.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TRAINING_FONTS, HELD_OUT_FONTS = ("DejaVuSans", "DejaVuSerif", "Liberation"), ("Free",)
WORDS = (
    "about above across again air almost along also always animal answer area ask back base because become began "
    "being best better between birds black boat body book both box bring build call came car cause center certain "
    "change check city clear close cold color common complete could country course cover cross cut dark day deep "
    "did direct distance dog door down draw dry during each early earth east easy eat end english equation even "
    "ever every example eye face fact family far farm fast feel feet few field figure final find fire first fish "
    "five fly follow food foot force form found four free friend from front full game gave general girl give gold "
    "good got govern great green ground group grow had half hand happen hard head hear heat heavy help here high "
    "hold home horse hot hour hundred"
)
HELD_OUT_WORDS = (
    "idea inch interest island keep kind king knew know land language large last late laugh lead learn leave left "
    "less letter life light line list listen live long look love low machine made main make man many map mark mean "
    "measure men might mile mind minute money month moon morning most mother mountain move much music name nation "
    "near need"
)


def phrase(draw: random.Random, words: str) -> str:
    """Six to eight words, a quarter of them numbers, in one of three cases."""
    number = lambda: str(draw.randrange(10 ** draw.randint(1, 5)))  # noqa: E731
    chosen = [number() if draw.random() < 0.25 else draw.choice(words.split()) for _ in range(draw.randint(6, 8))]
    return draw.choice((str, str.upper, str.title))(" ".join(chosen))


def text_image(draw: random.Random, fonts: list[Path], words: str, side: int) -> tuple[Image.Image, list[str]]:
    """Draw an image, and return it with its lines of text."""
    light, dark = (tuple(draw.randint(*tones) for _ in range(3)) for tones in ((190, 255), (0, 70)))
    paper, ink = (light, dark) if draw.random() < 0.7 else (dark, light)
    font = ImageFont.truetype(str(draw.choice(fonts)), draw.randint(side // 9, side // 4))
    image, lines = Image.new("RGB", (side, side), paper), []
    canvas, left, top = ImageDraw.Draw(image), draw.randint(2, side // 16), draw.randint(2, side // 16)
    while top + font.size * 1.2 < side:
        line = ""
        for word in phrase(draw, words).split():
            if font.getlength(f"{line} {word}") > side - left:
                break
            line = f"{line} {word}".strip()
        canvas.text((left, top), line, ink, font)
        lines.append(line)
        top += round(font.size * draw.uniform(1.15, 1.4))
    return image, lines


def find_fonts(folder: Path, prefixes: tuple[str, ...]) -> list[Path]:
    """Fonts below a folder whose files begin with one of these words."""
    fonts = sorted(path for path in folder.rglob("*.ttf") if path.name.startswith(prefixes))
    if not fonts:
        words = " or ".join(prefixes)
        raise SystemExit(f"No font below {folder} begins with {words}. Install the packages above, or name --fonts.")
    return fonts


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"), help="folder of fonts")
    parser.add_argument("--train", type=int, default=3000, help="number of training images")
    parser.add_argument("--held-out", type=int, default=100, help="number of held-out images")
    parser.add_argument("--side", type=int, default=128, help="pixels of a side")
    arguments = parser.parse_args()
    texts = {}
    sets = (
        ("train", arguments.train, find_fonts(arguments.fonts, TRAINING_FONTS), WORDS),
        ("held_out", arguments.held_out, find_fonts(arguments.fonts, HELD_OUT_FONTS), HELD_OUT_WORDS),
    )
    for name, count, fonts, words in sets:
        (arguments.out / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, lines = text_image(random.Random(f"{name} {index}"), fonts, words, arguments.side)
            image.save(arguments.out / name / f"{index:05}.png")
            if name == "held_out":
                texts[f"{index:05}.png"] = lines
    (arguments.out / "held_out.json").write_text(json.dumps(texts, indent=1) + "\n")
    print(f"{arguments.train} training images and {len(texts)} held-out images in {arguments.out}")


if __name__ == "__main__":
    main()
