"""Mode-seeking post-training against its alternatives (section 3.3, table 7).

Reproduces the claim that stage 1B works because it trains on samples through the whole chain. All arms start from one
stage-1A checkpoint, train the decoder alone with a fresh optimizer and a fresh EMA, and see equally many images at the
same learning rate: (a) the perceptual loss on samples, and (b) on the one-step estimate, each at several weights; (c)
more of stage 1A.

Cost: smoke half a minute. cpu an hour on two cores for stage 1A and another for the arms. gpu 25 minutes on one H100,
by arithmetic at a fifth of its peak. paper, by arithmetic on 8 H100 at 40 % of their peak: stage 1A 8 hours, the sample
arm 90 minutes, the others 9 minutes each.
Expect: at scale cpu, (a) is better than (b) and (c) in every metric at its best weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from flowmo.losses.perceptual import build_distance
from flowmo.train.ema import decay_per_step
from flowmo.train.state import read_metadata
from reproduce import page
from reproduce.bases import GPU_BASE, PAPER_SMALL, SMALL_BASE, SMOKE_BASE
from reproduce.page import Group
from reproduce.runner import Results, Row, Rows, Scale, Study

DISTANCE = "resnet"
"""The distance in the loss of (a) and (b): logits of a ResNet-50, as in the release. The paper says a ResNet."""
LABELS = {"base": "base", "more": "(c) more stage 1A", "one-step": "(b) one-step estimate", "sample": "(a) sample"}
SHORT = ("opt.warmup=0", "opt.cooldown=0", "trainer.sample_every=0", "trainer.log_every=256 images", "opt.lr=1e-4")
"""A constant learning rate, since the arms are short."""
SCALES = {
    "smoke": Scale(
        base=SMOKE_BASE,
        shared=(*SHORT, "model.posttrain_sample_k=2", "trainer.log_every=1 step"),
        weights={"one-step": (0.01,), "sample": (0.01,)},
        **{"arm_images": 8, "images": 8},
    ),
    "cpu": Scale(
        base=SMALL_BASE,
        shared=(*SHORT, "model.ema_decay=0.7"),
        weights={"one-step": (0.0001, 0.001, 0.01, 0.1), "sample": (0.001, 0.01, 0.1)},
        **{"arm_images": 1024, "images": 500, "seeds": 3},
    ),
    "gpu": Scale(
        base=GPU_BASE,
        shared=(*SHORT, "model.ema_decay=0.97"),
        weights={"one-step": (0.0001, 0.001, 0.01, 0.1), "sample": (0.001, 0.01, 0.1)},
        **{"arm_images": 16384, "images": 1000, "seeds": 3},
    ),
    "paper": Scale(
        base=PAPER_SMALL,
        shared=("opt.lr=5e-5", "data.global_batch_size=64", "opt.warmup=0", "model.ema_update=release"),
        weights={"one-step": (0.05, 0.01, 0.005, 0.001, 0.00075, 0.0005, 0.00025, 0.0001), "sample": (0.01,)},
        **{"arm_images": 1_281_167, "images": 50_000},
    ),
}


def arms(scale: Scale) -> Iterator[tuple[Row, tuple[str, ...]]]:
    """Yield the ways to continue from the base: what the results say of each, and the settings that it changes.

    All train the decoder alone, with a fresh optimizer and a fresh EMA, as stage 1B does.
    """
    shared = scale.base.override(*scale.shared)
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
    base = study.train(scale.base, "base")
    start = read_metadata(base.checkpoint)["images"]
    metadata |= {"base_images": start, "images": scale.arm_images, "settings": list(scale.shared)}
    metadata["distance"] = build_distance(DISTANCE).name
    measure = partial(study.trained_row, limit=scale.images)
    label = "the stage-1A checkpoint"
    yield measure("base", scale.base, arm="base", label=label, kind="base", weight=0.0, seed=0)
    for seed in range(1, scale.seeds + 1):
        for about, settings in arms(scale):
            run = f"{about['arm']}-seed{seed}"
            length = (f"trainer.duration={start + scale.arm_images} images", f"trainer.seed={seed}")
            config = scale.base.override(*scale.shared, *length, *settings)
            yield measure(run, config, start=base.checkpoint, **about, seed=seed)
            study.delete_checkpoints(run)


def body(results: Results, plot: Path) -> str:
    order = list(LABELS)
    groups = page.groups_of(results["rows"])
    groups.sort(key=lambda group: (order.index(group[0]["kind"]), group[0]["weight"]))
    curves = [{**row, "curve": LABELS[row["kind"]]} for group in groups for row in group]
    panels = [page.panel(column, curves, "weight", "weight of the distance", 10) for column in page.measured(curves)]
    page.line_plots(panels, 2, plot)
    settings = ", ".join(f"`{word}`" for word in results["settings"])
    return f"""\
From one stage-1A checkpoint ({results["base_images"]} images), {results["images"]} more images per row and seed, with
{settings}. The distance in the loss of (a) and (b): {results["distance"]}. Means ± standard deviations over seeds, on
{results["pictures"]} images that no row was trained on; there is one checkpoint. {page.feature_note(results)} s: median
seconds of training.

{page.table(groups, page.measured(results["rows"]), last=page.SECONDS)}
{verdict(groups)}"""


def verdict(groups: Sequence[Group]) -> str:
    """Compare (a) with (b) and (c), each at its best weight for the metric."""
    text = ""
    for column in page.METRICS:
        known = [group for group in groups if column.mean(group) is not None]
        best = {group[0]["kind"]: group for group in sorted(known, key=lambda g: column.sign * column.mean(g))}
        for kind in ("one-step", "more"):
            if {"sample", kind} <= best.keys():
                text += page.comparison(best["sample"], best[kind], [column])
    return text
