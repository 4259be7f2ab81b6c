"""Rate, distortion and perception (appendix C, figure 9): the scale of the noise that samples start from.

Noise scaled below 1 is likelier under N(0, I), and so, but for the flow's Jacobian, are the samples. At several rates,
the distance of features is drawn over PSNR: no scale should be the best of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flowmo
from flowmo.config import Config
from flowmo.evaluate.reconstruction import Evaluators
from flowmo.tokenizer import FlowMo
from reproduce import ablations
from reproduce.page import (
    COLUMNS,
    Column,
    Group,
    figures_table,
    gain,
    groups_of,
    in_words,
    judged_by,
    mean_and_deviation,
    measured_columns,
    subplots,
    versions_line,
    write_page,
)
from reproduce.study import Place, judged_count, measured, named_models, once, read_results, train, write_results

TITLE = "the scale of the start noise (appendix C, figure 9)"


@dataclass(frozen=True)
class Scale:
    """How large the study is.

    Attributes:
        base: the tokenizer of the middle rate, the baseline of ``ablations``; where ``None``, ``--models`` are taken.
        channels: bits a token of the rates.
        scales: of the noise; 1 must be among them.
        pictures: held-out ones to judge on.
        cost: what it takes, in words.
    """

    base: Config | None
    channels: tuple[int, ...]
    seeds: int
    scales: tuple[float, ...]
    pictures: int
    cost: str


def of_ablations(scale: str) -> tuple[Config, tuple[int, ...], int]:
    """A third of the baseline's bits, its own, and twice as many."""
    found = ablations.SCALES[scale]
    bits = found.base.model.context_dim
    return found.base, (bits // 3, bits, 2 * bits), found.seeds


SCALES = {
    "smoke": Scale(*of_ablations("smoke"), (0.8, 1.0), 4, "half a minute on two CPU cores; its figures mean nothing"),
    "cpu": Scale(
        *of_ablations("cpu"),
        *((0.6, 0.8, 1.0, 1.1), 100),
        "half an hour for each seed on one CPU core after ablations, whose baseline it shares",
    ),
    "gpu": Scale(
        *of_ablations("gpu"),
        *((0.6, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1), 1000),
        "about 20 minutes on one H100 by arithmetic after ablations, whose baseline it shares",
    ),
    "paper": Scale(
        *(None, (), 1, (0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05), 5000),
        "3 hours a model of FlowMo-Lo's size on one H100 by arithmetic; give --models of several rates",
    ),
}


def run(place: Place, judges: Evaluators) -> None:
    """Train what is not there, measure and draw."""
    scale = SCALES[place.scale]
    rows: list[dict[str, Any]] = []
    for name, seed, tokenizer in tokenizers(scale, place):
        bits = tokenizer.config.bits_per_pixel
        if bits is None:
            place.report(f"{name} is continuous: it has no rate, and is left out")
            continue
        for noise in scale.scales:
            rate = f"{bits:.4g} bits a pixel"
            facts = {"arm": f"{rate}, {noise:g}", "label": f"{rate}, scale {noise:g}", "seed": seed, "rate": rate}

            def make(tokenizer: FlowMo = tokenizer, facts: dict = facts, noise: float = noise) -> dict[str, Any]:
                figures = measured(tokenizer, place, judges, scale.pictures, noise)
                return {**facts, "noise": noise, **figures}

            rows.append(once(f"{name}-noise{noise:g}", place, make))
            write_results(place, {"pictures": judged_count(place, scale.pictures), "judges": judges.describe()}, rows)
    if place.world.main:
        draw(place)


def tokenizers(scale: Scale, place: Place) -> Iterator[tuple[str, int, FlowMo]]:
    """Name, seed and tokenizer of every rate."""
    if scale.base is None:
        for name, tokenizer in named_models(place):
            yield name, 0, tokenizer
        return
    for seed in range(1, scale.seeds + 1):
        for channels in scale.channels:
            if channels == scale.base.model.context_dim:
                trained = ablations.baseline(scale.base, seed, place)
            else:
                group = f"model.codebook_size_for_entropy={min(channels, 9)}"
                config = scale.base.override(f"model.context_dim={channels}", group, f"trainer.seed={seed}")
                trained = train(config, f"bits{channels}-seed{seed}", place)
            yield f"bits{channels}-seed{seed}", seed, flowmo.load(trained.checkpoint, device=str(place.world.device))


def draw(place: Place) -> None:
    """The table and the plot of the results in ``place.out``."""
    results = read_results(place)
    rows = results["rows"]
    rates = groups_of(rows, "rate")
    columns = measured_columns(rows)
    perception = next((c for c in columns if c.key == "frechet_distance"), COLUMNS[0])
    plot(rates, perception, place)
    text = f"""# Study: {TITLE}, at scale `{place.scale}`

    python -m reproduce {place.name} --scale {place.scale} --data PICTURES --held-out HELD_OUT

The same tokenizers with the noise that samples start from scaled. Means ± standard deviations over seeds of the figures
on {results["pictures"]} pictures that nothing was trained on. {judged_by(results)}

{figures_table(groups_of(rows), columns)}
{verdict(rates, columns)}
![{perception.name} over PSNR, a curve a rate]({place.stem}.png)

{versions_line(results)}
"""
    write_page(place, text)


def verdict(rates: Sequence[Group], columns: list[Column]) -> str:
    """Of every rate: which scale is the best for each figure, and by how much it is better than 1."""
    lines = []
    for rate in rates:
        by_scale = {group[0]["noise"]: group for group in groups_of(rate, "noise")}
        for column in columns:
            known = ((noise, mean_and_deviation(column.values(group))) for noise, group in by_scale.items())
            means = {noise: figures[0] for noise, figures in known if figures is not None}
            best = (max if column.rising else min)(means, key=means.__getitem__, default=1.0)
            found = gain(by_scale[best], by_scale[1.0], column, same_weights=True)
            if found is None:  # a judge was missing
                continue
            better, spread = found
            word = (
                "1 itself" if best == 1.0 else f"{best:g}, {in_words(better, spread)} 1 by {better:.{column.places}f}"
            )
            lines.append(f"- {rate[0]['rate']}, {column.name}: the best scale is {word}.")
    return "\n".join(lines) + "\n"


def plot(rates: Sequence[Group], perception: Column, place: Place) -> None:
    figure, axes = subplots(1, 1, (6, 4))
    axis = axes.flat[0]
    for rate in rates:
        points = []
        for group in sorted(groups_of(rate, "noise"), key=lambda group: group[0]["noise"]):
            psnr, other = (mean_and_deviation(column.values(group)) for column in (COLUMNS[0], perception))
            if psnr is None or other is None:
                continue
            point = (psnr[0], other[0])
            points.append(point)
            axis.annotate(f"{group[0]['noise']:g}", point, fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.plot(*zip(*points, strict=True), marker="o", label=rate[0]["rate"])
    axis.set(xlabel=COLUMNS[0].heading, ylabel=perception.heading)
    axis.legend(fontsize=8)
    figure.savefig(place.out / f"{place.stem}.png", dpi=110)
