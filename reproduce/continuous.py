"""Continuous bottlenecks at DiTo's latent size (section 4.1, table 3): normed with noise synchronization, KL, none."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import flowmo
from flowmo.config import preset
from flowmo.evaluate.published import TABLE_3
from flowmo.evaluate.reconstruction import Evaluators
from reproduce.bases import GPU_BASE, PAPERS_SAMPLER, SMOKE_BASE, TINY_BASE, Scale
from reproduce.page import (
    bars,
    figures_table,
    groups_of,
    judged_by,
    keep_samples,
    markdown_table,
    measured_columns,
    show_samples,
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

TITLE = "continuous bottlenecks (section 4.1, table 3)"
BOTTLENECKS = {
    "layernorm": "LayerNorm and noise synchronization (DiTo's)",
    "kl": "KL",
    "noop": "none",
}

CONTINUOUS = "model.quantization_type=layernorm"


SCALES = {
    "smoke": Scale(
        SMOKE_BASE.override(*PAPERS_SAMPLER, CONTINUOUS, "model.context_dim=4", "eval.sampling.sample_steps=2"),
        *(1, 4),
        "a quarter of a minute on two CPU cores; its figures mean nothing",
    ),
    "cpu": Scale(
        TINY_BASE.override(CONTINUOUS, "model.code_length=16", "model.context_dim=16"),
        *(2, 300),
        "an hour on one CPU core, by arithmetic: three trainings for each seed; as much code a pixel as DiTo's",
    ),
    "gpu": Scale(
        GPU_BASE.override(
            *PAPERS_SAMPLER,
            "model.quantization_type=layernorm",
            "model.code_length=64",
            "model.context_dim=16",
            "trainer.duration=6000 steps",
        ),
        *(2, 1000),
        "about 15 minutes on one H100 by arithmetic, at a fifth of its peak",
    ),
    "paper": Scale(
        preset("lo").override(CONTINUOUS, "model.context_dim=16", "data.global_batch_size=128"),
        *(1, 50_000),
        "256 tokens of 16 channels; each row 197 hours on 8 H100 at 40 % of their peak, by arithmetic",
    ),
}


def run(place: Place, judges: Evaluators) -> None:
    """Train, measure and draw; what is already there is not made again."""
    scale = SCALES[place.scale]
    rows: list[dict[str, Any]] = []
    for seed in range(1, scale.seeds + 1):
        for kind in BOTTLENECKS:
            name = f"{kind}-seed{seed}"
            rows.append(once(name, place, partial(make, kind, seed, name, place, judges)))
            forget_checkpoints(name, place)
            model = scale.base.model
            facts = {
                "pictures": judged_count(place, scale.pictures),
                "judges": judges.describe(),
                "images": rows[0]["images"],
            }
            facts |= {"code_length": model.code_length, "context_dim": model.context_dim}
            write_results(place, {**facts, "side": scale.base.data.image_size}, rows)
    if place.world.main:
        show_samples(rows, "layernorm-seed1", place)
        draw(place)


def make(kind: str, seed: int, name: str, place: Place, judges: Evaluators) -> dict[str, Any]:
    scale = SCALES[place.scale]
    trained = train(scale.base.override(f"model.quantization_type={kind}", f"trainer.seed={seed}"), name, place)
    tokenizer = flowmo.load(trained.checkpoint, device=str(place.world.device))
    keep_samples(tokenizer, name, place)
    facts = {
        "arm": kind,
        "label": BOTTLENECKS[kind],
        "seed": seed,
        "seconds": trained.seconds,
        "images": trained.images,
    }
    return {**facts, **measured(tokenizer, place, judges, scale.pictures)}


def draw(place: Place) -> None:
    """The table and the plot of the results in ``place.out``."""
    results = read_results(place)
    groups = groups_of(results["rows"])
    columns = measured_columns(results["rows"])
    bars(groups, columns, place)
    seconds = {"s": lambda group: f"{statistics.median(row['seconds'] for row in group):.0f}"}
    published = markdown_table(
        ["table 3", "rFID ↓", "PSNR ↑", "SSIM ↑", "LPIPS ↓"],
        ([row.name, *(f"{figure:g}" for figure in (row.rfid, row.psnr, row.ssim, row.lpips))] for row in TABLE_3),
    )
    text = f"""# Study: {TITLE}, at scale `{place.scale}`

    python -m reproduce {place.name} --scale {place.scale} --data PICTURES --held-out HELD_OUT

One tokenizer a bottleneck and seed, {results["images"]} images long: {results["code_length"]} tokens of
{results["context_dim"]} channels for pictures of {results["side"]} × {results["side"]}. Means ± standard deviations
over seeds of the figures on {results["pictures"]} pictures that nothing was trained on. {judged_by(results)}
s: seconds of training, median ({results["machine"]}).

{figures_table(groups, columns, last=seconds)}
The paper's, of ImageNet at 256 × 256 with 256 tokens of 16 channels:

{published}
![figures of every bottleneck]({place.stem}.png)

{versions_line(results)}
"""
    write_page(place, text)
