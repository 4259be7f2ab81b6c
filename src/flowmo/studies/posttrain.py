"""Stage 1B (section 3.3, table 7): is it the sample through the whole chain that makes mode seeking work?

From one stage-1A checkpoint: (a) the perceptual loss on samples through the chain, at several weights; (b) the same
distance on the one-step estimate, at several weights; (c) as many further images of stage 1A. All start from the same
weights, see equally many images at the same learning rate, and are judged on pictures that none was trained on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

import flowmo
from flowmo.checkpoint import write_whole
from flowmo.config import Config
from flowmo.data import evenly_spread, open_source
from flowmo.evaluate.figures import grid
from flowmo.evaluate.reconstruction import Judges, read_crops
from flowmo.perceptual import build_distance
from flowmo.pictures import to_picture
from flowmo.studies.study import (
    Place,
    cell,
    forget_checkpoints,
    markdown_table,
    mean_and_deviation,
    measured,
    once,
    read_results,
    subplots,
    train,
    write_results,
)
from flowmo.tokenizer import FlowMo
from flowmo.train.state import read_facts

TITLE = "mode-seeking post-training against its alternatives (section 3.3, table 7)"
PICTURES_SHOWN = 6
COLUMNS = (
    ("psnr", "PSNR (dB) ↑", 2, 1),
    ("ssim", "SSIM ↑", 4, 1),
    ("lpips_alex", "LPIPS AlexNet ↓", 4, 1),
    ("lpips_vgg", "LPIPS VGG ↓", 4, 1),
    ("frechet_distance", "Fréchet distance ↓", 2, 1),
    ("kernel_distance", "kernel distance × 1000 ↓", 2, 1000),
)
"""Figure, heading, decimal places and factor."""
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


SMALL_BASE = Config.from_dict(
    {
        "data": {"image_size": 64, "global_batch_size": 16, "random_flip": True, "num_workers": 1},
        "model": {
            **{"patch_size": 8, "hidden_size": 256, "num_heads": 4, "dec_depth": 6, "enc_hidden_size": 128},
            **{"enc_num_heads": 2, "enc_depth": 3, "code_length": 64, "context_dim": 9},
            **{"code_layout": "lattice", "prediction": "picture", "initial_gate": 1.0},
            **{"ema_decay": 0.992, "entropy_loss_weight": 0.05, "commit_loss_weight": 0.0025},
        },
        "opt": {
            **{"lr": 1e-3, "mup_base_width": 0, "warmup": "200 steps", "cooldown": 0.4, "max_grad_norm": 1.0},
            **{"lpips_mode": "alex", "lpips_weight": 0.1, "schedule": "uniform", "anchor": 0.2},
            **{"loss_space": "picture"},
        },
        "trainer": {"duration": "7000 steps", "log_every": "100 steps", "checkpoint_every": "500 steps"},
        "eval": {"sampling": {"sample_steps": 8, "rho": 2}},
    }
).override("data.max_microbatch=16", "trainer.tensorboard=false", "trainer.sample_every='1000 steps'")
"""15 M parameters, 72 bytes a 64 × 64 picture: small enough to be trained, and trained through its chain, on a CPU."""

GPU_BASE = SMALL_BASE.override(
    *("data.image_size=128", "data.global_batch_size=64", "data.max_microbatch=64", "data.num_workers=8"),
    *("model.hidden_size=512", "model.num_heads=8", "model.dec_depth=8", "model.code_length=128"),
    *("model.enc_hidden_size=256", "model.enc_num_heads=4", "model.enc_depth=4", "model.context_dim=18"),
    *("trainer.duration=12000 steps", "trainer.compile=true", "eval.sampling.sample_steps=25"),
)
SHORT = ("opt.warmup=0", "opt.cooldown=0", "trainer.sample_every=0", "trainer.log_every=256 images")
"""Of all arms: a constant learning rate, as the images are few."""

SCALES = {
    "smoke": Scale(
        SMALL_BASE.override(
            *("data.image_size=32", "data.global_batch_size=4", "data.num_workers=0", "model.hidden_size=64"),
            *("model.num_heads=2", "model.dec_depth=1", "model.enc_hidden_size=64", "model.enc_depth=1"),
            *("model.code_length=4", "trainer.duration=2 steps", "trainer.log_every=1 step"),
        ),
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
        *(16384, (0.001, 0.01, 0.1), (0.001, 0.01, 0.1), 3, 1000),
        "about 25 minutes on one H100 by arithmetic, at a fifth of its peak",
    ),
    "paper": Scale(
        Config(),
        ("opt.lr=5e-5", "data.global_batch_size=64", "opt.warmup=0"),
        *(1_600_000, (0.01,), (0.001, 0.01, 0.1), 3, 50_000),
        "each sample arm 18 hours on 8 H100 by arithmetic, besides stage 1A",
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
    for weight in scale.one_step_weights:
        label, settings = f"(b) one-step estimate, weight {weight:g}", (*frozen, f"opt.lpips_weight={weight:g}")
        yield Arm(f"one-step-{weight:g}", label, "one-step", weight, settings)
    for weight in scale.sample_weights:
        label, settings = f"(a) sample, weight {weight:g}", (*frozen, f"opt.lpips_weight={weight:g}")
        yield Arm(f"sample-{weight:g}", label, "sample", weight, (*settings, "model.posttrain_sample=true"))


def run(place: Place, judges: Judges) -> None:
    """Train, measure and draw; what is already there is not made again."""
    scale = SCALES[place.scale]
    base = train(scale.base, "base", place)
    start, distance = read_facts(base.checkpoint)["images"], build_distance(DISTANCE).name

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
            facts = {"base_images": start, "images": scale.images, "pictures": scale.pictures, "distance": distance}
            write_results(place, {**facts, "judges": judges.describe(), "settings": list(scale.arms)}, rows)
    if place.world.main:
        show_samples(rows, place)
        draw(place)


def keep_samples(tokenizer: FlowMo, name: str, place: Place) -> None:
    """Held-out pictures and their reconstructions as two rows of one picture, in the run's folder."""
    source = open_source(place.held_out)
    indices = evenly_spread(PICTURES_SHOWN, len(source))
    x = read_crops(source, indices, tokenizer.config.data.image_size, enlarge=True)
    y = tokenizer.decode(tokenizer.encode(x), seed=indices).cpu()
    if place.world.main:
        for rows, kind in (([x], "originals"), ([y], "samples")):
            to_picture(grid(rows)).save(place.folder(name) / f"{kind}.png")


def show_samples(rows: Sequence[Mapping[str, Any]], place: Place) -> None:
    """The first seed's pictures of every arm below each other, beside the runs: not all pictures may be published."""
    shown = [row for row in rows if row["seed"] <= 1]
    strips = [("originals", place.folder("base") / "originals.png")]
    strips += [(row["label"], place.folder(row["run"]) / "samples.png") for row in shown]
    figure, axes = subplots(len(strips), 1, (8, 1.25 * len(strips)))
    for axis, (label, path) in zip(axes.flat, strips, strict=True):
        axis.imshow(Image.open(path))
        axis.set_title(label, fontsize=8, loc="left", pad=2)
        axis.axis("off")
    figure.savefig(place.folder("pictures.png"), dpi=85)


def draw(place: Place) -> None:
    """The table and the plot of the results in ``place.out``."""
    results = read_results(place)
    rows = results["rows"]
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    order = {"base": 0, "more": 1, "one-step": 2, "sample": 3}
    groups = sorted(by_arm.values(), key=lambda group: (order[group[0]["kind"]], group[0]["weight"]))
    plot(groups, place)
    columns = [column for column in COLUMNS if rows[0][column[0]] is not None]
    table = markdown_table(
        ["", "seeds", *(heading for _, heading, *_ in columns), "s"],
        (
            [
                *(group[0]["label"], str(len(group))),
                *(cell((row[key] * factor for row in group), places) for key, _, places, factor in columns),
                f"{statistics.median(row['seconds'] for row in group):.0f}",
            ]
            for group in groups
        ),
    )
    settings = ", ".join(f"`{word}`" for word in results["settings"])
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    distance = rows[0]["feature_network"]
    text = f"""# Study: {TITLE}, at scale `{place.scale}`

    flowmo study {place.name} --scale {place.scale} --data PICTURES --held-out HELD_OUT

From one stage-1A checkpoint ({results["base_images"]} images): {results["images"]} images more for each row and seed,
with {settings}. The distance in the loss of (a) and (b): {results["distance"]}. Means ± standard
deviations over seeds of the figures on {results["pictures"]} pictures that no row was trained on; the checkpoint itself
is one. Fréchet and kernel distance: {distance}; of {results["pictures"]} pictures the former is biased, so compare it
within this table only. s: seconds of training, median ({results["machine"]}).

{table}
{verdict(groups)}
![figures over the weight of the distance]({place.stem}.png)

{versions}
"""
    write_whole(place.out / f"{place.stem}.md", lambda temporary: Path(temporary).write_text(text))


def verdict(groups: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """What the table says of (a) against (b) and (c), each at the weight that serves the figure best."""
    lines = []
    for key, heading, places, factor in COLUMNS:
        name, rising = heading[:-2], heading.endswith("↑")
        best: dict[str, tuple[float, float, str]] = {}
        for group in groups:
            found = mean_and_deviation(row[key] for row in group)
            if found is None:
                continue
            kind, label = group[0]["kind"], group[0]["label"]
            if kind not in best or (found[0] > best[kind][0]) == rising:
                best[kind] = (*found, label)
        if not {"sample", "one-step", "more"} <= best.keys():
            continue
        ours = best["sample"]
        for kind in ("one-step", "more"):
            other = best[kind]
            gain = (ours[0] - other[0]) * (1 if rising else -1) * factor
            spread = math.hypot(ours[1], other[1]) * factor
            word = "better than" if gain > 2 * spread else "worse than" if gain < -2 * spread else "not apart from"
            by = f"{gain:.{places}f} (spread {spread:.{places}f})"
            lines.append(f"- {name}: {ours[2]} is {word} {other[2]}, by {by}.")
    return "\n".join(lines) + "\n"


def plot(groups: Sequence[Sequence[Mapping[str, Any]]], place: Place) -> None:
    """Every figure over the weight of the distance, with the base and further stage 1A as levels."""
    columns = [column for column in COLUMNS if groups[0][0][column[0]] is not None]
    figure, axes = subplots((len(columns) + 1) // 2, 2, (9, 2.6 * ((len(columns) + 1) // 2)))
    colours = {"base": "gray", "more": "tab:green", "one-step": "tab:blue", "sample": "tab:orange"}
    names = {"base": "base", "more": "(c) more stage 1A", "one-step": "(b) one-step estimate", "sample": "(a) sample"}
    for axis in axes.flat[len(columns) :]:
        axis.axis("off")
    for axis, (key, heading, _, factor) in zip(axes.flat, columns, strict=False):
        for kind, colour in colours.items():
            points = [(g[0]["weight"], [row[key] * factor for row in g]) for g in groups if g[0]["kind"] == kind]
            if not points:
                continue
            found = [(weight, *mean_and_deviation(values)) for weight, values in points]
            if kind in ("base", "more"):
                _, mean, deviation = found[0]
                axis.axhline(mean, color=colour, linestyle="--", label=names[kind])
                axis.axhspan(mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
            else:
                axis.errorbar(*zip(*found, strict=True), color=colour, marker="o", capsize=3, label=names[kind])
        axis.set(xscale="log", xlabel="weight of the distance", title=heading)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(place.out / f"{place.stem}.png", dpi=110)
