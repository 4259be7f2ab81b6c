"""Plots of a run: ``curves.png`` from ``metrics.jsonl``, and ``progress.png`` from the sample grids."""

import math
from collections import defaultdict
from pathlib import Path

from PIL import Image

from flowmo.train.early_stopping import HIGHER_IS_BETTER, EarlyStopping
from flowmo.train.logging import read_metrics

CURVES, PROGRESS = "curves.png", "progress.png"
MOST_ROWS = 8
PANELS = {
    "ids in use (shares)": ("ids_used", "id_entropy", "bit_entropy"),
    "gradient norm": ("gradient_norm",),
    "learning rate": ("learning_rate",),
    "images per second": ("images_per_second",),
}
NOT_LOSSES = {
    *("step", "images", "flop_utilisation", "memory_gib", "skipped_steps", "unreadable_images", "bad_pictures"),
    *(name for names in PANELS.values() for name in names),
}
Curve = list[tuple[float, float]]


def draw(folder: Path, best: EarlyStopping, originals: bool) -> None:
    """Write both plots of a run's folder. Without matplotlib, write ``progress.png`` alone."""
    draw_progress(folder, originals)
    curves = read_curves(folder)
    if curves:
        draw_curves(curves, folder / CURVES, best)


def read_curves(folder: Path) -> dict[str, Curve]:
    """Read (images, value) of every metric of a run."""
    curves: dict[str, Curve] = defaultdict(list)
    for row in read_metrics(folder):
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves[name].append((row["images"], value))
    return curves


def draw_curves(curves: dict[str, Curve], path: Path, best: EarlyStopping) -> None:
    """Plot losses, each held-out metric, use of ids, gradient norm, learning rate and speed over images seen."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    held_out = [name for name in curves if name.startswith(("held_out_", "eval_"))]
    losses = tuple(name for name in curves if name not in NOT_LOSSES and name not in held_out)
    wanted = {"training": losses, **{name: (name,) for name in held_out}, **PANELS}
    known = {title: [name for name in names if name in curves] for title, names in wanted.items()}
    panels = {title: names for title, names in known.items() if names}
    if not panels:
        return
    figure = Figure(figsize=(12, 3 * math.ceil(len(panels) / 2)), layout="constrained")
    for number, (title, names) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(math.ceil(len(panels) / 2), 2, number)
        for name in names:
            axis.plot(*zip(*curves[name], strict=True), "." * (len(curves[name]) < 30) + "-", label=name)
        axis.set(title=title, xlabel="images")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=7)
        if title == f"eval_{best.metric}":
            sign = 1 if HIGHER_IS_BETTER[best.metric] else -1
            images, value = max(curves[title], key=lambda point: sign * point[1])
            axis.axvline(images, color="gray", linestyle=":")
            axis.set_title(f"{title}, best {value:.4g}")
    figure.savefig(path, dpi=80)


def draw_progress(folder: Path, originals: bool) -> None:
    """Stack the samples of up to eight grids, evenly spread over the run, below ``originals`` if grids hold them."""
    grids = sorted((folder / "samples").glob("*.png"))
    if not grids:
        return
    spread = {round(i * (len(grids) - 1) / (MOST_ROWS - 1)) for i in range(MOST_ROWS)}
    images = [Image.open(grids[i]).convert("RGB") for i in sorted(spread)]
    width, height = images[-1].size
    images = [image for image in images if image.size == (width, height)]
    top = height // 2 if originals else 0
    row = height - top
    canvas = Image.new("RGB", (width, top + row * len(images)), "white")
    canvas.paste(images[-1].crop((0, 0, width, top)), (0, 0))
    for number, image in enumerate(images):
        canvas.paste(image.crop((0, top, width, height)), (0, top + number * row))
    canvas.save(folder / PROGRESS)
