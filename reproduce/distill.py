"""Few passes: distillation against better solvers (stage 1C).

Beyond the paper. The teacher is a trained tokenizer; its curves show how far a better solver or spacing gets. A student
learns jumps along the teacher's paths. One student serves any number of decoder passes and is measured at each.

Cost: smoke half a minute. cpu an hour per model of 5 M parameters on one core. gpu 25 minutes per model of 80 M
parameters on one H100, by arithmetic. paper a week per student of FlowMo-Lo's size on 8 H100, by arithmetic at 40 % of
their peak.
Expect: at scale cpu, one pass of a student has the teacher's Fréchet distance of ten passes, which no solver reaches in
four.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowmo.config import Config, SamplingConfig
from flowmo.model.sampler import network_passes
from flowmo.tokenizer import FlowMo
from reproduce import page
from reproduce.page import Column, Group
from reproduce.runner import Results, Row, Rows, Scale, Study
from reproduce.sampler import SOLVERS, resampled

TAKES_MODELS = True
GOALS = {1: 10.0, 4: 2.0}
"""Passes to the most that a student's LPIPS may exceed the teacher's, in per cent."""
STUDENT = (
    *("model.mean_velocity=true", "model.posttrain_sample=false", "eval.sampling.guidance=1"),
    *("eval.sampling.solver=euler", "eval.sampling.sample_steps=1"),
    *("trainer.tensorboard=false", "trainer.sample_every=0", "trainer.best_metric=", "opt.cooldown=0.4"),
)
SMOKE = (
    *("data.global_batch_size=4", "data.num_workers=0", "trainer.duration=8 images", "trainer.log_every=4 images"),
    "opt.warmup=0",
)
CPU = (
    *("data.global_batch_size=16", "trainer.duration=9600 images", "trainer.log_every=800 images"),
    *("trainer.checkpoint_every=3200 images", "opt.warmup=800 images", "opt.lr=5e-4", "model.ema_decay=0.99"),
    *("opt.lpips_mode=alex", "opt.lpips_weight=0.1", "data.num_workers=1"),
)
GPU = (
    *("data.global_batch_size=64", "trainer.duration=400k images", "trainer.log_every=6400 images"),
    *("trainer.checkpoint_every=64k images", "opt.warmup=6400 images", "opt.lr=3e-4", "trainer.compile=true"),
    *("opt.lpips_mode=alex", "opt.lpips_weight=0.1", "model.ema_decay=0.998"),
)
PAPER = (
    *("data.global_batch_size=128", "trainer.duration=20 epochs", "opt.lr=1e-4", "trainer.compile=true"),
    *("opt.lpips_mode=vgg", "opt.lpips_weight=0.1", "model.ema_decay=0.9999"),
)
TARGETS = ("sample", "image")
"""Values of ``opt.distill_towards``, a student each."""
LARGE = {"targets": TARGETS, "steps": (1, 2, 4, 8, 25), "rhos": (1.0, 8.0), "solvers": SOLVERS[1:]}
SCALES = {
    "smoke": Scale(training=SMOKE, targets=TARGETS[:1], steps=(1, 2), rhos=(1.0,), solvers=("heun",), images=4),
    "cpu": Scale(training=CPU, targets=TARGETS, steps=(1, 2, 4, 8), rhos=(1.0,), solvers=SOLVERS[1:], images=100),
    "gpu": Scale(training=GPU, **LARGE, images=1000),
    "paper": Scale(training=PAPER, **LARGE, images=50_000),
}


def rows(study: Study, metadata: Row) -> Rows:
    scale = SCALES[study.scale]
    metadata |= {"models": list(study.models), "training": list(scale.training)}

    def measure(run: str, curve: str, tokenizer: FlowMo, sampling: SamplingConfig, **about: Any) -> Row:
        run = f"{run}-{sampling.sample_steps}"
        # without the seed: rows are averaged over it
        arm = f"{name}-{curve}-{sampling.guidance:g}-{sampling.sample_steps}"
        about = {"model": name, "curve": curve, "arm": arm, "passes": network_passes(sampling), **about}

        def make() -> Row:
            sampled = resampled(tokenizer, sampling)
            study.keep_samples(run, sampled)
            return {**about, **study.measure(sampled, scale.images)}

        return study.once(run, make)

    for source, name, teacher in study.load_models(distilled=False):
        config = teacher.config
        own = config.eval.sampling
        for curve, sampling in teacher_settings(own, scale):
            run = f"{name}-{sampling.solver}-rho{sampling.rho:g}-g{sampling.guidance:g}"
            yield measure(run, curve, teacher, sampling, kind="teacher", own=sampling == own)
        for seed in range(1, scale.seeds + 1):
            for target in scale.targets:
                student = train_student(source, target, seed, name, config, study)
                for steps in scale.steps:
                    sampling = replace(own, solver="euler", sample_steps=steps, guidance=1.0)
                    run, curve = f"{name}-{target}-seed{seed}", f"student towards the {target}"
                    yield measure(run, curve, student, sampling, kind="student", seed=seed)


def teacher_settings(own: SamplingConfig, scale: Scale) -> Iterator[tuple[str, SamplingConfig]]:
    """Yield (curve, setting) for the teacher. Its own setting is among them, once."""
    steps = sorted({*scale.steps, own.sample_steps})
    euler = replace(own, solver="euler")
    if own.solver != "euler":  # on no curve below
        yield f"teacher, {own.solver}", own
    for count in steps:
        yield "teacher, Euler", replace(euler, sample_steps=count)
    for rho in scale.rhos:
        for count in steps[1:] if rho != own.rho else ():  # one step is the same at every spacing
            yield f"teacher, ρ = {rho:g}", replace(euler, sample_steps=count, rho=rho)
    for solver in scale.solvers:
        for count in steps:
            sampling = replace(own, solver=solver, sample_steps=count, guidance=1.0)
            if sampling != own:
                yield f"teacher, {solver}", sampling


def train_student(source: str, target: str, seed: int, name: str, config: Config, study: Study) -> FlowMo:
    scale, own = SCALES[study.scale], config.eval.sampling.sample_steps
    settings = (f"opt.teacher={source}", f"opt.distill_towards={target}", f"trainer.seed={seed}")
    steps = f"opt.teacher_steps={own if own > 1 else max(scale.steps)}"
    student = config.override(*STUDENT, *scale.training, *settings, steps)
    return study.load(study.train(student, f"{name}-{target}-training{seed}").checkpoint)


def body(results: Results, plot: Path) -> str:
    groups, columns = page.groups_of(results["rows"]), page.measured(results["rows"])
    panels = [
        page.panel(column, rows, "passes", f"decoder passes, {rows[0]['model']}", 2)
        for rows in page.groups_of(results["rows"], "model")
        for column in columns
    ]
    page.line_plots(panels, 3, plot)
    curve = {"": lambda group: group[0]["curve"] + (" (its own)" if group[0].get("own") else "")}
    return f"""\
Metrics on {results["pictures"]} held-out images. passes: of the decoder, per image, including those for guidance.
Students: {", ".join(f"`{word}`" for word in results["training"])}; one student is measured at every number of passes.
{page.feature_note(results)}

{page.table(groups, columns, first={"model": "model", **curve, "passes": "passes"})}
{verdict(groups, columns)}"""


def verdict(groups: Sequence[Group], columns: Sequence[Column]) -> str:
    """Compare students, and the teacher in as few passes, with the teacher at its own setting and with the goals."""
    lines = []
    own = {group[0]["model"]: group for group in groups if group[0].get("own")}
    known = [group for group in groups if group[0]["model"] in own]
    for group in sorted(known, key=lambda group: list(own).index(group[0]["model"])):
        row = group[0]
        if not row.get("own") and (row["kind"] == "student" or row["passes"] in GOALS):
            lines.append([row["model"], row["curve"], str(row["passes"]), *changes(group, own[row["model"]], columns)])
    header = ["model", "", "passes", *(f"{column.name}, change" for column in columns), "LPIPS goal"]
    return f"Against the teacher at its own setting:\n\n{page.markdown_table(header, lines)}" if lines else ""


def changes(group: Group, own: Group, columns: Sequence[Column]) -> list[str]:
    """Cells with the change of each metric (LPIPS in per cent), and whether LPIPS meets the goal."""
    cells, goal, met = [], GOALS.get(group[0]["passes"]), "–"
    for column in columns:
        ours, theirs = column.mean(group), column.mean(own)
        if ours is None or theirs is None:
            cells.append("–")
        elif column.key.startswith("lpips"):
            worse = 100 * (ours / theirs - 1)
            cells.append(f"{worse:+.1f} %")
            if goal is not None and column.key == "lpips_alex":
                met = f"{'met' if worse <= goal else 'missed'}: at most +{goal:g} %"
        else:
            cells.append(f"{ours - theirs:+.{column.digits}f}")
    return [*cells, met]
