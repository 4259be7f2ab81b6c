"""Mode-seeking post-training against its alternatives (section 3.3, table 7).

Reproduces the claim that stage 1B works because it trains on samples through the whole chain. All arms of a seed start
from one stage-1A checkpoint, train the decoder alone with a fresh optimizer and a fresh EMA, and see equally many
images at the same learning rate: (a) the perceptual loss on samples, and (b) on the one-step estimate, each at several
weights; (c) more of stage 1A.

Cost: smoke half a minute. cpu on one core: per seed of the tiny base 25 minutes for stage 1A, which is the longer
baseline of ``ablations``, and 100 minutes for the arms; 4 hours and 3 for the small base. gpu 25 minutes on one H100,
by arithmetic at a fifth of its peak. paper, by arithmetic on 8 H100 at 40 % of their peak: stage 1A 8 hours, the sample
arm 90 minutes, the others 9 minutes each.
Expect: from the tiny base (written before its first run), (a) at the paper's weight is better than (c) by 12 in the
Fréchet distance and 0.4 dB, and worse by 0.02 in LPIPS (AlexNet), which (c) trains on; it is better than (b) at its
best weight by 6 in the Fréchet distance, 0.3 dB and 0.01. The best weight of (b) for the distance is 0.01 or 0.1.
(Written after two seeds, before the first row of weight 1) at 1 both are worse than at 0.1, by 6 and 10. (Written
before the first row with whole last steps) (a) at the paper's weight gains 7 over (c) in the Fréchet distance, and 0.6
dB; at their best weights (a) and (b) are level in the distance within 5, and (a) is ahead by 0.3 dB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from flowmo.config import Config
from flowmo.losses.perceptual import build_distance
from flowmo.train.ema import decay_per_step
from reproduce import page
from reproduce.bases import GPU_BASE, PAPER_SMALL, SMALL_BASE, SMOKE_BASE, TINY_BASE
from reproduce.page import Group
from reproduce.runner import Results, Row, Rows, Scale, Study

DISTANCE = "resnet"
"""The distance in the loss of (a) and (b): logits of a ResNet-50, as in the release. The paper says a ResNet."""
LABELS = {"base": "base", "more": "(c) more stage 1A", "one-step": "(b) one-step estimate", "sample": "(a) sample"}
SHORT = ("opt.warmup=0", "opt.cooldown=0", "trainer.sample_every=0", "trainer.log_every=256 images", "opt.lr=1e-4")
"""A constant learning rate, since the arms are short."""
SCALES = {
    "smoke": Scale(
        bases={"smoke": (SMOKE_BASE, 1)},
        shared=(*SHORT, "model.posttrain_sample_k=2", "trainer.log_every=1 step"),
        weights={"one-step": (0.01,), "sample": (0.01,)},
        **{"arm_images": 8, "images": 8},
    ),
    "cpu": Scale(
        bases={"tiny": (TINY_BASE.override("trainer.duration=2400 steps"), 3), "small": (SMALL_BASE, 1)},
        shared=(*SHORT, "model.ema_decay=0.7"),
        weights={"one-step": (0.0001, 0.001, 0.01, 0.1, 1.0), "sample": (0.001, 0.01, 0.1, 1.0)},
        **{"arm_images": 1024, "images": 200},
    ),
    "gpu": Scale(
        bases={"gpu": (GPU_BASE.override("trainer.duration=4000 steps"), 3)},
        shared=(*SHORT, "model.ema_decay=0.97"),
        weights={"one-step": (0.0001, 0.001, 0.01, 0.1, 1.0), "sample": (0.001, 0.01, 0.1, 1.0)},
        **{"arm_images": 16384, "images": 1000},
    ),
    "paper": Scale(
        bases={"small": (PAPER_SMALL, 1)},
        shared=("opt.lr=5e-5", "data.global_batch_size=64", "opt.warmup=0", "model.ema_update=release"),
        weights={"one-step": (0.05, 0.01, 0.005, 0.001, 0.00075, 0.0005, 0.00025, 0.0001), "sample": (0.01,)},
        **{"arm_images": 1_281_167, "images": 50_000},
    ),
}
"""``bases``: settings of stage 1A and the number of its seeds, by name; ``weights``: of the distance in (a) and (b)."""


def arms(scale: Scale, base: Config) -> Iterator[tuple[Row, tuple[str, ...]]]:
    """Yield the ways to continue from the base: what the results say of each, and the settings that it changes.

    All train the decoder alone, with a fresh optimizer and a fresh EMA, as stage 1B does.
    """
    shared = base.override(*scale.shared)
    decay = decay_per_step(shared, shared.data.global_batch_size)  # stage 1B counts it per step; all arms are equal
    stage_1a = ("opt.freeze_encoder_after=0", "model.train=decoder", "trainer.start_weights=model")
    stage_1b = ("opt.freeze_encoder_after=0", "model.posttrain_sample=true", f"model.ema_decay={decay}")
    yield {"arm": "more", "label": "(c) further stage 1A", "kind": "more", "weight": 0.0}, stage_1a
    for kind, weights in scale.weights.items():
        for weight in weights:
            loss = (f"opt.lpips_mode={DISTANCE}", f"opt.lpips_weight={weight:g}")
            label = f"{LABELS[kind]}, weight {weight:g}"
            about = {"arm": f"{kind}-{weight:g}", "label": label, "kind": kind, "weight": weight}
            yield about, (*(stage_1b if kind == "sample" else stage_1a), *loss)


def rows(study: Study, metadata: Row) -> Rows:
    scale = SCALES[study.scale]
    metadata |= {"images": scale.arm_images, "settings": list(scale.shared)}
    metadata["distance"] = build_distance(DISTANCE).name
    for name, (config, seeds) in scale.bases.items():
        for seed in range(1, seeds + 1):
            yield from rows_of(name, config.override(f"trainer.seed={seed}"), study)


def rows_of(name: str, base: Config, study: Study) -> Rows:
    """Train a base of one seed, and all arms from its checkpoint."""
    scale, seed = SCALES[study.scale], base.trainer.seed
    measure = partial(study.trained_row, limit=scale.images, base=name, seed=seed)
    run, label = f"{name}-base-seed{seed}", "the stage-1A checkpoint"
    start = study.train(base, run)
    yield measure(run, base, arm="base", label=label, kind="base", weight=0.0)
    for about, settings in arms(scale, base):
        run = f"{name}-{about['arm']}-seed{seed}"
        duration = f"trainer.duration={start.images + scale.arm_images} images"
        config = base.override(*scale.shared, duration, *settings)
        yield measure(run, config, start=start.checkpoint, **about)
        study.delete_checkpoints(run)


def body(results: Results, plot: Path) -> str:
    bases = page.groups_of(results["rows"], "base")
    panels = []
    for rows in bases:
        curves = [{**row, "curve": f"{row['base']}: {LABELS[row['kind']]}"} for row in ordered(rows)]
        for column in page.measured(curves):
            panels.append(page.panel(column, curves, "weight", "weight of the distance", 10))
            panels[-1].title += f", {rows[0]['base']} base"
    page.line_plots(panels, 2, plot)
    settings = ", ".join(f"`{word}`" for word in results["settings"])
    return f"""\
The rows of a seed start from one stage-1A checkpoint. {results["images"]} more images per row, with {settings}. The
distance in the loss of (a) and (b): {results["distance"]}. Means ± standard deviations over seeds, on held-out images.
{page.feature_note(results)} s: median seconds of training. The spread of a comparison is that of the differences from
the same checkpoint.

{"".join(section(rows) for rows in bases)}"""


def ordered(rows: Sequence[Row]) -> list[Row]:
    order = list(LABELS)
    return sorted(rows, key=lambda row: (order.index(row["kind"]), row["weight"]))


def section(rows: Sequence[Row]) -> str:
    """Table and verdict of one base."""
    groups, images = page.groups_of(ordered(rows)), min(row["images"] for row in rows)
    return f"""\
## The {rows[0]["base"]} base, {images} images of stage 1A

On {rows[0]["pictures"]} images:

{page.table(groups, page.measured(rows), last=page.SECONDS)}
{verdict(groups)}
"""


def verdict(groups: Sequence[Group]) -> str:
    """Compare (a) with the checkpoint, (b) and (c), each at its best weight for the metric."""
    text = ""
    for column in page.METRICS:
        known = [group for group in groups if column.mean(group) is not None]
        best = {group[0]["kind"]: group for group in sorted(known, key=lambda g: column.sign * column.mean(g))}
        for kind in ("base", "more", "one-step"):
            if {"sample", kind} <= best.keys():
                text += page.comparison(best["sample"], best[kind], [column], paired=True)
    return text
