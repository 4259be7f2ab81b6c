"""Decisions of stage 1A (section 4.2, table 4; figure 7).

Reproduces every decision of stage 1A, one at a time. Each row changes one decision of the baseline and trains on
equally many images with the same seeds; a second, longer training shows a trend. Rows that change the sampler measure
the baseline's weights. For "MSE-trained encoder", an autoencoder first learns to regress images from codes in one step,
without a perceptual loss; a fresh decoder then trains on its frozen encoder.

Cost: smoke half a minute. cpu on one core: per seed 70 minutes, and three and a half hours of longer training. gpu 25
minutes on one H100, by arithmetic at a fifth of its peak. paper 8 hours per training on 8 H100, by arithmetic at 40 %
of their peak.
Expect: at scale cpu, timesteps, patch size and ρ matter as in the paper; the Fréchet distance of an MSE-trained encoder
and of FSQ improves, against the paper. Of the longer training (written before its first run), as improvements over the
baseline in PSNR and Fréchet distance: patch size -1 dB and -35, MSE-trained encoder +0.8 and -5, no perceptual loss
+0.6 and -35, FSQ +0.8 and +8, logit-normal timesteps -4 and -35, ρ = 1 -0.8 and -5, no guidance 0 and 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from flowmo.config import Config
from flowmo.tokenizer import FlowMo
from flowmo.train.ema import EMA
from flowmo.train.trainer import Trainer
from reproduce import page
from reproduce.bases import GPU_SHORT, PAPER_SMALL, SMOKE_ABLATION, TINY_BASE
from reproduce.runner import Results, Row, Rows, Scale, Study

SCALES = {
    "smoke": Scale(base=SMOKE_ABLATION, lengths={"2 steps": 1}, images=4),
    "cpu": Scale(base=TINY_BASE, lengths={"600 steps": 2, "2400 steps": 3}, images=200),
    "gpu": Scale(base=GPU_SHORT, lengths={"2500 steps": 2}, images=1000),
    "paper": Scale(base=PAPER_SMALL, lengths={"40 epochs": 1}, images=50_000),
}
"""``lengths``: number of seeds for each ``trainer.duration``, from short to long."""
BASELINE = "baseline"
COLOUR = page.Column("colour_error", "colour error (levels of 255) ↓", 2)
COLOUR_IMAGES = 32
FSQ_LEVELS = 8
KEPT = (BASELINE, "logit-normal")
"""Arms whose checkpoints stay: the sampler's study takes the former, and figure 7 shows both."""
MSE = ("opt.anchor=1", "opt.loss_space=image", "opt.lpips_weight=0", "model.enable_cfg=false")
"""Settings of the autoencoder. At t = 1 the decoder sees noise and the code; its image error is then a plain MSE."""
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


class Arm(NamedTuple):
    """One decision: its name, its label in the table, and the settings that it changes."""

    name: str
    label: str
    training: tuple[str, ...] = ()
    sampling: tuple[str, ...] = ()


def arms_of(base: Config) -> Iterator[Arm]:
    """Table 4's rows. A baseline with an anchor at t = 1 gets one more row without it."""
    model = base.model
    yield Arm(BASELINE, BASELINE)
    yield Arm("patch", "doubled patch size", (f"model.patch_size={2 * model.patch_size}",))
    yield Arm("mse", "MSE-trained, then frozen encoder", ("opt.freeze_encoder_after=0",))
    yield Arm("no-lpips", "no perceptual loss", ("opt.lpips_weight=0",))
    width = f"model.context_dim={model.context_dim // (FSQ_LEVELS.bit_length() - 1)}"
    fsq = ("model.quantization_type=fsq", f"model.fsq_levels={FSQ_LEVELS}", width)
    yield Arm("fsq", "FSQ of equal bits", fsq)
    yield Arm("logit-normal", "plain logit-normal timesteps", ("opt.schedule=lognormal", "opt.anchor=0"))
    if base.opt.anchor:
        yield Arm("no-anchor", "thick tail alone, nothing at exactly t = 1", ("opt.anchor=0",))
    yield Arm("rho-1", "unshifted sampler, ρ = 1", sampling=("eval.sampling.rho=1",))
    yield Arm("no-guidance", "no guidance", sampling=("eval.sampling.guidance=1",))


def rows(study: Study, metadata: Row) -> Rows:
    base = SCALES[study.scale].base
    metadata["base"] = base.to_dict()
    for length, seeds in SCALES[study.scale].lengths.items():
        for seed in range(1, seeds + 1):
            seeded = base.override(f"trainer.duration={length}", f"trainer.seed={seed}")
            suffix = suffix_of(length, seed)
            for arm in arms_of(base):
                run = f"{arm.name}-{suffix}"
                study.settings(seeded.override(*arm.training), run)  # refuses a row of other settings
                yield study.once(run, partial(train_and_measure, arm, seeded, suffix, study))
                if arm.name not in KEPT:
                    study.delete_checkpoints(run)
                if arm.name == "mse":
                    study.delete_checkpoints(f"autoencoder-{suffix}")
        if study.world.main:
            figure_7(study, length)


def suffix_of(length: str, seed: int) -> str:
    """End of the names of runs, such as ``600-steps-seed1``."""
    return f"{length.replace(' ', '-')}-seed{seed}"


def train_and_measure(arm: Arm, base: Config, suffix: str, study: Study) -> Row:
    """Train one row and measure it. The names of runs end with ``suffix``."""
    run = f"{arm.name}-{suffix}"
    if arm.training:
        prepare = mse_encoder(base, suffix, study) if arm.name == "mse" else None
        trained = study.train(base.override(*arm.training), run, prepare=prepare)
    else:
        trained = study.train(base, f"{BASELINE}-{suffix}")
    tokenizer = study.load(trained.checkpoint, *arm.sampling)
    about = {"arm": arm.name, "label": arm.label, "seed": base.trainer.seed}
    about |= {"seconds": trained.seconds, "images": trained.images}
    metrics = study.measure(tokenizer, SCALES[study.scale].images)
    return {**about, COLOUR.key: colour_error(tokenizer, run, study), **metrics}


def mse_encoder(base: Config, suffix: str, study: Study) -> Callable[[Trainer], None]:
    """Train an autoencoder and give its encoder to a fresh run."""

    def prepare(trainer: Trainer) -> None:
        run = f"autoencoder-{suffix}"
        autoencoder = study.load(study.train(base.override(*MSE), run).checkpoint)
        model = trainer.task.model
        model.encoder.load_state_dict(autoencoder.encoder.state_dict())
        trainer.ema = EMA(model, trainer.plan.total)
        trainer.norm_control.remember()

    return prepare


def colour_error(tokenizer: FlowMo, run: str, study: Study) -> float:
    """Mean absolute error of an image's mean colour, in levels of 255. Keeps some samples."""
    indices, x = study.held_out_images(COLOUR_IMAGES, tokenizer.config.data.image_size)
    y = tokenizer.decode(tokenizer.encode(x), seed=indices).cpu()
    study.keep_images(run, originals=x, samples=y)
    return float((y - x).mean(dim=(2, 3)).abs().mean() * 127.5)


def figure_7(study: Study, length: str) -> None:
    """Figure 7: originals, samples of the baseline, and samples of plain logit-normal timesteps."""
    suffix = suffix_of(length, 1)
    shown = {"originals": (BASELINE, "originals"), "thick-tailed timesteps": (BASELINE, "samples")}
    shown["plain logit-normal timesteps"] = ("logit-normal", "samples")
    strips = {label: study.folder(f"{arm}-{suffix}") / f"{name}.png" for label, (arm, name) in shown.items()}
    page.image_strips(strips, study.folder("figure7.png"))


def body(results: Results, plot: Path) -> str:
    columns = [*page.measured(results["rows"]), COLOUR]
    lengths = page.groups_of(results["rows"], "images")
    page.dot_plots([labelled_groups(rows) for rows in lengths], columns, plot)
    keys = ("frechet_distance", "psnr", "lpips_alex")
    published = {name: dict(zip(keys, values, strict=True)) for name, values in PUBLISHED.items()}
    sampled = {arm.name for arm in arms_of(SCALES[results["scale"]].base) if arm.sampling}
    tables = "\n".join(
        f"After {rows[0]['images']} images:\n\n{page.table(page.groups_of(rows), columns, last=page.SECONDS)}"
        for rows in lengths
    )
    comparisons = "\n".join(
        f"After {rows[0]['images']} images:\n\n{page.against_paper(page.groups_of(rows), published, sampled)}"
        for rows in lengths
    )
    return f"""\
Every row changes one decision of the baseline and trains on equally many images. Means ± standard deviations over
seeds, on {results["pictures"]} held-out images. {page.feature_note(results)}
Colour error: distance of a reconstruction's mean colour from its image's (figure 7). s: median seconds of training.
The row with an MSE-trained encoder leaves out the training of that encoder. The last two rows are sampled from the
baseline's weights.

{tables}
Against the paper's table 4, as improvements over the baseline. A direction needs more than two spreads; for rows of the
same weights, the spread is that of their differences.

{comparisons}
"""


def labelled_groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the rows of one length by arm, with the length in their labels."""
    return page.groups_of({**row, "label": f"{row['label']}, {row['images']} images"} for row in rows)
