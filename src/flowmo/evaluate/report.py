"""A comparison of tokenizers and codecs as files to share: a web page, tables, plots and images."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import flowmo
from flowmo.checkpoint.files import write_content
from flowmo.data import Source
from flowmo.evaluate.measurement import Measurement
from flowmo.evaluate.metrics.pairs import grid
from flowmo.evaluate.published import TABLE_1, TABLE_3
from flowmo.evaluate.reconstruction import Reconstructor, read_crops
from flowmo.evaluate.summary import Summary, notes
from flowmo.images import to_pil
from flowmo.images.pixels import PixelFormat

GRID_IMAGES = 6
GRID_HEIGHT = 256
"""Height, in pixels, to which native-size images are resized."""
LABEL_SIZE = 14
PAGES = {"index.html": "page.html", "report.md": "page.md"}
"""Files of a report and their templates."""
RESULTS = "report.json"

Table = list[list[str]]
"""Rows of cells; the first row is the heading."""
Figures = dict[str, str]
"""{file name: caption} of plots and images."""


class Entry(NamedTuple):
    """A candidate and its results."""

    candidate: Reconstructor
    measurement: Measurement
    summary: Summary


def write_report(
    out: Path,
    entries: Sequence[Entry],
    source: Source,
    side: int | None,
    metadata: Mapping[str, str],
    pixels: PixelFormat,
) -> None:
    """Write ``report.md``, ``report.json``, ``index.html``, plots and images. Needs matplotlib and jinja2.

    Args:
        side: size of the crops; ``None`` for images of any size.
        metadata: protocol, weights, seed and so on, for the header.
        pixels: channels and values of the images.
    """
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    out.mkdir(parents=True, exist_ok=True)
    versions = f"flowmo {flowmo.__version__}, torch {torch.__version__}, Pillow {PIL.__version__}"
    header, rows = {**metadata, "versions": versions}, [entry.summary for entry in entries]
    content = {
        "header": header,
        "rows": [row.as_dict() for row in rows],
        "published": [row._asdict() | {"bits_per_pixel": row.bits_per_pixel} for row in TABLE_1 + TABLE_3],
    }
    write_content(out / RESULTS, _encoded(json.dumps(content, indent=1, ensure_ascii=False)))
    page = {
        "header": header,
        "results": results_table(rows),
        "notes": notes(rows),
        "figures": draw_plots(out, rows) | draw_images(out, entries, source, side, pixels),
        "published": published_table(),
        "embed": lambda name: base64.b64encode((out / name).read_bytes()).decode(),
    }
    loader = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=loader, autoescape=select_autoescape(), trim_blocks=True, keep_trailing_newline=True)
    for name, template in PAGES.items():
        write_content(out / name, _encoded(templates.get_template(template).render(page)))


def is_report(folder: Path) -> bool:
    """Return whether a folder holds the results of ``write_report``."""
    try:
        content = json.loads((folder / RESULTS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= {"header", "rows", "published"}


def _encoded(text: str) -> bytes:
    """Encode as UTF-8. Bytes of file names that are none are written as ``\\udc…``, which JSON reads, too."""
    return text.encode(errors="backslashreplace")


def results_table(rows: Sequence[Summary]) -> Table:
    """Tabulate summaries, without columns that have no value."""
    cells = [row.cells() for row in rows]
    headings = dict.fromkeys(heading for row in cells for heading in row)
    lines = [
        [row.name, *(found.get(heading, "–") for heading in headings)] for row, found in zip(rows, cells, strict=True)
    ]
    return [["", *headings], *lines]


def published_table() -> Table:
    table = [["", "bits/pixel", "rFID", "PSNR", "SSIM", "LPIPS"]]
    for row in TABLE_1 + TABLE_3:
        rate = "continuous" if row.bits_per_pixel is None else f"{row.bits_per_pixel:.4f}"
        values = ["–" if value is None else f"{value:g}" for value in (row.rfid, row.psnr, row.ssim, row.lpips)]
        table.append([row.name + " †" * row.own, rate, *values])
    return table


def draw_plots(out: Path, rows: Sequence[Summary]) -> Figures:
    """Plot rate against distortion, and rate against rFID with the published points."""
    from matplotlib.figure import Figure

    def plot(axis: Any, key: str, **labels: Any) -> None:
        for i, row in enumerate(rows):
            if getattr(row, key) is not None:
                style = {"marker": "*", "markersize": 12} if i == 0 else {"marker": "o", "markersize": 7}
                axis.plot(row.bits_per_pixel, getattr(row, key), label=f"{row.name}, here", linestyle="", **style)
        axis.set(xlabel="bits per pixel", **labels)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot(left, "psnr", ylabel="PSNR (dB)")
    has_lpips = rows[0].lpips_alex is not None
    plot(right, "lpips_alex" if has_lpips else "ssim", ylabel="LPIPS (AlexNet)" if has_lpips else "SSIM")
    figure.savefig(out / "rate_distortion.png", dpi=110)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    points = [(row.name, row.bits_per_pixel, row.rfid) for row in TABLE_1]
    axis.plot([x for _, x, _ in points], [y for _, _, y in points], "x", color="gray", label="published")
    for name, x, y in points:
        axis.annotate(name, (x, y), fontsize=6, color="gray", xytext=(3, 3), textcoords="offset points")
    is_fid = all(row.is_fid for row in rows if row.frechet_distance is not None)
    label = "rFID" if is_fid else "Fréchet distance (published: rFID)"
    plot(axis, "frechet_distance", ylabel=label, yscale="log", xscale="log")
    figure.savefig(out / "rfid_bpp.png", dpi=110)
    caption = (
        "rFID against rate. Published points: the 50 000 validation images of ImageNet at 256 × 256. Measured here: "
        f"{rows[0].images} images of the source above. Compare only equal sets"
    )
    return {"rate_distortion.png": "Rate against distortion, measured here", "rfid_bpp.png": caption}


def draw_images(out: Path, entries: Sequence[Entry], source: Source, side: int | None, pixels: PixelFormat) -> Figures:
    """Draw originals and reconstructions where the first candidate is worst, median and best."""
    first, drawn = entries[0], {}
    has_lpips = first.summary.lpips_alex is not None
    column, metric = ("lpips_alex", "LPIPS") if has_lpips else ("squared_error", "squared error")
    order = first.measurement.rows[column].argsort(descending=True).tolist()
    count = min(GRID_IMAGES, len(order))
    middle = (len(order) - count) // 2
    chosen = {"worst": order[:count], "median": order[middle : middle + count], "best": order[len(order) - count :]}
    for name, positions in chosen.items():
        these, columns = first.measurement.rows["index"][positions].tolist(), []
        for index in these:
            x = read_crops(source, [index], side, True, pixels)
            images = [x, *(entry.candidate.reconstruct(x, [index]).images.cpu() for entry in entries)]
            columns.append([at_height(pixels.visible(image), side or GRID_HEIGHT)[0] for image in images])
        labels = ["original", *(entry.summary.name for entry in entries)]
        label_rows(to_pil(grid([*zip(*columns, strict=True)])), labels).save(out / f"{name}.png")
        files = ", ".join(Path(source.name(index)).name for index in these)
        drawn[f"{name}.png"] = f"{name.capitalize()} of {first.summary.name} by {metric}: {files}"
    return drawn


def at_height(images: Tensor, height: int) -> Tensor:
    """Resize images b × 3 × h × w."""
    width = max(round(images.shape[3] * height / images.shape[2]), 1)
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def label_rows(image: Image.Image, names: Sequence[str]) -> Image.Image:
    """Add names to the left of an image's rows, which have one height."""
    font = ImageFont.load_default(LABEL_SIZE)
    margin = max(math.ceil(font.getlength(name)) for name in names) + LABEL_SIZE
    wide = Image.new("RGB", (margin + image.width, image.height), "white")
    wide.paste(image, (margin, 0))
    canvas = ImageDraw.Draw(wide)
    for i, name in enumerate(names):
        middle = (i + 0.5) * image.height / len(names)
        canvas.text((margin - LABEL_SIZE // 2, middle), name, "#222", font, anchor="rm")
    return wide
