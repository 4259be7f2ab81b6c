"""Stage 1B (section 3.3, table 7): is it the sample through the whole chain that makes mode seeking work?

From one stage-1A checkpoint: (a) the perceptual loss on samples through the chain, at several weights; (b) the same
distance on the one-step estimate, at several weights; (c) as many further images of stage 1A. All start from the same
weights, see equally many images at the same learning rate, and are judged on pictures that none was trained on.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flowmo
from flowmo.config import Config, preset
from flowmo.evaluate.reconstruction import Evaluators
from flowmo.losses.perceptual import build_distance
from flowmo.train.ema import decay_per_step
from flowmo.train.state import read_metadata
from reproduce.bases import GPU_BASE, SMALL_BASE, SMOKE_BASE
from reproduce.page import (
    COLUMNS,
    Group,
    figures_table,
    gain,
    groups_of,
    in_words,
    judged_by,
    keep_samples,
    mean_and_deviation,
    measured_columns,
    show_samples,
    subplots,
    versions_line,
    write_page,
)
from reproduce.study import (
    Place,
    forget_checkpoints,
    judged_count,
    measured,
    once,
    read_results,
    train,
    write_results,
)

TITLE = "mode-seeking post-training against its alternatives (section 3.3, table 7)"
DISTANCE = "resnet"
"""In the loss of (a) and (b); the paper's: the logits of a ResNet-50."""


@dataclass(frozen=True)
class Scale:
    """How large the study is.

    Attributes:
        base: stage 1A.
        arms: settings that all arms share.
        images: that each arm sees.
        sample_weights, one_step_weights: of the distance in the loss of (a) and (b).
        pictures: held-out ones to judge on.
        cost: what it takes, in words.
    """

    base: Config
    arms: tuple[str, ...]
    images: int
    sample_weights: tuple[float, ...]
    one_step_weights: tuple[float, ...]
    seeds: int
    pictures: int
    cost: str


SHORT = ("opt.warmup=0", "opt.cooldown=0", "trainer.sample_every=0", "trainer.log_every=256 images")
"""Of all arms: a constant learning rate, as the images are few."""

SCALES = {
    "smoke": Scale(
        SMOKE_BASE,
        (*SHORT, "opt.lr=1e-4", "model.posttrain_sample_k=2", "trainer.log_every=1 step"),
        *(8, (0.01,), (0.01,), 1, 8),
        "half a minute on two CPU cores; its figures mean nothing",
    ),
    "cpu": Scale(
        SMALL_BASE,
        (*SHORT, "opt.lr=1e-4", "model.ema_decay=0.7"),
        *(1024, (0.001, 0.01, 0.1), (0.001, 0.01, 0.1), 3, 500),
        "an hour on two CPU cores for stage 1A and another for the arms",
    ),
    "gpu": Scale(
        GPU_BASE,
        (*SHORT, "opt.lr=1e-4", "model.ema_decay=0.97"),
        *(16384, (0.001, 0.01, 0.1), (0.0001, 0.001, 0.01, 0.1), 3, 1000),
        "about 25 minutes on one H100 by arithmetic, at a fifth of its peak",
    ),
    "paper": Scale(
        preset("small").override("trainer.duration=40 epochs", "data.global_batch_size=128"),
        ("opt.lr=5e-5", "data.global_batch_size=64", "opt.warmup=0", "model.ema_update=release"),
        *(1_281_167, (0.01,), (0.05, 0.01, 0.005, 0.001, 0.00075, 0.0005, 0.00025, 0.0001), 1, 50_000),
        "stage 1A 8 hours on 8 H100 at 40 % of their peak, the sample arm 90 minutes, the others 9 each, by arithmetic",
    ),
}


@dataclass(frozen=True)
class Arm:
    """One way to go on from the base: a run's name, how the table calls it, and the settings it differs by."""

    name: str
    label: str
    kind: str
    weight: float
    settings: tuple[str, ...]


def arms(scale: Scale) -> Iterator[Arm]:
    yield Arm("more", "(c) further stage 1A", "more", 0.0, ())
    frozen = ("opt.freeze_encoder_after=0", f"opt.lpips_mode={DISTANCE}")
    shared = scale.base.override(*scale.arms)
    decay = decay_per_step(shared, shared.data.global_batch_size)  # stage 1B counts it per step: all arms forget alike
    for weight in scale.one_step_weights:
        label, settings = f"(b) one-step estimate, weight {weight:g}", (*frozen, f"opt.lpips_weight={weight:g}")
        yield Arm(f"one-step-{weight:g}", label, "one-step", weight, settings)
    for weight in scale.sample_weights:
        label, settings = f"(a) sample, weight {weight:g}", (*frozen, f"opt.lpips_weight={weight:g}")
        ema = f"model.ema_decay={decay}"
        yield Arm(f"sample-{weight:g}", label, "sample", weight, (*settings, "model.posttrain_sample=true", ema))


def run(place: Place, judges: Evaluators) -> None:
    """Train, measure and draw; what is already there is not made again."""
    scale = SCALES[place.scale]
    base = train(scale.base, "base", place)
    start, distance = read_metadata(base.checkpoint)["images"], build_distance(DISTANCE).name

    def judge(checkpoint: Path, name: str) -> dict[str, Any]:
        tokenizer = flowmo.load(checkpoint, device=str(place.world.device))
        keep_samples(tokenizer, name, place)
        return measured(tokenizer, place, judges, scale.pictures)

    def go_on(arm: Arm, seed: int, name: str) -> dict[str, Any]:
        length = (f"trainer.duration={start + scale.images} images", f"trainer.seed={seed}")
        config = scale.base.override(*scale.arms, *length, *arm.settings)
        trained = train(config, name, place, base.checkpoint)
        facts = {"arm": arm.name, "label": arm.label, "kind": arm.kind, "weight": arm.weight, "seed": seed}
        return {**facts, "seconds": trained.seconds, **judge(trained.checkpoint, name)}

    origin = {"arm": "base", "label": "the stage-1A checkpoint", "kind": "base", "weight": 0.0, "seed": 0}
    rows = [once("base", place, lambda: {**origin, "seconds": base.seconds, **judge(base.checkpoint, "base")})]
    for seed in range(1, scale.seeds + 1):
        for arm in arms(scale):
            name = f"{arm.name}-seed{seed}"
            rows.append(once(name, place, partial(go_on, arm, seed, name)))
            forget_checkpoints(name, place)
            facts = {
                "base_images": start,
                "images": scale.images,
                "pictures": judged_count(place, scale.pictures),
                "distance": distance,
            }
            write_results(place, {**facts, "judges": judges.describe(), "settings": list(scale.arms)}, rows)
    if place.world.main:
        show_samples(rows, "base", place)
        draw(place)


def draw(place: Place) -> None:
    """The table and the plot of the results in ``place.out``."""
    results = read_results(place)
    rows = results["rows"]
    order = {"base": 0, "more": 1, "one-step": 2, "sample": 3}
    groups = sorted(groups_of(rows), key=lambda group: (order[group[0]["kind"]], group[0]["weight"]))
    plot(groups, place)
    seconds = {"s": lambda group: f"{statistics.median(row['seconds'] for row in group):.0f}"}
    table = figures_table(groups, measured_columns(rows), last=seconds)
    settings = ", ".join(f"`{word}`" for word in results["settings"])
    text = f"""# Study: {TITLE}, at scale `{place.scale}`

    python -m reproduce {place.name} --scale {place.scale} --data PICTURES --held-out HELD_OUT

From one stage-1A checkpoint ({results["base_images"]} images): {results["images"]} images more for each row and seed,
with {settings}. The distance in the loss of (a) and (b): {results["distance"]}. Means ± standard
deviations over seeds of the figures on {results["pictures"]} pictures that no row was trained on; the checkpoint itself
is one. {judged_by(results)} s: seconds of training, median ({results["machine"]}).

{table}
{verdict(groups)}
![figures over the weight of the distance]({place.stem}.png)

{versions_line(results)}
"""
    write_page(place, text)


def verdict(groups: Sequence[Group]) -> str:
    """What the table says of (a) against (b) and (c), each at the weight that serves the figure best."""
    lines = []
    for column in COLUMNS:
        best: dict[str, Group] = {}
        for group in groups:
            kind = group[0]["kind"]
            found = gain(group, best.get(kind, group), column)
            if found is not None and (kind not in best or found[0] > 0):
                best[kind] = group
        if not {"sample", "one-step", "more"} <= best.keys():
            continue
        ours = best["sample"]
        for kind in ("one-step", "more"):
            found = gain(ours, best[kind], column)
            if found is None:
                continue
            better, spread = found
            labels = f"{ours[0]['label']} is {in_words(better, spread)} {best[kind][0]['label']}"
            by = f"{better:.{column.places}f} (spread {spread:.{column.places}f})"
            lines.append(f"- {column.name}: {labels}, by {by}.")
    return "\n".join(lines) + "\n"


def plot(groups: Sequence[Group], place: Place) -> None:
    """Every figure over the weight of the distance, with the base and further stage 1A as levels."""
    columns = measured_columns(groups[0])
    figure, axes = subplots((len(columns) + 1) // 2, 2, (9, 2.6 * ((len(columns) + 1) // 2)))
    colours = {"base": "gray", "more": "tab:green", "one-step": "tab:blue", "sample": "tab:orange"}
    names = {"base": "base", "more": "(c) more stage 1A", "one-step": "(b) one-step estimate", "sample": "(a) sample"}
    for axis in axes.flat[len(columns) :]:
        axis.axis("off")
    for axis, column in zip(axes.flat, columns, strict=False):
        for kind, colour in colours.items():
            points = [(g[0]["weight"], column.values(g)) for g in groups if g[0]["kind"] == kind]
            found = [(weight, *known) for weight, values in points if (known := mean_and_deviation(values)) is not None]
            if not found:  # a judge was missing
                continue
            if kind in ("base", "more"):
                _, mean, deviation = found[0]
                axis.axhline(mean, color=colour, linestyle="--", label=names[kind])
                axis.axhspan(mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
            else:
                axis.errorbar(*zip(*found, strict=True), color=colour, marker="o", capsize=3, label=names[kind])
        axis.set(xscale="log", xlabel="weight of the distance", title=column.heading)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(place.out / f"{place.stem}.png", dpi=110)
