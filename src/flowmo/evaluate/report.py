"""A comparison of tokenizers and codecs as files to share: a web page, tables, plots and images."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import flowmo
from flowmo.checkpoint.files import write_content
from flowmo.data import Source
from flowmo.errors import FlowMoError
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
PAGE = Path(__file__).with_name("page.html")

Table = list[list[str]]
"""Rows of cells; the first row is the heading."""
Figures = list[tuple[str, str]]
"""(file name, caption) of each plot or image."""


class ReportError(FlowMoError, RuntimeError):
    """A report cannot be drawn."""


@dataclass(frozen=True)
class Entry:
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
    pixels: PixelFormat = PixelFormat(),
) -> None:
    """Write ``report.md``, ``report.json``, ``index.html``, plots and images.

    Args:
        side: size of the crops; ``None`` for images of any size.
        metadata: protocol, weights, seed and so on, for the header.
        pixels: channels and values of the images.

    Raises:
        ReportError: matplotlib is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    versions = f"flowmo {flowmo.__version__}, torch {torch.__version__}, Pillow {PIL.__version__}"
    header = {**metadata, "versions": versions}
    rows = [entry.summary for entry in entries]
    content = {
        "header": header,
        "rows": [row.as_dict() for row in rows],
        "published": [row._asdict() | {"bits_per_pixel": row.bits_per_pixel} for row in TABLE_1 + TABLE_3],
    }
    figures = draw_plots(out, rows) + draw_images(out, entries, source, side, pixels)
    for name, text in (
        ("report.json", json.dumps(content, indent=1, ensure_ascii=False)),
        ("report.md", markdown(rows, header, figures)),
        ("index.html", web_page(out, rows, header, figures)),
    ):
        write_content(out / name, text)


# Tables and text


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


def markdown_table(table: Table) -> str:
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown(rows: Sequence[Summary], header: Mapping[str, str], figures: Figures) -> str:
    about = "\n".join(f"- {name}: {value}" for name, value in header.items())
    note_items = "\n".join(f"- {line}" for line in notes(rows))
    images = "\n\n".join(f"{caption}\n\n![{caption}]({name})" for name, caption in figures)
    published = "Published, ImageNet-1K validation at 256 × 256 (tables 1 and 3 of the paper), not measured here:"
    return (
        f"# Reconstruction\n\n{about}\n\n{markdown_table(results_table(rows))}\n{note_items}\n\n{images}\n\n"
        f"{published}\n\n{markdown_table(published_table())}\n† as their authors report\n"
    )


def html_table(table: Table) -> str:
    head, *body = (
        "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for row, tag in zip(table, ["th"] + ["td"] * len(table), strict=False)
    )
    return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def web_page(out: Path, rows: Sequence[Summary], header: Mapping[str, str], figures: Figures) -> str:
    """Return a self-contained HTML page; images are embedded."""
    about = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in header.items())
    note_items = "".join(f"<li>{escape(line)}</li>" for line in notes(rows))
    images = ""
    for name, caption in figures:
        data, text = base64.b64encode((out / name).read_bytes()).decode(), escape(caption)
        image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
        images += f"<figure>{image}<figcaption>{text}</figcaption></figure>"
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        about=about,
        results=html_table(results_table(rows)),
        notes=note_items,
        images=images,
        published=html_table(published_table()),
    )


# Plots and images


def draw_plots(out: Path, rows: Sequence[Summary]) -> Figures:
    """Plot rate against distortion, and rate against rFID with the published points."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("The report's plots need matplotlib. Install it: pip install 'flowmo[studies]'.") from None

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
    perceptual = {"key": "lpips_alex", "ylabel": "LPIPS (AlexNet)"}
    plot(right, **(perceptual if rows[0].lpips_alex is not None else {"key": "ssim", "ylabel": "SSIM"}))
    figure.savefig(out / "rate_distortion.png", dpi=110)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    points = [(row.name, row.bits_per_pixel, row.rfid) for row in TABLE_1 if row.bits_per_pixel is not None]
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
    return [("rate_distortion.png", "Rate against distortion, measured here"), ("rfid_bpp.png", caption)]


def draw_images(out: Path, entries: Sequence[Entry], source: Source, side: int | None, pixels: PixelFormat) -> Figures:
    """Draw originals and reconstructions where the first candidate is worst, median and best."""
    first = entries[0]
    has_lpips = first.summary.lpips_alex is not None
    column, metric = ("lpips_alex", "LPIPS") if has_lpips else ("squared_error", "squared error")
    order = first.measurement.rows[column].argsort(descending=True).tolist()
    count = min(GRID_IMAGES, len(order))
    middle = (len(order) - count) // 2
    chosen = {"worst": order[:count], "median": order[middle : middle + count], "best": order[len(order) - count :]}
    drawn = []
    for name, positions in chosen.items():
        these = first.measurement.rows["index"][positions].tolist()
        originals = [read_crops(source, [index], side, True, pixels) for index in these]
        columns = [
            [pixels.visible(y) for y in (x, *(e.candidate.reconstruct(x, [index]).images.cpu() for e in entries))]
            for x, index in zip(originals, these, strict=True)
        ]
        rows = [[at_height(image[0], side or GRID_HEIGHT) for image in row] for row in zip(*columns, strict=True)]
        labels = ["original", *(entry.summary.name for entry in entries)]
        label_rows(to_pil(grid(rows)), labels).save(out / f"{name}.png")
        files = ", ".join(Path(source.name(index)).name for index in these)
        drawn.append((f"{name}.png", f"{name.capitalize()} of {first.summary.name} by {metric}: {files}"))
    return drawn


def at_height(image: Tensor, height: int) -> Tensor:
    """Resize an image 3 × h × w."""
    width = max(round(image.shape[2] * height / image.shape[1]), 1)
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]


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
