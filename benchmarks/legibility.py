"""Are letters still letters and faces still the same person after decoding? By networks that nobody here trained.

    pip install rapidocr-onnxruntime dlib-bin face_recognition_models
    python benchmarks/legibility.py --model native --font OpenSans-Regular.ttf --faces IMAGES --out OUT

text    Lines of English words in a font that no training image has, black on white and white on black, by size.
        An OCR model (PP-OCRv4, from rapidocr-onnxruntime) reads the decoded image. Character accuracy is
        1 − edit distance / characters, at least 0.
faces   Faces that dlib finds in IMAGES, at least 40 pixels wide. dlib's face network embeds original and decoded face;
        distances below 0.6 count as the same person by its authors.

Both are measured for the originals, for the model at three rates and for AVIF at no fewer bytes. Writes
legibility.json; a part that is not asked for stays as it was.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import flowmo
from flowmo.checkpoint.files import write_content
from flowmo.codec.file import Codec, find_context
from flowmo.data import open_source
from flowmo.evaluate.codecs import CodecReconstructor

WORDS = (
    "the and people water light house number always letter mother answer school father under paper world story example "
    "river mountain second enough almost night picture young often important children begin carry state without"
)
SIZES = (12, 16, 24, 32, 48)
"""Font sizes in pixels."""
LINES = 8
SAME_PERSON = 0.6
SMALLEST_FACE = 40

Decode = Callable[[Image.Image], Image.Image]


def text_image(size: int, seed: int, font: Path) -> tuple[Image.Image, str]:
    """One line of words of a font size in pixels, on an image 448 pixels wide and about twice the size high."""
    draw, drawn = random.Random(f"{size} {seed}"), ImageFont.truetype(str(font), size)
    words: list[str] = []
    while True:
        more = [*words, draw.choice(WORDS.split())]
        if drawn.getlength(" ".join(more)) > 430:
            break
        words = more
    ink, paper = ("black", "white") if seed % 2 else ("white", "black")
    height = -(-2 * size // 16) * 16  # whole cells; the OCR model scales the line to 48 pixels
    image = Image.new("RGB", (448, height), paper)
    ImageDraw.Draw(image).text((8, height // 2), " ".join(words), ink, drawn, anchor="lm")
    return image, " ".join(words)


def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions and substitutions between two strings (Levenshtein 1966)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


class Reader:
    """Character accuracy of an OCR model."""

    def __init__(self) -> None:
        from rapidocr_onnxruntime import RapidOCR

        self.ocr = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)

    def accuracy(self, image: Image.Image, text: str) -> float:
        found, _ = self.ocr(np.asarray(image)[..., ::-1], use_det=False, use_cls=False, use_rec=True)
        read = " ".join(line[0] for line in found or [])
        return max(1 - edit_distance(read.replace(" ", ""), text.replace(" ", "")) / len(text.replace(" ", "")), 0.0)


class Faces:
    """Faces of some images, and how far a decoded face is from its original."""

    def __init__(self) -> None:
        import dlib

        # Its own import needs pkg_resources, which recent setuptools lack.
        (package,) = find_spec("face_recognition_models").submodule_search_locations
        models = Path(package) / "models"
        self.detect = dlib.get_frontal_face_detector()
        self.landmarks = dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))
        self.network = dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat"))

    def find(self, image: Image.Image) -> list[Any]:
        return [box for box in self.detect(np.asarray(image), 1) if box.width() >= SMALLEST_FACE]

    def embed(self, image: Image.Image, box: Any) -> np.ndarray:
        pixels = np.asarray(image)
        return np.array(self.network.compute_face_descriptor(pixels, self.landmarks(pixels, box)))


def decoders(tokenizer: flowmo.FlowMo, codec: Codec) -> dict[str, Decode]:
    """By name: the original, the model at its lowest, middle and highest rate, and AVIF with no fewer bytes at each."""
    rates = list(tokenizer.rates(256, 256)) if tokenizer.variable_rate else [None]
    avif = CodecReconstructor("avif", 0, at_least=True)

    def through_model(rate: float | None, image: Image.Image) -> tuple[bytes, Image.Image]:
        codes = tokenizer.encode_image(image, bits_per_pixel=None if rate is None else rate * 1.5)
        if rate is not None:  # images of other sizes have rates a little above
            codes = codes.coarser(rates.index(rate) + 1)
        return codec.pack(codes), tokenizer.decode_image(codes)

    def through_avif(rate: float | None, image: Image.Image) -> Image.Image:
        content = avif.encode(image, len(through_model(rate, image)[0]))
        return Image.open(io.BytesIO(content)).convert("RGB")

    found: dict[str, Decode] = {"original": lambda image: image}
    for rate in dict.fromkeys((rates[0], rates[len(rates) // 2], rates[-1])):
        name = "" if rate is None else f" {rate:.3f}"
        found[f"model{name}"] = lambda image, rate=rate: through_model(rate, image)[1]
        found[f"avif{name}"] = lambda image, rate=rate: through_avif(rate, image)
    return found


def mean_and_error(values: list[float]) -> list[float]:
    """Mean and standard error."""
    return [float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)]


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--font", type=Path)
    parser.add_argument("--faces")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = flowmo.load(arguments.model)
    path = arguments.out / "legibility.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("model") != tokenizer.weights_identity():
        found = {"model": tokenizer.weights_identity()}
    ways = decoders(tokenizer, Codec(tokenizer, find_context(arguments.model, tokenizer)))
    if arguments.font:
        reader = Reader()
        found["character accuracy by font size"] = {
            name: {
                str(size): mean_and_error(
                    [
                        reader.accuracy(decode(image), text)
                        for image, text in (text_image(size, seed, arguments.font) for seed in range(LINES))
                    ]
                )
                for size in SIZES
            }
            for name, decode in ways.items()
        }
    if arguments.faces:
        faces, source = Faces(), open_source(arguments.faces)
        images = [image for image in (source.read(index) for index in range(len(source))) if faces.find(image)]
        boxes = [(image, box) for image in images for box in faces.find(image)]
        found["faces"], rows = len(boxes), {}
        for name, decode in ways.items():
            decoded = {id(image): decode(image) for image in images}
            distances = [
                float(np.linalg.norm(faces.embed(image, box) - faces.embed(decoded[id(image)], box)))
                for image, box in boxes
            ]
            same = [float(distance < SAME_PERSON) for distance in distances]
            rows[name] = {"distance": mean_and_error(distances), "same person": mean_and_error(same)}
        found["face distance"] = rows
    write_content(path, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
