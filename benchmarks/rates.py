"""Quality over rate on whole images: tokenizers at every rate beside JPEG, WebP, AVIF and JPEG XL.

    python benchmarks/rates.py IMAGES --models native nano --limit 50 --out docs/rates
    python benchmarks/rates.py --redraw --out docs/rates      # tables and curves again, from rates.json

IMAGES     folder, tar … of held-out images whose sides are multiples of 16
--models   the first is the one that the codecs follow: for each image and rate they take the lowest quality whose file
           has at least the bytes of the model's file, and may shrink the image. The others have their own rates.
--dists    weights.pt of DISTS_pytorch, for DISTS
--rates    how many rates of a model of variable rate, evenly spread over the five; 1 is the middle one
--codecs   by default all four
--pairs    metrics of pairs of images only: no rFID and rKID, and no images.jpg
--passes   passes of the decoder, for the first model at its middle rate

Writes rates.json, rates.md, curves.png and, unless --redraw, images.jpg: twelve images, evenly spread over IMAGES, at
three rates. Rows that rates.json already has for the same weights and images are kept, and not measured again. All
bytes are of whole files. The metrics are those of ``flowmo evaluate --fit whole``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from dists import DISTS
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

import flowmo
from flowmo.checkpoint.files import write_content
from flowmo.codec.file import Codec, find_context
from flowmo.data import evenly_spread, open_source
from flowmo.evaluate.codecs import FORMATS, CodecReconstructor
from flowmo.evaluate.metrics import build_features
from flowmo.evaluate.metrics.features import FeatureNetwork
from flowmo.evaluate.metrics.fid import Gaussian, frechet_distance
from flowmo.evaluate.metrics.pairs import grid, psnr, ssim
from flowmo.evaluate.metrics.sets import kernel_distance
from flowmo.images import to_bytes, to_pil, to_tensor
from flowmo.losses.perceptual import LPIPS
from flowmo.model.sampler import image_seed

METRICS = {
    "lpips_alex": "LPIPS (AlexNet) ↓",
    "lpips_vgg": "LPIPS (VGG) ↓",
    "dists": "DISTS ↓",
    "psnr": "PSNR (dB) ↑",
    "ssim": "SSIM ↑",
    "rfid": "rFID ↓",
    "rkid": "rKID ↓",
}
DIGITS = {"psnr": 2, "rfid": 1, "rkid": 4}
SCALES = (1, 2, 4)
"""Factors by which a codec may shrink an image that it cannot code in few bytes otherwise."""
FIVE = 5
"""Rates of a model of variable rate, unless fewer are asked for."""
SHOWN_RATES = 3
SHOWN_IMAGES = 12
SHOWN_SIZE = (256, 256)
SIDE_BY_SIDE = 2
"""Images in one line of the page, each with its decodings."""


@dataclass
class Candidate:
    """One row of the table: images of one method at one rate.

    ``reconstruct`` takes an image 3 h w and its index, and gives the decoded image and the bytes of the file.
    """

    name: str
    rate: float | None
    passes: int | None
    reconstruct: Callable[[Tensor, int], tuple[Tensor, int]]


def tokenizer_candidate(
    name: str, tokenizer: flowmo.FlowMo, codec: Codec, rate: float | None, passes: int | None = None
) -> Candidate:
    def reconstruct(image: Tensor, index: int) -> tuple[Tensor, int]:
        codes = tokenizer.encode_image(to_pil(image), bits_per_pixel=rate)
        content = codec.pack(codes)
        decoded = tokenizer.decode_image(codec.unpack(content), passes, image_seed(0, index))
        return to_tensor(decoded), len(content)

    return Candidate(name, rate, passes, reconstruct)


def codec_candidate(kind: str, rate: float | None, sizes: dict[int, int]) -> Candidate:
    """A codec with at least ``sizes[index]`` bytes, at the largest of three scales that it can code in so few."""
    codec = CodecReconstructor(kind, 0, at_least=True)

    def reconstruct(image: Tensor, index: int) -> tuple[Tensor, int]:
        picture = to_pil(image)
        for factor in SCALES:
            small = picture.resize((picture.width // factor, picture.height // factor), Image.Resampling.LANCZOS)
            if factor == SCALES[-1] or len(codec.encode(small, 0)) <= sizes[index]:
                break
        content = codec.encode(small, sizes[index])
        decoded = Image.open(io.BytesIO(content)).convert("RGB")
        return to_tensor(decoded.resize(picture.size, Image.Resampling.BICUBIC)), len(content)

    return Candidate(codec.name, rate, None, reconstruct)


class Evaluator:
    """All metrics of pairs of images, and distances of sets of them."""

    def __init__(self, dists: Path | None, sets: bool = True):
        self.pairs: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "lpips_alex": LPIPS("alex"),
            "lpips_vgg": LPIPS("vgg"),
            "psnr": psnr,
            "ssim": lambda x, y: ssim(to_bytes(x), to_bytes(y)),
        }
        if dists is not None:
            self.pairs["dists"] = DISTS(dists)
        self.network: FeatureNetwork | None = build_features() if sets else None
        self.originals: dict[int, Tensor] = {}

    @torch.no_grad()
    def evaluate(self, candidate: Candidate, images: dict[int, Tensor]) -> dict[str, Any]:
        """One row: bytes per image by index, and each metric's mean, standard error and ``values`` per image."""
        values: dict[str, list[float]] = {name: [] for name in self.pairs}
        sizes, features, pixels = {}, [], 0
        for index, image in images.items():
            decoded, sizes[index] = candidate.reconstruct(image, index)
            pixels += image[0].numel()
            x, y = image[None], decoded[None]
            for name, metric in self.pairs.items():
                values[name].append(float(metric(x, y)))
            if self.network is None:
                continue
            if index not in self.originals:
                self.originals[index] = self.network(x).pooled[0].cpu()
            features.append(self.network(y).pooled[0].cpu())
        row: dict[str, Any] = {"name": candidate.name, "rate": candidate.rate, "passes": candidate.passes}
        row |= {"images": len(images), "bytes": sum(sizes.values()) / len(images)}
        row |= {"bits_per_pixel": 8 * sum(sizes.values()) / pixels, "sizes": sizes}
        for name, found in values.items():
            column = torch.tensor(found, dtype=torch.float64)
            row[name] = float(column.mean())
            row[f"{name}_error"] = standard_error(column)
        row["values"] = {name: [round(value, 5) for value in found] for name, found in values.items()}
        if self.network is None:
            return row
        x, y = torch.stack([self.originals[index] for index in images]), torch.stack(features)
        row["rfid"], row["rkid"] = distance(x, y), kernel_distance(x, y, paired=True)
        row["features"] = self.network.name
        return row


def standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


def distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of two sets of features, n × d each."""
    x, y = x.double(), y.double()
    return frechet_distance(*(Gaussian(features.mean(0), features.T.cov(), len(features)) for features in (x, y)))


def candidates(
    models: list[str], passes: list[int], rows: list[dict[str, Any]], count: int = FIVE, codecs: list[str] | None = None
) -> Iterator[tuple[dict[str, Any], Candidate]]:
    """Yield each candidate with the identity of its row. The row of a model comes first: codecs take its sizes."""
    for number, path in enumerate(models):
        tokenizer = flowmo.load(path)
        codec = Codec(tokenizer, find_context(path, tokenizer))
        name, weights = ("native" if tokenizer.native_size else Path(path).stem), tokenizer.weights_identity()
        rates = chosen_rates(tokenizer, count)
        for rate in rates:
            yield {"weights": weights}, tokenizer_candidate(name, tokenizer, codec, rate)
            sizes = {int(index): size for index, size in rows[-1]["sizes"].items()}
            for kind in (codecs or FORMATS) if number == 0 else ():
                yield {"weights": weights}, codec_candidate(kind, rate, sizes)
        for steps in passes if number == 0 else ():
            rate = rates[len(rates) // 2]
            yield {"weights": weights}, tokenizer_candidate(f"{name}, {steps} passes", tokenizer, codec, rate, steps)


def chosen_rates(tokenizer: flowmo.FlowMo, count: int = FIVE) -> list[float | None]:
    """``count`` of five rates, the lowest and the highest among them; the middle one for 1; or the only one."""
    if not tokenizer.variable_rate:
        return [None]
    rates = tokenizer.rates(256, 256)
    five = sorted({0, 1, len(rates) // 2 - 1, len(rates) * 3 // 4 - 1, len(rates) - 1})
    count = min(count, len(five))
    if count == 1:
        return [rates[five[len(five) // 2]]]
    return [rates[five[k * (len(five) - 1) // (count - 1)]] for k in range(count)]


def measure(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    source = open_source(arguments.images)
    indices = evenly_spread(arguments.limit or len(source), len(source))
    images = {index: to_tensor(source.read(index)) for index in indices}
    measured = hashlib.sha256(b"".join(to_bytes(image).numpy().tobytes() for image in images.values())).hexdigest()
    content: dict[str, Any] = {"images": len(images), "source": Path(arguments.images).name, "rows": []}
    content["images_sha256"] = measured
    earlier = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    if earlier["rows"] and earlier.get("images_sha256", measured) != measured:
        raise SystemExit(f"{path} was measured on other images. Name another --out.")
    evaluator = Evaluator(arguments.dists, sets=not arguments.pairs)
    wanted = {*evaluator.pairs, *(() if arguments.pairs else ("rfid", "rkid"))}
    for identity, candidate in candidates(
        arguments.models, arguments.passes, content["rows"], arguments.rates, arguments.codecs
    ):
        key = identity | {"name": candidate.name, "rate": candidate.rate, "images": len(images)}
        row = next((row for row in earlier["rows"] if key.items() <= row.items() and wanted <= row.keys()), None)
        if row is None:
            row = identity | evaluator.evaluate(candidate, images)
        content["rows"].append(row)
        rows = union(content["rows"], earlier["rows"])
        write_content(path, json.dumps(content | {"rows": rows}, indent=1) + "\n")
        print(f"{row['name']:20} {row['bytes']:8.1f} bytes", *(f"{k} {row[k]:.4f}" for k in METRICS if k in row))
    weights = {row["weights"] for row in content["rows"]}
    content["rows"] = [row for row in union(content["rows"], earlier["rows"]) if row["weights"] in weights]
    write_content(path, json.dumps(content, indent=1) + "\n")
    return content


def union(rows: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return this call's rows, then those of earlier calls that are not among them."""
    keys = [(row["weights"], row["name"], row["rate"]) for row in rows]
    return rows + [row for row in earlier if (row["weights"], row["name"], row["rate"]) not in keys]


def draw_table(content: dict[str, Any]) -> str:
    """Markdown page: curves, images, a table for each rate of the first model, and one of the rest."""
    metrics = {key: name for key, name in METRICS.items() if key in content["rows"][0]}
    lines = [
        "# Whole images over five rates",
        "",
        f"{content['images']} whole images of `{content['source']}`, entire files. ± is the standard error.",
        "For each image, a codec takes the lowest quality whose file has at least the bytes of the model's file.",
        "Where its smallest file is larger, it codes the image at half or a quarter of its size and enlarges it.",
        "",
        "![Metrics over bits per pixel](curves.png)",
    ]
    if "features" in content["rows"][0]:
        features = (
            f"The features of rFID and rKID come from {content['rows'][0]['features']}. So few images overstate rFID."
        )
        lines[5:6] = [features, ""]
        lines += ["", "![Twelve images, evenly spread over the set, each at three rates](images.jpg)"]
    for rate, group in groupby(content["rows"], key=lambda row: row["rate"]):
        title = "own rate" if rate is None else f"{rate:.4f} bits per pixel before entropy coding"
        rows = list(group)
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", *table_lines(rows, metrics)]
        if len(rows) > 1 and all("values" in row for row in rows):
            lines += ["", f"Minus {rows[0]['name']}, image by image:", "", *difference_lines(rows, metrics)]
    return "\n".join(lines) + "\n"


def table_lines(rows: list[dict[str, Any]], metrics: dict[str, str]) -> list[str]:
    """Bytes and metrics, a line per row."""
    lines = markdown_head(["", "bytes", "bits/pixel", *metrics.values()])
    for row in rows:
        cells = [row["name"], f"{row['bytes']:.0f}", f"{row['bits_per_pixel']:.4f}"]
        for key in metrics:
            digits = DIGITS.get(key, 3)
            error = f" ± {row[f'{key}_error']:.{digits}f}" if f"{key}_error" in row else ""
            cells.append(f"{row[key]:.{digits}f}{error}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def difference_lines(rows: list[dict[str, Any]], metrics: dict[str, str]) -> list[str]:
    """Each later row minus the first: the mean over images and its standard error. Metrics of sets have none."""
    metrics = {key: name for key, name in metrics.items() if key in rows[0]["values"]}
    lines = markdown_head(["", *metrics.values()])
    for row in rows[1:]:
        cells = [row["name"]]
        for key in metrics:
            difference = torch.tensor(row["values"][key]).double() - torch.tensor(rows[0]["values"][key]).double()
            digits = DIGITS.get(key, 3)
            cells.append(f"{float(difference.mean()):+.{digits}f} ± {standard_error(difference):.{digits}f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown_head(names: list[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" + "|--:" * (len(names) - 1) + "|"]


def draw_curves(content: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    metrics = [key for key in METRICS if key in content["rows"][0] and key != "rfid"]
    figure = Figure(figsize=(12, 3.4 * math.ceil(len(metrics) / 3)), layout="constrained")
    axes = figure.subplots(math.ceil(len(metrics) / 3), 3, squeeze=False).flatten()
    names = list(dict.fromkeys(row["name"] for row in content["rows"]))
    for axis, key in zip(axes, metrics, strict=False):
        for name in names:
            rows = sorted(
                (row for row in content["rows"] if row["name"] == name), key=lambda row: row["bits_per_pixel"]
            )
            x, y = [row["bits_per_pixel"] for row in rows], [row[key] for row in rows]
            errors = [row.get(f"{key}_error", 0.0) for row in rows]
            first = name == names[0]
            axis.errorbar(x, y, errors, fmt="o-", markersize=4, linewidth=2.5 if first else 1.2, label=name)
        axis.set(xlabel="bits per pixel of whole files", ylabel=METRICS[key], xscale="log")
        axis.set_xticks([0.03, 0.05, 0.1, 0.2, 0.3], ["0.03", "0.05", "0.1", "0.2", "0.3"], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    for axis in axes[len(metrics) :]:
        axis.set_axis_off()
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def draw_images(arguments: argparse.Namespace, path: Path) -> None:
    """Twelve images at three rates, ``SIDE_BY_SIDE`` a line: original, then from the lowest rate to the highest."""
    source, tokenizer = open_source(arguments.images), flowmo.load(arguments.models[0])
    rates = chosen_rates(tokenizer)
    rates = [rates[i] for i in sorted({0, len(rates) // 2, len(rates) - 1})][:SHOWN_RATES]
    columns = []
    for index in evenly_spread(SHOWN_IMAGES, len(source)):
        picture = source.read(index)
        decoded = [
            tokenizer.decode_image(tokenizer.encode_image(picture, bits_per_pixel=rate), seed=image_seed(0, index))
            for rate in rates
        ]
        columns.append([to_tensor(ImageOps.pad(image, SHOWN_SIZE, color="white")) for image in (picture, *decoded)])
    columns += [[torch.ones_like(x) for x in columns[0]]] * (-len(columns) % SIDE_BY_SIDE)
    lines = [[*chain(*columns[i : i + SIDE_BY_SIDE])] for i in range(0, len(columns), SIDE_BY_SIDE)]
    names = ["original"] + ["" if rate is None else f"{rate:.3f} bits/pixel" for rate in rates]
    canvas = to_pil(grid(lines))
    head = column_names(names * SIDE_BY_SIDE, canvas.width)
    whole = Image.new("RGB", (canvas.width, canvas.height + head.height), "white")
    whole.paste(head, (0, 0))
    whole.paste(canvas, (0, head.height))
    whole.save(path, quality=88)


def column_names(names: list[str], width: int) -> Image.Image:
    """A white strip with a name over each column."""
    strip = Image.new("RGB", (width, 20), "white")
    canvas, font = ImageDraw.Draw(strip), ImageFont.load_default(14)
    for i, name in enumerate(names):
        canvas.text(((i + 0.5) * width / len(names), 10), name, "#222", font, anchor="mm")
    return strip


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="?")
    parser.add_argument("--models", nargs="+", default=["nano"])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--passes", type=int, nargs="*", default=[])
    parser.add_argument("--rates", type=int, choices=range(1, FIVE + 1), default=FIVE)
    parser.add_argument("--dists", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--codecs", nargs="+", choices=list(FORMATS))
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--redraw", action="store_true")
    arguments = parser.parse_args()
    path = arguments.out / "rates.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.redraw:
        content = json.loads(path.read_text())
    elif arguments.images:
        if not arguments.pairs:
            draw_images(arguments, arguments.out / "images.jpg")
        content = measure(arguments, path)
    else:
        parser.error("name the images, or --redraw")
    write_content(arguments.out / "rates.md", draw_table(content))
    draw_curves(content, arguments.out / "curves.png")


if __name__ == "__main__":
    main()
