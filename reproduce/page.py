"""Pages of studies: Markdown tables, comparisons over seeds, and plots."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flowmo.images import read_image
from reproduce import StudyError

Row = Mapping[str, Any]
Group = Sequence[Row]
"""Rows that differ only in their seed."""
Cells = Mapping[str, str | Callable[[Group], str]]
"""Text columns of a table: heading to a key of the rows, or to a function of the group."""


class Column(NamedTuple):
    """A metric of a table. ``heading`` ends with the direction of better values, ↑ or ↓; ``factor`` scales values."""

    key: str
    heading: str
    digits: int
    factor: float = 1

    @property
    def name(self) -> str:
        return self.heading[:-2]

    @property
    def sign(self) -> int:
        """1 if higher is better, else −1."""
        return 1 if self.heading.endswith("↑") else -1

    def values(self, group: Group) -> list[float | None]:
        return [None if row.get(self.key) is None else row[self.key] * self.factor for row in group]

    def mean(self, group: Group) -> float | None:
        found = mean_and_deviation(self.values(group))
        return found and found[0]


METRICS = (
    Column("psnr", "PSNR (dB) ↑", 2),
    Column("ssim", "SSIM ↑", 4),
    Column("lpips_alex", "LPIPS AlexNet ↓", 4),
    Column("lpips_vgg", "LPIPS VGG ↓", 4),
    Column("frechet_distance", "Fréchet distance ↓", 2),
    Column("kernel_distance", "kernel distance × 1000 ↓", 2, 1000),
)


def measured(rows: Sequence[Row], columns: Sequence[Column] = METRICS) -> list[Column]:
    """The columns whose evaluators were available."""
    return [column for column in columns if rows[0].get(column.key) is not None]


def groups_of(rows: Iterable[Row], *keys: str) -> list[list[Row]]:
    """Group rows by ``keys``, by default by ``arm``, in the order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys or ("arm",)), []).append(row)
    return list(groups.values())


# Tables


def mean_and_deviation(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Mean and unbiased standard deviation (0 for a single value), or ``None`` if a value is missing."""
    values = list(values)
    known = [value for value in values if value is not None]
    if not values or len(known) < len(values):
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def cell(values: Sequence[float | None], digits: int) -> str:
    """Format as ``mean ± deviation``."""
    found = mean_and_deviation(values)
    if found is None:
        return "–"
    mean = f"{round(found[0], digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.0"
    return f"{mean} ± {found[1]:.{digits}f}" if len(values) > 1 else mean


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


LABEL_AND_SEEDS: Cells = {"": "label", "seeds": lambda group: str(len(group))}
SECONDS: Cells = {"s": lambda group: f"{statistics.median(row['seconds'] for row in group):.0f}"}


def table(
    groups: Sequence[Group], columns: Sequence[Column], first: Cells = LABEL_AND_SEEDS, last: Cells | None = None
) -> str:
    """One line per group: the cells ``first``, the metrics, the cells ``last``."""
    last = last or {}

    def text(cells: Cells, group: Group) -> list[str]:
        return [str(group[0][get]) if isinstance(get, str) else get(group) for get in cells.values()]

    header = [*first, *(column.heading for column in columns), *last]
    lines = (
        [*text(first, group), *(cell(column.values(group), column.digits) for column in columns), *text(last, group)]
        for group in groups
    )
    return markdown_table(header, lines)


# Comparisons


class Gain(NamedTuple):
    """How much one group is better than another, in a column's units, and the spread of that over seeds.

    A group of one seed has no spread, so neither has its gain.
    """

    better: float
    spread: float | None

    @property
    def direction(self) -> int:
        """1 or −1 if the difference is more than two spreads, else 0."""
        return 0 if self.spread is None or abs(self.better) <= 2 * self.spread else 1 if self.better > 0 else -1

    def spread_in_words(self, digits: int) -> str:
        return "one seed" if self.spread is None else f"spread {self.spread:.{digits}f}"


def gain(ours: Group, other: Group, column: Column, paired: bool = False) -> Gain | None:
    """Compare two groups; ``None`` if a metric is missing.

    Args:
        paired: the rows of one seed share their weights or start from the same ones, and both groups have the seeds
            in the same order. The spread is then that of the differences, in which the effect of the shared training
            cancels.
    """
    values, others = column.values(ours), column.values(other)
    single = min(len(values), len(others)) < 2
    if paired:
        if len(values) != len(others):  # unfinished study
            return None
        pairs = zip(values, others, strict=True)
        found = mean_and_deviation(None if a is None or b is None else column.sign * (a - b) for a, b in pairs)
        return found and Gain(found[0], None if single else found[1])
    found, theirs = mean_and_deviation(values), mean_and_deviation(others)
    if found is None or theirs is None:
        return None
    spread = None if single else math.hypot(found[1], theirs[1])
    return Gain(column.sign * (found[0] - theirs[0]), spread)


def relation(change: Gain, other: str, column: Column) -> str:
    """Words for a change against ``other``: better, worse, or within two spreads. Of one seed: ahead or behind."""
    verb, joint = {
        1: ("is better than", ", by"),
        -1: ("is worse than", ", by"),
        0: ("is within two spreads of", ": difference"),
    }[change.direction]
    if change.spread is None:
        verb, joint = "is ahead of" if change.better > 0 else "is behind", ", by"
    words = change.spread_in_words(column.digits)
    return f"{verb} {other}{joint} {abs(change.better):.{column.digits}f} ({words})"


def comparison(
    ours: Group, other: Group, columns: Sequence[Column], names: tuple[str, str] | None = None, paired: bool = False
) -> str:
    """A list item per metric that says which of two groups is better.

    Args:
        names: names of the groups; by default their labels.
        paired: see ``gain``.
    """
    name, other_name = names or (ours[0]["label"], other[0]["label"])
    changes = {column: change for column in columns if (change := gain(ours, other, column, paired))}
    return "".join(f"- {c.name}: {name} {relation(change, other_name, c)}.\n" for c, change in changes.items())


def against_paper(
    groups: Sequence[Group], published: Mapping[str, Mapping[str, float]], same_weights: Collection[str] = ()
) -> str:
    """Table of changes against the first group: the paper's, ours, and whether the direction holds.

    One seed shows no spread, and a difference of 0 in the paper no direction.

    Args:
        published: the paper's metrics, by ``arm`` and column key. It holds the first group's arm.
        same_weights: arms that measure the first group's trainings.
    """
    base, lines = groups[0], []
    origin = published[base[0]["arm"]]
    for group in groups[1:]:
        arm = group[0]["arm"]
        for column in METRICS:
            change = gain(group, base, column, arm in same_weights)
            if column.key not in published.get(arm, {}) or change is None:
                continue
            theirs = (published[arm][column.key] - origin[column.key]) * column.sign + 0.0  # + 0.0: no "-0"
            holds = change.direction == (theirs > 0) - (theirs < 0)
            word = "holds" if holds else "does not hold" if change.direction else "within the spread"
            if not theirs or change.spread is None:
                word = "–"
            ours = f"{change.better:+.{column.digits}f} ({change.spread_in_words(column.digits)})"
            lines.append([group[0]["label"], column.name, f"{theirs:+.3g}", ours, word])
    return markdown_table(["", "metric", "paper: better by", "here: better by", "direction"], lines)


def feature_note(results: Mapping[str, Any]) -> str:
    """The sentences on feature distances."""
    network = next((row["feature_network"] for row in results["rows"] if row.get("feature_network")), "not measured")
    return (
        f"Fréchet and kernel distance: {network}. The Fréchet distance of {results['pictures']} images is biased: "
        "compare it within this table only."
    )


# Plots


def subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A matplotlib figure and its axes (rows × columns). Raises ``StudyError`` if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise StudyError("Plots need matplotlib. Run: pip install 'flowmo[studies]'.") from None
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def dot_plots(blocks: Sequence[Sequence[Group]], columns: Sequence[Column], path: Path) -> None:
    """Plot one dot per group for each column, with its deviation. A line marks the mean of each block's first group."""
    groups = [group for block in blocks for group in block]
    ends = list(itertools.accumulate(map(len, blocks), initial=0))
    across = min(len(columns), 4)
    down = math.ceil(len(columns) / across)
    figure, axes = subplots(down, across, (2.4 * across + 1.5, (0.3 * len(groups) + 0.9) * down))
    positions = range(len(groups), 0, -1)
    for axis in axes.flat[len(columns) :]:
        axis.axis("off")
    for i, (axis, column) in enumerate(zip(axes.flat, columns, strict=False)):
        found = [mean_and_deviation(column.values(group)) or (math.nan, 0.0) for group in groups]
        means, deviations = zip(*found, strict=True)
        axis.errorbar(means, positions, xerr=deviations, fmt="o", markersize=5, capsize=2)
        for first, end in itertools.pairwise(ends):
            height = positions[end - 1] - 0.5, positions[first] + 0.5
            axis.vlines(means[first], *height, color="black", linewidth=0.8, linestyle="--")
        axis.set_yticks(list(positions), [group[0]["label"] if i % across == 0 else "" for group in groups])
        axis.set_ylim(0.5, len(groups) + 0.5)
        if min(means) == max(means):
            axis.set_xlim(means[0] - 1, means[0] + 1)  # matplotlib's own limits would be 1e-16 apart
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
        axis.set_title(column.heading, fontsize=9)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)


@dataclass
class Panel:
    """One plot: curves of points (x, y, deviation) and horizontal levels (y, deviation), by label.

    Attributes:
        log: base of a logarithmic x axis.
        notes: points are (x, y, number) instead, and the number is written beside each.
        paired: each two curves have one colour; the first is dashed.
    """

    title: str
    xlabel: str
    curves: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    levels: dict[str, tuple[float, float]] = field(default_factory=dict)
    log: int = 0
    notes: bool = False
    paired: bool = False


def panel(column: Column, rows: Iterable[Row], x: str, xlabel: str = "", log: int = 0) -> Panel:
    """Plot a metric over the key ``x``, one curve per value of the key ``curve``. Rows without ``x`` are levels."""
    result = Panel(column.heading, xlabel or x, log=log)
    for curve in groups_of(rows, "curve"):
        for group in groups_of(({x: None, **row} for row in curve), x):
            found, label = mean_and_deviation(column.values(group)), curve[0]["curve"]
            if found and group[0][x]:
                result.curves.setdefault(label, []).append((group[0][x], *found))
            elif found:
                result.levels[label] = found
    return result


MOST_TICKS = 6
"""Of a logarithmic axis: up to so many values are its ticks."""


def line_plots(panels: Sequence[Panel], columns: int, path: Path) -> None:
    """Plot panels in a grid. A label has one colour and marker in all panels and one entry in the legend."""
    count = math.ceil(len(panels) / columns)
    width = max(4 * columns, 6)
    labels = dict.fromkeys(label for panel in panels for label in (*panel.levels, *panel.curves))
    # points and inches of a letter in the legend; a line and its margins take half an inch
    size, letter = (8, 0.07) if len(labels) <= 10 else (7, 0.05)
    fitting = min(max(int(width / (letter * max(map(len, labels), default=1) + 0.5)), 1), 4)
    lines = math.ceil(len(labels) / fitting)
    figure, axes = subplots(count, columns, (width, 2.8 * count + 0.4 + 0.2 * lines))
    paired, handles = any(panel.paired for panel in panels), {}
    from matplotlib import color_sequences  # after subplots, which says how to install it

    shades = color_sequences["tab20"]  # each of ten colours, dark and light
    shades = [*shades[::2], *shades[1::2]]
    colours = {label: shades[(i // 2 if paired else i) % len(shades)] for i, label in enumerate(labels)}
    markers = {label: "os^"[i // 10 % 3] for i, label in enumerate(labels)}
    styles = {label: "--" if paired and i % 2 == 0 else "-" for i, label in enumerate(labels)}
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        for label, (level, deviation) in panel.levels.items():
            handles[label] = axis.axhline(level, color=colours[label], linestyle="--")
            axis.axhspan(level - deviation, level + deviation, color=colours[label], alpha=0.15, linewidth=0)
        for label, points in panel.curves.items():
            x, y, third = zip(*sorted(points), strict=True)
            errors = [value or math.nan for value in third] if any(third) and not panel.notes else None
            style = {"color": colours[label], "marker": markers[label], "linestyle": styles[label]}
            handles[label] = axis.errorbar(x, y, errors, **style, markersize=4, capsize=3)
            for point in points if panel.notes else ():
                axis.annotate(f"{point[2]:g}", point[:2], fontsize=7, xytext=(3, 3), textcoords="offset points")
        if panel.log:
            axis.set_xscale("log", base=panel.log)
            measured = sorted({point[0] for points in panel.curves.values() for point in points})
            axis.xaxis.set_major_formatter("{x:g}")
            if len(measured) <= MOST_TICKS:
                axis.set_xticks(measured, [f"{x:.3g}" for x in measured])
                axis.minorticks_off()
        axis.set_xlabel(panel.xlabel)
        axis.set_title(panel.title, fontsize=10)
        axis.grid(alpha=0.3)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=fitting, fontsize=size)
    figure.savefig(path, dpi=110)


def image_strips(strips: Mapping[str, Path], path: Path) -> None:
    """Show image files below each other, each under its label."""
    figure, axes = subplots(len(strips), 1, (8, 1.25 * len(strips)))
    for axis, (label, strip) in zip(axes.flat, strips.items(), strict=True):
        axis.imshow(read_image(strip))
        axis.set_title(label, fontsize=8, loc="left", pad=2)
        axis.axis("off")
    figure.savefig(path, dpi=85)
