"""The sampler (section 3.4, appendix B): steps, shift ρ, guidance and solver, each figure over the decoder's passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flowmo.config import Config
from flowmo.evaluate.reconstruction import Evaluators
from flowmo.model.sampler import evaluations, network_passes, shifted_times
from flowmo.tokenizer import FlowMo
from reproduce.page import (
    Group,
    figures_table,
    groups_of,
    judged_by,
    measured_columns,
    subplots,
    versions_line,
    write_page,
)
from reproduce.study import (
    Place,
    judged_count,
    measured,
    named_models,
    once,
    read_results,
    with_settings,
    write_results,
)

TITLE = "steps, shift, guidance and solver (section 3.4, equation 14)"


@dataclass(frozen=True)
class Scale:
    """How large the study is.

    Attributes:
        steps, rhos: each of these with each of those, at the paper's guidance.
        guidances: at the most steps and the model's own shift.
        solvers: at each of ``steps`` and the model's own shift, without guidance.
        pictures: held-out ones to judge on.
        cost: what it takes, in words.
    """

    steps: tuple[int, ...]
    rhos: tuple[float, ...]
    guidances: tuple[float, ...]
    solvers: tuple[str, ...]
    pictures: int
    cost: str


SOLVERS = ("euler", "midpoint", "heun", "multistep")
SCALES = {
    "smoke": Scale((1, 2), (1.0,), (1.5,), ("heun",), 4, "half a minute on two CPU cores; its figures mean nothing"),
    "cpu": Scale(
        *((1, 2, 4, 8, 16), (1.0, 2.0, 4.0), (1.0, 1.25, 1.5, 2.0), SOLVERS, 200),
        "half an hour a model of 5 M parameters on two CPU cores",
    ),
    "gpu": Scale(
        *((1, 2, 4, 8, 16, 25), (1.0, 2.0, 4.0, 8.0), (1.0, 1.25, 1.5, 2.0, 3.0), SOLVERS, 1000),
        "about 15 minutes a model of 80 M parameters on one H100, by arithmetic",
    ),
    "paper": Scale(
        *((1, 2, 4, 8, 16, 25, 50), (1.0, 2.0, 4.0, 8.0), (1.0, 1.25, 1.5, 2.0, 3.0), SOLVERS, 5000),
        "a day a model of FlowMo-Lo's size on one H100, by arithmetic",
    ),
}


@dataclass(frozen=True)
class Setting:
    """One way to sample; ``part`` is the curve that it is a point of."""

    part: str
    steps: int
    rho: float
    guidance: float
    solver: str = "euler"

    @property
    def name(self) -> str:
        return f"{self.part}-{self.solver}-{self.steps}-rho{self.rho:g}-g{self.guidance:g}"

    @property
    def curve(self) -> str:
        by_part = {"shift": f"ρ = {self.rho:g}", "guidance": "guidance", "solver": self.solver}
        return by_part[self.part]

    @property
    def label(self) -> str:
        return f"{self.solver}, {self.steps} steps, ρ = {self.rho:g}, guidance {self.guidance:g}"

    @property
    def settings(self) -> tuple[str, ...]:
        named = {"sample_steps": self.steps, "rho": self.rho, "guidance": self.guidance, "solver": self.solver}
        return tuple(f"eval.sampling.{name}={value}" for name, value in named.items())


def settings_of(scale: Scale, tokenizer: FlowMo) -> Iterator[Setting]:
    own = tokenizer.config.eval.sampling
    for rho, steps in itertools.product(scale.rhos, scale.steps):
        yield Setting("shift", steps, rho, own.guidance)
    for guidance in scale.guidances:
        yield Setting("guidance", max(scale.steps), own.rho, guidance)
    for solver, steps in itertools.product(scale.solvers, scale.steps):
        yield Setting("solver", steps, own.rho, 1.0, solver)


def run(place: Place, judges: Evaluators) -> None:
    """Measure what is not there; draw."""
    scale = SCALES[place.scale]
    rows: list[dict[str, Any]] = []
    for name, tokenizer in named_models(place):
        if tokenizer.config.model.mean_velocity:
            place.report(f"{name} is distilled: guidance and solver are part of it, and it is left out")
            continue
        for setting in settings_of(scale, tokenizer):
            make = partial(measure_setting, setting, name, tokenizer, place, judges)
            rows.append(once(f"{name}-{setting.name}", place, make))
            write_results(place, {"pictures": judged_count(place, scale.pictures), "judges": judges.describe()}, rows)
    if place.world.main:
        draw(place)


def passes_of(config: Config, setting: Setting) -> int:
    """Passes of the decoder a picture, those for guidance included."""
    own = config.eval.sampling
    times = evaluations(setting.solver, shifted_times(setting.steps, setting.rho))
    return network_passes(times, setting.guidance, own.guidance_low, own.guidance_high)


def measure_setting(
    setting: Setting, model: str, tokenizer: FlowMo, place: Place, judges: Evaluators
) -> dict[str, Any]:
    passes = passes_of(tokenizer.config, setting)
    facts: dict[str, Any] = {"model": model, "part": setting.part, "curve": setting.curve}
    facts |= {"arm": f"{model}-{setting.name}", "label": setting.label, "passes": passes, "guidance": setting.guidance}
    sampled = with_settings(tokenizer, *setting.settings)
    return {**facts, **measured(sampled, place, judges, SCALES[place.scale].pictures)}


def draw(place: Place) -> None:
    """The table and the plot of the results in ``place.out``."""
    results = read_results(place)
    rows = results["rows"]
    plot(groups_of(rows, "model")[0], place)
    first = {
        "model": lambda group: group[0]["model"],
        "sampler": lambda group: group[0]["label"],
        "passes": lambda group: str(group[0]["passes"]),
    }
    text = f"""# Study: {TITLE}, at scale `{place.scale}`

    python -m reproduce {place.name} --scale {place.scale} --data PICTURES --held-out HELD_OUT --models MODEL ...

The same weights, sampled otherwise. Figures on {results["pictures"]} pictures that nothing was trained on; passes: of
the decoder, a picture. {judged_by(results)}

{figures_table(groups_of(rows), measured_columns(rows), first=first)}
![figures over passes, of the first model]({place.stem}.png)

{versions_line(results)}
"""
    write_page(place, text)


def plot(rows: Group, place: Place) -> None:
    """One model: a row of plots a figure; over passes for every shift and every solver, and over guidance."""
    columns = measured_columns(rows)
    parts: Sequence[tuple[str, str]] = (("shift", "passes"), ("guidance", "guidance"), ("solver", "passes"))
    figure, axes = subplots(len(columns), len(parts), (11, 2.6 * len(columns)))
    for line, column in zip(axes, columns, strict=True):
        for axis, (part, over) in zip(line, parts, strict=True):
            for curve in groups_of((row for row in rows if row["part"] == part), "curve"):
                points = sorted((row[over], value) for row, value in zip(curve, column.values(curve), strict=True))
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=curve[0]["curve"])
            axis.set_xlabel(over, fontsize=8)
            axis.set_title(column.heading, fontsize=9)
            axis.tick_params(labelsize=8)
            if over == "passes":
                axis.set_xscale("log")
                axis.legend(fontsize=7)
    figure.savefig(place.out / f"{place.stem}.png", dpi=110)
