"""Stage 1A's decisions one by one (section 4.2, table 4), and plain logit-normal timesteps' discolouring (figure 7).

Every row is the baseline but for one decision, trained on equally many images by the same seed; a row that differs in
sampling alone is measured on the baseline's weights. The encoder of "MSE-trained encoder" learns in an autoencoder that
regresses pictures from codes in one step, without a perceptual loss, and is frozen for a fresh decoder, both of the
baseline's length.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flowmo
from flowmo.config import Config, preset
from flowmo.evaluate.reconstruction import Evaluators
from flowmo.tokenizer import FlowMo
from flowmo.train.ema import EMA
from flowmo.train.trainer import Trainer
from reproduce.bases import GPU_BASE, PAPERS_SAMPLER, SMOKE_BASE, TINY_BASE, Scale
from reproduce.page import (
    COLUMNS,
    PICTURES_SHOWN,
    Column,
    against_paper,
    bars,
    figures_table,
    groups_of,
    held_out,
    judged_by,
    measured_columns,
    save_images,
    show_samples,
    show_strips,
    versions_line,
    write_page,
)
from reproduce.study import (
    Place,
    Trained,
    forget_checkpoints,
    judged_count,
    measured,
    once,
    read_results,
    train,
    write_results,
)

TITLE = "decisions of stage 1A (section 4.2, table 4; figure 7)"
BASELINE = "baseline"
COLOUR = Column("colour_error", "colour error (levels of 255) ↓", 2)
COLOUR_PICTURES = 32
FSQ_LEVELS = 8
KEPT = (BASELINE, "logit-normal")
"""Rows whose checkpoints stay: other studies start from the former, figure 7 is of both."""
MSE = ("opt.anchor=1", "opt.loss_space=picture", "opt.lpips_weight=0", "model.enable_cfg=false")
"""At t = 1 the decoder sees noise and the code; its error there, as one of pictures, is an autoencoder's MSE."""

PUBLISHED = {
    BASELINE: (2.87, 20.71, 0.15),
    "patch": (6.39, 19.94, 0.17),
    "mse": (3.82, 21.40, 0.15),
    "no-lpips": (13.86, 22.11, 0.21),
    "fsq": (3.14, 21.31, 0.14),
    "logit-normal": (4.08, 16.45, 0.21),
    "rho-1": (3.42, 20.25, 0.16),
    "no-guidance": (3.28, 20.67, 0.16),
}
"""Table 4: rFID, PSNR and LPIPS."""


SCALES = {
    "smoke": Scale(
        SMOKE_BASE.override(*PAPERS_SAMPLER, "eval.sampling.sample_steps=2"),
        *(1, 4),
        "half a minute on two CPU cores; its figures mean nothing",
    ),
    "cpu": Scale(TINY_BASE, 2, 200, "70 minutes for each seed on one CPU core: eight trainings of 4 to 7 minutes"),
    "gpu": Scale(
        GPU_BASE.override(*PAPERS_SAMPLER, "trainer.duration=2500 steps", "trainer.sample_every=0"),
        *(2, 1000),
        "about 25 minutes on one H100 by arithmetic, at a fifth of its peak",
    ),
    "paper": Scale(
        preset("small").override("trainer.duration=40 epochs", "data.global_batch_size=128"),
        *(1, 50_000),
        "each training 8 hours on 8 H100 at 40 % of their peak, by arithmetic",
    ),
}


@dataclass(frozen=True)
class Row:
    """One decision: the run's name, how the table calls it, settings of its training, settings of its sampler."""

    name: str
    label: str
    training: tuple[str, ...] = ()
    sampling: tuple[str, ...] = ()


def rows_of(base: Config) -> Iterator[Row]:
    """Table 4's rows, and where the baseline trains a share of its timesteps at exactly t = 1, one without that."""
    model = base.model
    yield Row(BASELINE, BASELINE)
    yield Row("patch", "doubled patch size", (f"model.patch_size={2 * model.patch_size}",))
    yield Row("mse", "MSE-trained, then frozen encoder", ("opt.freeze_encoder_after=0",))
    yield Row("no-lpips", "no perceptual loss", ("opt.lpips_weight=0",))
    bits = FSQ_LEVELS.bit_length() - 1
    fsq = (
        "model.quantization_type=fsq",
        f"model.fsq_levels={FSQ_LEVELS}",
        f"model.context_dim={model.context_dim // bits}",
    )
    yield Row("fsq", "FSQ of equal bits", fsq)
    yield Row("logit-normal", "plain logit-normal timesteps", ("opt.schedule=lognormal", "opt.anchor=0"))
    if base.opt.anchor:
        yield Row("no-anchor", "thick tail alone, nothing at exactly t = 1", ("opt.anchor=0",))
    yield Row("rho-1", "unshifted sampler, ρ = 1", sampling=("eval.sampling.rho=1",))
    yield Row("no-guidance", "no guidance", sampling=("eval.sampling.guidance=1",))


def baseline(base: Config, seed: int, place: Place) -> Trained:
    """The baseline of a seed, trained under this study's name whichever study asks."""
    there = replace(place, name="ablations")
    return train(base.override(f"trainer.seed={seed}"), f"{BASELINE}-seed{seed}", there)


def run(place: Place, judges: Evaluators) -> None:
    """Train, measure and draw; what is already there is not made again."""
    scale = SCALES[place.scale]
    rows: list[dict[str, Any]] = []
    for seed in range(1, scale.seeds + 1):
        for row in rows_of(scale.base):
            name = f"{row.name}-seed{seed}"
            rows.append(once(name, place, partial(make, row, seed, name, place, judges)))
            if row.name not in KEPT:
                forget_checkpoints(name, place)
            facts = {
                "base": scale.base.to_dict(),
                "pictures": judged_count(place, scale.pictures),
                "judges": judges.describe(),
            }
            write_results(place, facts, rows)
    if place.world.main:
        show_samples(rows, f"{BASELINE}-seed1", place)
        show_discoloured(place)
        draw(place)


def make(row: Row, seed: int, name: str, place: Place, judges: Evaluators) -> dict[str, Any]:
    """Train a row, or find what it is measured on, and measure it."""
    scale = SCALES[place.scale]
    config = scale.base.override(*row.training, f"trainer.seed={seed}")
    if row.name == "mse":
        trained = train(config, name, place, begin=mse_encoder(scale.base, seed, place))
    elif row.training:
        trained = train(config, name, place)
    else:
        trained = baseline(scale.base, seed, place)
    tokenizer = flowmo.load(trained.checkpoint, *row.sampling, device=str(place.world.device))
    facts = {"arm": row.name, "label": row.label, "seed": seed, "seconds": trained.seconds, "images": trained.images}
    figures = measured(tokenizer, place, judges, scale.pictures)
    return {**facts, COLOUR.key: colour_error(tokenizer, name, place), **figures}


def mse_encoder(base: Config, seed: int, place: Place) -> Callable[[Trainer], None]:
    """What gives a fresh run the encoder of an autoencoder of mean squared errors, which is trained first."""

    def begin(fresh: Trainer) -> None:
        name = f"autoencoder-seed{seed}"
        taken = flowmo.load(train(base.override(*MSE, f"trainer.seed={seed}"), name, place).checkpoint)
        model = fresh.task.model
        model.encoder.load_state_dict(taken.encoder.state_dict())
        fresh.ema = EMA(model, fresh.plan.total)
        fresh.norm_control.remember()
        place.world.barrier()  # until all processes have it
        forget_checkpoints(name, place)

    return begin


def colour_error(tokenizer: FlowMo, name: str, place: Place) -> float:
    """How far a reconstruction's mean colour is from its picture's, in levels of 255; keeps some for looking at."""
    indices, x = held_out(place, COLOUR_PICTURES, tokenizer.config.data.image_size)
    y = tokenizer.decode(tokenizer.encode(x), seed=indices).cpu()
    save_images({"originals": x[:PICTURES_SHOWN], "samples": y[:PICTURES_SHOWN]}, name, place)
    return float((y - x).mean(dim=(2, 3)).abs().mean() * 127.5)


def show_discoloured(place: Place) -> None:
    """Figure 7: originals, what the baseline makes of them, and what plain logit-normal timesteps do."""
    strips = [("originals", place.folder(f"{BASELINE}-seed1") / "originals.png")]
    for name, label in ((BASELINE, "thick-tailed timesteps"), ("logit-normal", "plain logit-normal timesteps")):
        strips.append((label, place.folder(f"{name}-seed1") / "samples.png"))
    show_strips(strips, place.folder("figure7.png"))


def draw(place: Place) -> None:
    """The table and the plot of the results in ``place.out``."""
    results = read_results(place)
    groups = groups_of(results["rows"])
    columns = [*measured_columns(results["rows"]), COLOUR]
    bars(groups, columns, place)
    seconds = {"s": lambda group: f"{statistics.median(row['seconds'] for row in group):.0f}"}
    keys = ("frechet_distance", "psnr", "lpips_alex")
    published = {name: dict(zip(keys, figures, strict=True)) for name, figures in PUBLISHED.items()}
    sampled = {row.name for row in rows_of(SCALES[place.scale].base) if row.sampling}
    text = f"""# Study: {TITLE}, at scale `{place.scale}`

    python -m reproduce {place.name} --scale {place.scale} --data PICTURES --held-out HELD_OUT

Every row is the baseline but for one decision, {results["rows"][0]["images"]} images long. Means ± standard deviations
over seeds of the figures on {results["pictures"]} pictures that nothing was trained on. {judged_by(results)}
Colour error: how far a reconstruction's mean colour is from its picture's (figure 7). s: seconds of training, median
({results["machine"]}); the last two rows are sampled from the baseline's weights.

{figures_table(groups, columns, last=seconds)}
Against the paper's table 4, as improvements over the baseline; a direction needs more than two spreads, which for
rows of the same weights are those of the differences:

{against_paper(groups, published, COLUMNS, sampled)}
![figures of every row]({place.stem}.png)

{versions_line(results)}
"""
    write_page(place, text)
