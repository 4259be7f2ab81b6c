"""A comparison of tokenizers and codecs as files to send to a colleague: a page, tables, plots and pictures."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import flowmo
from flowmo.checkpoint.files import write_content
from flowmo.data import Source
from flowmo.errors import FlowMoError
from flowmo.evaluate.measurement import Measurement
from flowmo.evaluate.metrics.pairs import grid
from flowmo.evaluate.published import TABLE_1, TABLE_3
from flowmo.evaluate.reconstruction import Pace, Reconstructor, read_crops
from flowmo.evaluate.summary import Summary
from flowmo.images import to_pil

COLUMNS = (
    ("bits_per_pixel", "bits/pixel", 4),
    ("bytes_per_picture", "bytes", 1),
    ("file_bytes", "bytes, file", 1),
    ("frechet_distance", "rFID ↓", 2),
    ("kernel_distance", "rKID ↓", 5),
    ("psnr", "PSNR ↑", 2),
    ("ssim", "SSIM ↑", 4),
    ("lpips_alex", "LPIPS Alex ↓", 4),
    ("lpips_vgg", "LPIPS VGG ↓", 4),
    ("ids_used", "ids used", 3),
    ("id_entropy", "bits/id", 3),
)
GRID_PICTURES = 6
GRID_HEIGHT = 256
"""Height in pixels of whole images of any size on the page."""
LABEL_SIZE = 14
PACKAGES = ("torch", "numpy", "PIL", "torch_fidelity")


class ReportError(FlowMoError, RuntimeError):
    """A report that cannot be drawn."""


@dataclass(frozen=True)
class Entry:
    """A candidate and what was found."""

    candidate: Reconstructor
    measurement: Measurement
    summary: Summary
    pace: Pace


def write_report(
    out: Path,
    entries: Sequence[Entry],
    source: Source,
    indices: Sequence[int],
    side: int | None,
    facts: Mapping[str, Any],
) -> None:
    """Write ``report.md``, ``.json``, ``.tex``, ``index.html``, the plots and the pictures.

    Args:
        indices: of the pictures that were measured, in the measurements' order.
        facts: protocol, weights, seed: what the header says.

    Raises:
        ReportError: matplotlib is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    header = {**facts, "versions": versions()} | speed(entries)
    rows = [entry.summary for entry in entries]
    content = {
        "header": header,
        "rows": [{**row.as_dict(), "pace": entry.pace.as_dict()} for row, entry in zip(rows, entries, strict=True)],
        "published": [row._asdict() | {"bits_per_pixel": row.bits_per_pixel} for row in TABLE_1 + TABLE_3],
    }
    pictures = draw_plots(out, rows) + draw_images(out, entries, source, indices, side)
    for name, text in (
        ("report.json", json.dumps(content, indent=1, ensure_ascii=False)),
        ("report.md", markdown(rows, header, pictures)),
        ("report.tex", latex(rows)),
        ("index.html", page(out, rows, header, pictures)),
    ):
        write_content(out / name, text)


def speed(entries: Sequence[Entry]) -> dict[str, str]:
    """Pictures a second of what this call did itself; an evaluation that was found whole has none."""
    first = entries[0].pace.as_dict()
    if not first:
        return {}
    evaluator = f"reading {first['reading_per_second']:.0f}, judging {first['judging_per_second']:.1f}"
    paces = ((entry.summary.name, entry.pace.as_dict().get("reconstructing_per_second")) for entry in entries)
    return {"pictures a second": ", ".join([evaluator, *(f"{name} {pace:.1f}" for name, pace in paces if pace)])}


def versions() -> dict[str, str]:
    found = {"flowmo": flowmo.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            continue
        except RuntimeError:  # a torchvision of another torch; its version matters to no figure
            continue
    return found


def weights_hash(network: nn.Module) -> str:
    """16 hex digits that name its weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# Tables


def cells(row: Summary, columns: Sequence[tuple[str, str, int]]) -> list[str]:
    values = row.as_dict()
    shown = []
    for key, _, places in columns:
        value, spread = values[key], values.get(f"{key}_spread")
        text = "–" if value is None else f"{value:.{places}f}"
        shown.append(text if value is None or spread is None else f"{text} ± {spread:.{min(places, 3)}f}")
    return shown


def used_columns(rows: Sequence[Summary]) -> list[tuple[str, str, int]]:
    """Those that a row has a value in, and called FID only where all distances are."""
    columns = [column for column in COLUMNS if any(row.as_dict()[column[0]] is not None for row in rows)]
    if all(row.is_fid for row in rows):
        return columns
    names = {"rFID ↓": "Fréchet ↓", "rKID ↓": "kernel ↓"}
    return [(key, names.get(name, name), places) for key, name, places in columns]


def table(rows: Sequence[Summary]) -> str:
    columns = used_columns(rows)
    lines = [["", *(name for _, name, _ in columns)], ["---"] * (len(columns) + 1)]
    lines += [[row.name, *cells(row, columns)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def notes(rows: Sequence[Summary], header: Mapping[str, Any]) -> list[str]:
    """What a reader must know to compare."""
    first = rows[0]
    said = [
        f"{first.pictures} pictures; ± is the standard deviation over pictures, not an error of the mean.",
        "PSNR is of each picture, of 8-bit pixels. As the release computes it, of five pictures at once, truncated: "
        + ", ".join(f"{row.name} {row.psnr_legacy:.2f}" for row in rows if row.psnr_legacy is not None)
        + ". SSIM of truncated pictures: "
        + ", ".join(f"{row.name} {row.ssim_legacy:.4f}" for row in rows if row.ssim_legacy is not None)
        + ".",
    ]
    if first.frechet_distance is not None:
        biases = ", ".join(f"{row.name} {row.frechet_bias:.2f}" for row in rows if row.frechet_bias is not None)
        said.append(
            f"Distances of features: {first.feature_network}. A Fréchet distance of few pictures is too large, by the "
            f"distances of halves by about: {biases}. The kernel distance is not. Compare at equal counts only."
        )
    said += [f"{row.name}: {row.missing}" for row in rows if row.missing]
    said += [f"{row.name}: {row.equal_pictures} pictures equal their originals." for row in rows if row.equal_pictures]
    return said


def header_lines(header: Mapping[str, Any]) -> list[tuple[str, str]]:
    def shown(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {version}" for name, version in value.items())
        return str(value)

    return [(name.replace("_", " "), shown(value)) for name, value in header.items()]


def markdown(rows: Sequence[Summary], header: Mapping[str, Any], pictures: Sequence[tuple[str, str]]) -> str:
    about = "\n".join(f"- {name}: {value}" for name, value in header_lines(header))
    said = "\n".join(f"- {line}" for line in notes(rows, header))
    images = "\n\n".join(f"{caption}\n\n![{caption}]({name})" for name, caption in pictures)
    return f"# Reconstruction\n\n{about}\n\n{table(rows)}\n{said}\n\n{images}\n\n{published_table()}"


def published_table() -> str:
    lines = [
        "Published figures, ImageNet-1K validation at 256 × 256 (tables 1 and 3 of the paper), not measured here:",
        "",
    ]
    lines += ["| | bits/pixel | rFID | PSNR | SSIM | LPIPS |", "| --- | --- | --- | --- | --- | --- |"]
    for row in TABLE_1 + TABLE_3:
        rate = "continuous" if row.bits_per_pixel is None else f"{row.bits_per_pixel:.4f}"
        values = ["–" if value is None else f"{value:g}" for value in (row.rfid, row.psnr, row.ssim, row.lpips)]
        lines.append("| " + " | ".join((row.name + " †" * row.own, rate, *values)) + " |")
    return "\n".join([*lines, "", "† as their authors report"]) + "\n"


def latex(rows: Sequence[Summary]) -> str:
    """A tabular with booktabs' rules."""
    columns = used_columns(rows)

    def escaped(text: str) -> str:
        for plain, tex in (("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("#", r"\#"), ("↑", r"$\uparrow$")):
            text = text.replace(plain, tex)
        return text.replace("↓", r"$\downarrow$").replace("±", r"$\pm$").replace("–", "--").replace("é", r"\'e")

    lines = [r"\begin{tabular}{l" + "r" * len(columns) + "}", r"\toprule"]
    lines.append(" & ".join(["", *(escaped(name) for _, name, _ in columns)]) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join(map(escaped, [row.name, *cells(row, columns)])) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


# Plots and pictures


def draw_plots(out: Path, rows: Sequence[Summary]) -> list[tuple[str, str]]:
    """Rate against distortion, and rate against the distance of features with the published points."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("the report's plots need matplotlib: pip install 'flowmo[studies]'") from None
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    shown = [("psnr", "PSNR (dB)")]
    shown.append(("lpips_alex", "LPIPS (AlexNet)") if rows[0].lpips_alex is not None else ("ssim", "SSIM"))
    for axis, (key, name) in zip(axes, shown, strict=True):
        for i, row in enumerate(rows):
            value = getattr(row, key)
            if value is not None:
                marker = "*" if i == 0 else "o"
                axis.plot(row.bits_per_pixel, value, marker, markersize=12 if i == 0 else 7, label=row.name)
        axis.set(xlabel="bits per pixel", ylabel=name)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(out / "rate_distortion.png", dpi=110)
    plots = [("rate_distortion.png", "Rate against distortion, measured here")]
    measured = [row for row in rows if row.frechet_distance is not None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    published = [row for row in TABLE_1 if row.bits_per_pixel is not None]
    axis.plot([r.bits_per_pixel for r in published], [r.rfid for r in published], "x", color="gray", label="published")
    for point in published:
        axis.annotate(
            point.name,
            (point.bits_per_pixel, point.rfid),
            fontsize=6,
            color="gray",
            xytext=(3, 3),
            textcoords="offset points",
        )
    for i, row in enumerate(measured):
        axis.plot(
            row.bits_per_pixel, row.frechet_distance, "*" if i == 0 else "o", markersize=10, label=f"{row.name}, here"
        )
    name = "rFID" if all(row.is_fid for row in measured) else "Fréchet distance (published: rFID)"
    axis.set(xlabel="bits per pixel", ylabel=name, yscale="log", xscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    figure.savefig(out / "rfid_bpp.png", dpi=110)
    caption = (
        "rFID against rate. Published points are of 50 000 pictures of ImageNet at 256 × 256; those measured here are "
        f"of {rows[0].pictures} other pictures and not to be compared with them"
    )
    return [*plots, ("rfid_bpp.png", caption)]


def draw_images(
    out: Path, entries: Sequence[Entry], source: Source, indices: Sequence[int], side: int | None
) -> list[tuple[str, str]]:
    """Originals and every candidate's pictures where the first candidate is worst, in the middle and best."""
    first = entries[0]
    column = "lpips_alex" if first.summary.lpips_alex is not None else "squared_error"
    order = first.measurement.column(column).argsort(descending=True).tolist()
    count = min(GRID_PICTURES, len(order))
    middle = (len(order) - count) // 2
    chosen = {"worst": order[:count], "median": order[middle : middle + count], "best": order[len(order) - count :]}
    drawn = []
    for name, places in chosen.items():
        these = [indices[place] for place in places]
        columns = [read_crops(source, [index], side, enlarge=True) for index in these]
        candidates = [entry.candidate for entry in entries]
        rows = [[at_height(x[0], side) for x in columns]]
        for candidate in candidates:
            made = [candidate.reconstruct(x, [index]).images.cpu() for x, index in zip(columns, these, strict=True)]
            rows.append([at_height(y[0], side) for y in made])
        labelled(to_pil(grid(rows)), ["original", *(entry.summary.name for entry in entries)]).save(out / f"{name}.png")
        judged = "LPIPS" if column == "lpips_alex" else "squared error"
        names = ", ".join(Path(source.name(index)).name for index in these)
        drawn.append((f"{name}.png", f"{name.capitalize()} of {first.summary.name} by {judged}: {names}"))
    return drawn


def at_height(image: Tensor, side: int | None) -> Tensor:
    """An image 3 h w of known size as it is, and another at ``GRID_HEIGHT``."""
    if side:
        return image
    width = max(round(image.shape[2] * GRID_HEIGHT / image.shape[1]), 1)
    return F.interpolate(image[None], (GRID_HEIGHT, width), mode="bilinear", antialias=True)[0]


def labelled(picture: Image.Image, names: Sequence[str]) -> Image.Image:
    """A picture of rows of equal height with their names at the left."""
    font = ImageFont.load_default(LABEL_SIZE)
    margin = max(math.ceil(font.getlength(name)) for name in names) + LABEL_SIZE
    wide = Image.new("RGB", (margin + picture.width, picture.height), "white")
    wide.paste(picture, (margin, 0))
    canvas = ImageDraw.Draw(wide)
    for i, name in enumerate(names):
        middle = (i + 0.5) * picture.height / len(names)
        canvas.text((margin - LABEL_SIZE // 2, middle), name, "#222", font, anchor="rm")
    return wide


def page(out: Path, rows: Sequence[Summary], header: Mapping[str, Any], pictures: Sequence[tuple[str, str]]) -> str:
    """One file that needs no other: the pictures are inside."""
    columns = used_columns(rows)
    about = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in header_lines(header)
    )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *(name for _, name, _ in columns)))
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in (row.name, *cells(row, columns))) + "</tr>"
        for row in rows
    )
    said = "".join(f"<li>{html.escape(line)}</li>" for line in notes(rows, header))
    images = ""
    for name, caption in pictures:
        data = base64.b64encode((out / name).read_bytes()).decode()
        text = html.escape(caption)
        images += (
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )
    known = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell.strip())}</td>" for cell in line.strip("| ").split("|")) + "</tr>"
        for line in published_table().splitlines()
        if line.startswith("|") and "---" not in line
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>FlowMo: reconstruction</title>
<meta name="viewport" content="width=device-width"><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }}
td, th {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }}
td:first-child, th:first-child {{ text-align: left }} tr:first-child td {{ font-weight: 600 }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }} dt {{ color: #666 }} dd {{ margin: 0 }}
img {{ max-width: 100%; image-rendering: auto }} figure {{ margin: 2rem 0 }} figcaption {{ color: #666 }}
</style></head><body>
<h1>Reconstruction</h1><dl>{about}</dl>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<ul>{said}</ul>{images}
<h2>Published, not measured here</h2><p>ImageNet-1K validation at 256 × 256; † as their authors report.</p>
<table>{known}</table></body></html>
"""
