"""Stage 1C: quality over passes of the decoder, of a teacher by every solver and spacing, and of its students.

The teacher is a trained tokenizer. Its curves show how far a better solver alone gets; a student learns jumps along the
teacher's paths, is one set of weights for any number of passes, and is measured at each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flowmo
from flowmo.config import Config
from flowmo.evaluate.reconstruction import Evaluators
from flowmo.tokenizer import FlowMo
from reproduce.page import (
    Column,
    Group,
    cell,
    figures_table,
    groups_of,
    judged_by,
    keep_samples,
    markdown_table,
    mean_and_deviation,
    measured_columns,
    subplots,
    versions_line,
    write_page,
)
from reproduce.sampler import Setting, passes_of
from reproduce.study import (
    Place,
    StudyError,
    judged_count,
    measured,
    named_models,
    once,
    read_results,
    train,
    with_settings,
    write_results,
)

TITLE = "few passes: distillation against better solvers (stage 1C)"
GOALS = {1: 10.0, 4: 2.0}
"""By passes: how much worse than the teacher's LPIPS a student may be, in per cent."""


@dataclass(frozen=True)
class Scale:
    """How large the study is.

    Attributes:
        training: settings of stage 1C; what they leave open is the teacher's.
        towards: what jumps' ends should look like, an arm each.
        steps: each with each of the others.
        rhos: of the teacher's sampler, beside its own.
        solvers: of the teacher's sampler, without guidance.
        pictures: held-out ones to judge on.
        cost: what it takes, in words.
    """

    training: tuple[str, ...]
    towards: tuple[str, ...]
    seeds: int
    steps: tuple[int, ...]
    rhos: tuple[float, ...]
    solvers: tuple[str, ...]
    pictures: int
    cost: str


STUDENT = (
    *("model.mean_velocity=true", "model.posttrain_sample=false", "eval.sampling.guidance=1"),
    *("eval.sampling.solver=euler", "eval.sampling.sample_steps=1"),
    *("trainer.tensorboard=false", "trainer.sample_every=0", "trainer.best_metric=", "opt.cooldown=0.4"),
)
SOLVERS = ("midpoint", "heun", "multistep")
SCALES = {
    "smoke": Scale(
        ("data.global_batch_size=4", "trainer.duration=8 images", "trainer.log_every=4 images", "opt.warmup=0"),
        *(("sample",), 1, (1, 2), (1.0,), ("heun",), 4),
        "half a minute on two CPU cores; its figures mean nothing",
    ),
    "cpu": Scale(
        (
            *("data.global_batch_size=16", "trainer.duration=9600 images", "trainer.log_every=800 images"),
            *("trainer.checkpoint_every=3200 images", "opt.warmup=800 images", "opt.lr=5e-4", "model.ema_decay=0.99"),
            *("opt.lpips_mode=alex", "opt.lpips_weight=0.1", "data.num_workers=1"),
        ),
        *(("sample", "picture"), 1, (1, 2, 4, 8), (1.0,), SOLVERS, 100),
        "an hour a model of 5 M parameters on one CPU core",
    ),
    "gpu": Scale(
        (
            *("data.global_batch_size=64", "trainer.duration=400k images", "trainer.log_every=6400 images"),
            *("trainer.checkpoint_every=64k images", "opt.warmup=6400 images", "opt.lr=3e-4", "trainer.compile=true"),
        ),
        *(("sample", "picture"), 1, (1, 2, 4, 8, 25), (1.0, 8.0), SOLVERS, 1000),
        "about 25 minutes a model of 80 M parameters on one H100, by arithmetic",
    ),
    "paper": Scale(
        (
            *("data.global_batch_size=128", "trainer.duration=20 epochs", "opt.lr=1e-4", "trainer.compile=true"),
            "opt.lpips_mode=vgg",
        ),
        *(("sample", "picture"), 1, (1, 2, 4, 8, 25), (1.0, 8.0), SOLVERS, 50_000),
        "a student of FlowMo-Lo's size a week on 8 H100 at 40 % of their peak, by arithmetic",
    ),
}


def run(place: Place, judges: Evaluators) -> None:
    """Measure the teacher, distil it, measure its students; what is already there is not made again."""
    scale = SCALES[place.scale]
    rows: list[dict[str, Any]] = []
    for source, (name, teacher) in zip(place.models, named_models(place), strict=True):
        if teacher.config.model.mean_velocity:
            place.report(f"{name} is a student itself, and is left out")
            continue
        for row in study_teacher(source, name, teacher, scale, place, judges):
            rows.append(row)
            facts = {"pictures": judged_count(place, scale.pictures), "models": list(place.models)}
            write_results(place, {**facts, "training": list(scale.training), "judges": judges.describe()}, rows)
    if not rows:
        raise StudyError("every model is a student itself; name a teacher with --models")
    if place.world.main:
        draw(place)


def study_teacher(
    source: str, name: str, teacher: FlowMo, scale: Scale, place: Place, judges: Evaluators
) -> Iterator[dict[str, Any]]:
    """The teacher's rows, then its students'."""

    def measure(run: str, curve: str, tokenizer: FlowMo, setting: Setting, **facts: Any) -> dict[str, Any]:
        passes = passes_of(tokenizer.config, setting)
        arm = f"{name}-{curve}-{setting.guidance:g}-{setting.steps}"  # no seed: figures are averaged over it
        about = {"model": name, "curve": curve, "arm": arm, "passes": passes, **facts}

        def make() -> dict[str, Any]:
            sampled = with_settings(tokenizer, *setting.settings)
            keep_samples(sampled, f"{run}-{setting.steps}", place)
            return {**about, **measured(sampled, place, judges, scale.pictures)}

        return once(f"{run}-{setting.steps}", place, make)

    for curve, setting in teachers_settings(teacher.config, scale):
        run = f"{name}-{setting.solver}-rho{setting.rho:g}-g{setting.guidance:g}"
        yield measure(run, curve, teacher, setting, kind="teacher", own=is_own(teacher.config, setting))
    for seed in range(1, scale.seeds + 1):
        for towards in scale.towards:
            student = train_student(source, towards, seed, name, teacher.config, scale, place)
            for steps in scale.steps:
                setting = Setting("solver", steps, teacher.config.eval.sampling.rho, 1.0)
                run, curve = f"{name}-{towards}-seed{seed}", f"student towards the {towards}"
                yield measure(run, curve, student, setting, kind="student", seed=seed)


def teachers_settings(config: Config, scale: Scale) -> Iterator[tuple[str, Setting]]:
    """Ways to sample the teacher, and the curve that each is a point of; its own among them."""
    own = config.eval.sampling
    steps = sorted({*scale.steps, own.sample_steps})
    if own.solver != "euler":  # its own setting, which students are held against, is on no curve below
        yield f"teacher, {own.solver}", Setting("shift", own.sample_steps, own.rho, own.guidance, own.solver)
    for count in steps:
        yield "teacher, Euler", Setting("shift", count, own.rho, own.guidance)
    for rho in scale.rhos:
        if rho != own.rho:
            for count in steps[1:]:  # one step is the same at every spacing
                yield f"teacher, ρ = {rho:g}", Setting("shift", count, rho, own.guidance)
    for solver in scale.solvers:
        for count in steps:
            if (solver, count, 1.0) == (own.solver, own.sample_steps, own.guidance):
                continue
            yield f"teacher, {solver}", Setting("solver", count, own.rho, 1.0, solver)


def is_own(config: Config, setting: Setting) -> bool:
    own = config.eval.sampling
    return (setting.steps, setting.rho, setting.guidance, setting.solver) == (
        *(own.sample_steps, own.rho, own.guidance, own.solver),
    )


def train_student(
    source: str, towards: str, seed: int, name: str, config: Config, scale: Scale, place: Place
) -> FlowMo:
    own = config.eval.sampling.sample_steps
    settings = (f"opt.teacher={source}", f"opt.distill_towards={towards}", f"trainer.seed={seed}")
    steps = f"opt.teacher_steps={own if own > 1 else max(scale.steps)}"
    student = config.override(*STUDENT, *scale.training, *settings, steps)
    trained = train(student, f"{name}-{towards}-training{seed}", place)
    return flowmo.load(trained.checkpoint, device=str(place.world.device))


def draw(place: Place) -> None:
    """The table and the plot of the results in ``place.out``."""
    results = read_results(place)
    groups = groups_of(results["rows"])
    columns = measured_columns(results["rows"])
    plot(groups, columns, place)
    first = {
        "model": lambda group: group[0]["model"],
        "": lambda group: group[0]["curve"] + (" (its own)" if group[0].get("own") else ""),
        "passes": lambda group: str(group[0]["passes"]),
    }
    models = " ".join(results["models"])
    text = f"""# Study: {TITLE}, at scale `{place.scale}`

    python -m reproduce {place.name} --scale {place.scale} --data PICTURES --held-out HELD_OUT --models {models}

Figures on {results["pictures"]} pictures that nothing was trained on; passes: of the decoder, a picture, those for
guidance included. Students: {", ".join(f"`{word}`" for word in results["training"])}; one student is measured at every
number of passes. {judged_by(results)}

{figures_table(groups, columns, first=first)}
{verdict(groups, columns)}
![figures over passes]({place.stem}.png)

{results["machine"]}, {versions_line(results)}
"""
    write_page(place, text)


def verdict(groups: Sequence[Group], columns: Sequence[Column]) -> str:
    """Students, and their teacher in as few passes, against the teacher at its own setting and the goals."""
    lines = []
    for model in {group[0]["model"]: None for group in groups}:
        mine = [group for group in groups if group[0]["model"] == model]
        own = next(group for group in mine if group[0].get("own"))
        for group in mine:
            if group is not own and (group[0]["kind"] == "student" or group[0]["passes"] in GOALS):
                lines.append([model, group[0]["curve"], str(group[0]["passes"]), *changes(group, own, columns)])
    if not lines:
        return ""
    header = ["model", "", "passes", *(f"{column.name}, change" for column in columns), "LPIPS goal"]
    return f"Against the teacher at its own setting:\n\n{markdown_table(header, lines)}"


def changes(group: Group, own: Group, columns: Sequence[Column]) -> list[str]:
    """By how much each figure of ``group`` differs, LPIPS in per cent, and whether LPIPS meets the goal."""
    told, goal = [], GOALS.get(group[0]["passes"])
    met = "–"
    for column in columns:
        ours, theirs = mean_and_deviation(column.values(group)), mean_and_deviation(column.values(own))
        if ours is None or theirs is None:
            told.append(cell([None], 0))
        elif column.key.startswith("lpips"):
            worse = 100 * (ours[0] / theirs[0] - 1)
            told.append(f"{worse:+.1f} %")
            if goal is not None and column.key == "lpips_alex":
                met = f"{'met' if worse <= goal else 'missed'}: at most +{goal:g} %"
        else:
            told.append(f"{ours[0] - theirs[0]:+.{column.places}f}")
    return [*told, met]


def plot(groups: Sequence[Group], columns: Sequence[Column], place: Place) -> None:
    """A row of plots a model, one a figure; every curve over passes."""
    models = list({group[0]["model"]: None for group in groups})
    figure, axes = subplots(len(models), len(columns), (2.9 * len(columns) + 1, 3.2 * len(models) + 0.8))
    for line, model in zip(axes, models, strict=True):
        for axis, column in zip(line, columns, strict=True):
            for curve in groups_of((row for group in groups for row in group if row["model"] == model), "curve"):
                by_passes = groups_of(sorted(curve, key=lambda row: row["passes"]), "passes")
                means = [mean_and_deviation(column.values(group)) for group in by_passes]
                points = [(g[0]["passes"], found[0]) for g, found in zip(by_passes, means, strict=True) if found]
                student = curve[0]["kind"] == "student"
                style = {"linewidth": 2.2, "marker": "o"} if student else {"linewidth": 1, "marker": "."}
                if points:
                    axis.plot(*zip(*points, strict=True), label=curve[0]["curve"], **style)
            axis.set_xscale("log", base=2)
            axis.set_title(f"{model}: {column.heading}" if len(models) > 1 else column.heading, fontsize=9)
            axis.set_xlabel("passes of the decoder", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(place.out / f"{place.stem}.png", dpi=110)
