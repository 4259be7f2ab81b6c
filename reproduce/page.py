"""Tables, plots and pictures of what a study measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from flowmo.checkpoint.files import write_content
from flowmo.data import evenly_spread, open_source
from flowmo.evaluate.metrics.pairs import grid
from flowmo.evaluate.reconstruction import read_crops
from flowmo.images import read_image, to_pil
from flowmo.tokenizer import FlowMo
from reproduce.study import Place, StudyError

PICTURES_SHOWN = 6

Row = Mapping[str, Any]
Group = Sequence[Row]
"""Rows that differ by their seed alone."""


class Column(NamedTuple):
    """A figure of a table: its key in a row, its heading, which ends in the better direction, decimal places, and the
    factor it is shown with."""

    key: str
    heading: str
    places: int
    factor: float = 1

    @property
    def name(self) -> str:
        return self.heading[:-2]

    @property
    def rising(self) -> bool:
        """Whether more is better."""
        return self.heading.endswith("↑")

    def values(self, group: Group) -> list[float | None]:
        return [None if row.get(self.key) is None else row[self.key] * self.factor for row in group]


COLUMNS = (
    Column("psnr", "PSNR (dB) ↑", 2),
    Column("ssim", "SSIM ↑", 4),
    Column("lpips_alex", "LPIPS AlexNet ↓", 4),
    Column("lpips_vgg", "LPIPS VGG ↓", 4),
    Column("frechet_distance", "Fréchet distance ↓", 2),
    Column("kernel_distance", "kernel distance × 1000 ↓", 2, 1000),
)


def measured_columns(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> list[Column]:
    """Those whose judges were at hand."""
    return [column for column in columns if rows[0].get(column.key) is not None]


def groups_of(rows: Iterable[Row], key: str = "arm") -> list[list[Row]]:
    """Rows by ``key``, in the order in which its values come first."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return list(groups.values())


# Tables


def mean_and_deviation(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Mean and unbiased standard deviation over seeds, 0 of a single one; ``None`` where a value is missing."""
    values = list(values)
    known = [value for value in values if value is not None]
    if not values or len(known) < len(values):
        return None
    mean = math.fsum(known) / len(known)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1)) if len(known) > 1 else 0.0
    return mean, deviation


def cell(values: Iterable[float | None], places: int) -> str:
    """``mean ± deviation`` for a table."""
    values = list(values)
    found = mean_and_deviation(values)
    if found is None:
        return "–"
    mean, deviation = found
    mean = round(mean, places) + 0.0  # no "-0.0"
    return f"{mean:.{places}f} ± {deviation:.{places}f}" if len(values) > 1 else f"{mean:.{places}f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def figures_table(
    groups: Sequence[Group],
    columns: Sequence[Column],
    first: Mapping[str, Callable[[Group], str]] | None = None,
    last: Mapping[str, Callable[[Group], str]] | None = None,
) -> str:
    """A line a group: what ``first`` tells, by default label and number of seeds, its figures, what ``last`` tells."""
    first = first or {"": lambda group: group[0]["label"], "seeds": lambda group: str(len(group))}
    last = last or {}
    return markdown_table(
        [*first, *(column.heading for column in columns), *last],
        (
            [
                *(tell(group) for tell in first.values()),
                *(cell(column.values(group), column.places) for column in columns),
                *(tell(group) for tell in last.values()),
            ]
            for group in groups
        ),
    )


def gain(ours: Group, other: Group, column: Column, same_weights: bool = False) -> tuple[float, float] | None:
    """By how much ``ours`` is better, in the units shown, and the spread of that over seeds.

    Args:
        same_weights: both are of the same trainings, in the same order: the spread is that of their differences, in
            which what a training's seed does to both cancels.
    """
    sign = 1 if column.rising else -1
    values, others = list(column.values(ours)), list(column.values(other))
    if same_weights:
        if len(values) != len(others):  # a study that is not done
            return None
        pairs = zip(values, others, strict=True)
        return mean_and_deviation(None if a is None or b is None else sign * (a - b) for a, b in pairs)
    found, theirs = mean_and_deviation(values), mean_and_deviation(others)
    if found is None or theirs is None:
        return None
    return sign * (found[0] - theirs[0]), math.hypot(found[1], theirs[1])


def in_words(better: float, spread: float) -> str:
    """Whether a difference is one: it must be more than two spreads."""
    return "better than" if better > 2 * spread else "worse than" if better < -2 * spread else "not apart from"


def against_paper(
    groups: Sequence[Group],
    published: Mapping[str, Mapping[str, float]],
    columns: Sequence[Column] = COLUMNS,
    same_weights: Collection[str] = (),
) -> str:
    """Of each group that the paper has: the paper's figure beside the first group's, ours likewise, and whether the
    change has the same direction.

    Args:
        published: by a row's ``arm``, by a column's key; holds the first group's arm.
        same_weights: arms that are of the first group's trainings.
    """
    base, lines = groups[0], []
    origin = published[base[0]["arm"]]
    for group in groups[1:]:
        paper = published.get(group[0]["arm"], {})
        for column in columns:
            found = gain(group, base, column, group[0]["arm"] in same_weights)
            if column.key not in paper or found is None:
                continue
            theirs = (paper[column.key] - origin[column.key]) * (1 if column.rising else -1)
            better, spread = found
            ours = {"better than": 1, "worse than": -1, "not apart from": 0}[in_words(better, spread)]
            expected = (theirs > 0) - (theirs < 0)
            word = "holds" if ours == expected else "within the spread" if not ours else "does not hold"
            change = f"{better:+.{column.places}f} (spread {spread:.{column.places}f})"
            lines.append([group[0]["label"], column.name, f"{theirs:+.3g}", change, word])
    return markdown_table(["", "figure", "paper: better by", "here: better by", "direction"], lines)


def write_page(place: Place, text: str) -> None:
    write_content(place.out / f"{place.stem}.md", text)


def versions_line(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in results["versions"].items())


def judged_by(results: Mapping[str, Any]) -> str:
    """The sentence about distances of features that every page has."""
    network = next((row["feature_network"] for row in results["rows"] if row.get("feature_network")), "not measured")
    pictures = results["pictures"]
    return (
        f"Fréchet and kernel distance: {network}; of {pictures} pictures the former is biased, so compare it within "
        "this table only."
    )


# Plots


def subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of matplotlib's and its axes, rows × columns.

    Raises:
        StudyError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise StudyError("plots need matplotlib: pip install 'flowmo[studies]'") from None
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def bars(groups: Sequence[Group], columns: Sequence[Column], place: Place) -> None:
    """Every figure as bars, one a group, the first group's level drawn through."""
    figure, axes = subplots(1, len(columns), (2.4 * len(columns) + 1.5, 0.38 * len(groups) + 1.2))
    for i, (axis, column) in enumerate(zip(axes.flat, columns, strict=True)):
        found = [mean_and_deviation(column.values(group)) or (math.nan, 0.0) for group in groups]
        means, deviations = zip(*found, strict=True)
        places = range(len(groups), 0, -1)
        axis.barh(places, means, xerr=deviations, color=["tab:gray", *["tab:blue"] * (len(groups) - 1)], capsize=2)
        axis.axvline(means[0], color="black", linewidth=0.8, linestyle="--")
        axis.set_yticks(list(places), [group[0]["label"] for group in groups] if i == 0 else [""] * len(groups))
        drawn = [mean for mean in means if math.isfinite(mean)]
        width = (max(drawn) - min(drawn)) or 1.0
        axis.set_xlim(min(drawn) - 0.3 * width, max(drawn) + 0.3 * width)
        axis.set_title(column.heading, fontsize=9)
        axis.tick_params(labelsize=8)
    figure.savefig(place.out / f"{place.stem}.png", dpi=110)


# Pictures, beside the runs: not all pictures may be published


def held_out(place: Place, count: int, side: int) -> tuple[list[int], Tensor]:
    """Some held-out pictures, b 3 side side in [−1, 1], and their places in their source."""
    source = open_source(place.held_out)
    indices = evenly_spread(min(count, len(source)), len(source))
    return indices, read_crops(source, indices, side, enlarge=True)


def keep_samples(tokenizer: FlowMo, name: str, place: Place) -> None:
    """Held-out pictures and their reconstructions as two rows of one picture, in the run's folder."""
    indices, x = held_out(place, PICTURES_SHOWN, tokenizer.config.data.image_size)
    y = tokenizer.decode(tokenizer.encode(x), seed=indices).cpu()
    save_images({"originals": x, "samples": y}, name, place)


def save_images(rows: Mapping[str, Tensor], name: str, place: Place) -> None:
    """Pictures b 3 h w in a row, a file each, in a run's folder."""
    if place.world.main:
        place.folder(name).mkdir(parents=True, exist_ok=True)
        for kind, row in rows.items():
            to_pil(grid([row])).save(place.folder(name) / f"{kind}.png")


def show_strips(strips: Sequence[tuple[str, Path]], path: Path) -> None:
    """Kept rows of pictures below each other, each under its label."""
    figure, axes = subplots(len(strips), 1, (8, 1.25 * len(strips)))
    for axis, (label, strip) in zip(axes.flat, strips, strict=True):
        axis.imshow(read_image(strip))
        axis.set_title(label, fontsize=8, loc="left", pad=2)
        axis.axis("off")
    figure.savefig(path, dpi=85)


def show_samples(rows: Sequence[Row], origin: str, place: Place) -> None:
    """The first seed's pictures of every row, below the originals that run ``origin`` kept."""
    first = {row["arm"]: row for row in reversed(rows)}
    strips = [("originals", place.folder(origin) / "originals.png")]
    strips += [(row["label"], place.folder(row["run"]) / "samples.png") for row in reversed(first.values())]
    show_strips(strips, place.folder("pictures.png"))
