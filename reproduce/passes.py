"""One pass of the decoder or many (section 3.4).

Beyond the paper, which takes 25 steps and has no row of one: do many passes of a flow decoder beat one, and from
where on? Nested dropout gives one model several rates. Recipes differ in what they train the flow for. Each is measured
over its rate, its training and the passes of its decoder; one is repeated at nearly four times the parameters.

Cost: smoke a minute. cpu 32 hours on one core, by arithmetic from 17.5 images a second: 14 for long trainings, 5 for
the wider model, 6 for stage 1B and its controls, 7 for measuring. gpu half an hour on one H100, by arithmetic at a
fifth of its peak. paper a day per model on 8 H100, by arithmetic at 40 % of their peak.
Expect: (written before the first run) a sample of p(image | code) has twice the squared error of the mean, so many
passes cost PSNR at every rate, 3 dB at most. They win the Fréchet distance where the code leaves much open: below 0.05
bits per pixel for a recipe that trains all timesteps alike, nowhere for one that trains mostly at t = 1. Training and
parameters move this crossing to higher rates. LPIPS crosses at a lower rate. Stage 1B seeks one mode and moves the
crossing down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

from flowmo.checkpoint.run_folder import CHECKPOINTS, listing
from flowmo.config import Config
from flowmo.evaluate.reconstruction import FlowMoReconstructor
from flowmo.train.cost import training_flops
from flowmo.train.schedule import PAPER_BATCH
from flowmo.train.state import read_metadata
from reproduce import page
from reproduce.bases import GPU_NESTED, NESTED_BASE, PAPER_NESTED, SMOKE_NESTED
from reproduce.page import Column, Group
from reproduce.runner import Results, Row, Rows, Scale, Study

PASSES, SHARES = (1, 2, 4, 8, 25), (0.25, 0.5, 1.0)
SECOND_SEED = {
    **dict.fromkeys(("flow", "anchored"), 1.0),
    **dict.fromkeys(("mixed", "image-loss", "image-loss-less", "image-loss-lpips"), 0.25),
    **dict.fromkeys(("lpips-more", "velocity", "guided"), 0.25),
    **dict.fromkeys(("seek-early", "one-step", "more"), 1.0),
    **dict.fromkeys((f"image-loss-{more}" for more in ("seek", "more", "one-step", "fast")), 1.0),
}
"""Arms with a second seed, and the share of their training that it runs, at scale cpu."""
SCALES = {
    "smoke": Scale(base=SMOKE_NESTED, images=4, ids=(1, 2), passes=(1, 2), shares=(1.0,), seek=4, twice={"flow": 0.25}),
    "cpu": Scale(
        **{"base": NESTED_BASE, "images": 250, "ids": (1, 2, 4, 12), "passes": PASSES, "shares": SHARES},
        **{"seek": 2_048, "twice": SECOND_SEED},
    ),
    "gpu": Scale(
        **{"base": GPU_NESTED, "images": 1000, "ids": (1, 2, 4, 8, 12), "passes": PASSES, "shares": SHARES},
        **{"seek": 32_000, "twice": {}},
    ),
    "paper": Scale(
        **{"base": PAPER_NESTED, "images": 50_000, "ids": (1, 2, 4, 8, 12), "passes": PASSES, "shares": SHARES},
        **{"seek": 6_400_000, "twice": {}},
    ),
}
"""Sub-tokens kept per token (``ids``), shares of the training that are measured, images of stage 1B (``seek``), and
arms with a second seed (``twice``), by the share of their training that it runs."""
FLOW = ("opt.anchor=0", "opt.loss_space=velocity", "opt.schedule=fat_lognormal")
PARTS_OF_MIXED = (
    ("image-loss", "loss on the image", "opt.loss_space=image"),
    ("uniform", "uniform timesteps", "opt.schedule=uniform"),
    ("fifth", "a fifth at t = 1", "opt.anchor=0.2"),
)
"""What ``mixed`` changes of the flow: name, label and setting, each also trained alone."""
SHORT = (
    *("opt.freeze_encoder_after=0", "opt.lr=1e-4", "opt.muon_lr=0.002", "opt.warmup=0", "opt.cooldown=0"),
    "trainer.keep_every=0",
)
"""A tenth of stage 1A's learning rates, of Adam and of Muon."""
FAST = "opt.muon_lr=0.02"
"""Muon's rate of stage 1A, which moves most of the decoder."""
LOGITS = ("opt.lpips_mode=resnet", "opt.lpips_weight=0.01")
"""The distance of ResNet-50's logits, instead of LPIPS: of samples in stage 1B, else of estimates in one step."""
SEEK = ("model.posttrain_sample=true", *SHORT, *LOGITS)
WIDTHS = ("hidden_size", "num_heads", "enc_hidden_size", "enc_num_heads")
BATCH = 16
"""Images that are decoded together: two and a half times as fast on a CPU as one by one."""
SHOWN = 6
"""Images in the grids."""
METRICS = tuple(column for column in page.METRICS if column.key != "ssim")


class Arm(NamedTuple):
    """A recipe: its name, its label, and the settings that it changes.

    Attributes:
        start: the arm whose weights it starts from, after ``start_share`` of their training; empty is a fresh model.
        short: train for ``Scale.seek`` images from there, not to the end of the training.
        share: of the whole training that it runs, where it is not ``short``. Below 1, the tables of whole trainings
            leave it out.
    """

    name: str
    label: str
    settings: tuple[str, ...]
    start: str = ""
    start_share: float = 1.0
    short: bool = False
    share: float = 1.0


def arms_of(base: Config) -> Iterator[Arm]:
    double = tuple(f"model.{name}={2 * getattr(base.model, name)}" for name in WIDTHS)
    yield Arm("flow", "flow", FLOW)
    yield Arm("anchored", "three quarters at t = 1", ("opt.anchor=0.75",))
    yield Arm("falling", "a quarter of the training three quarters at t = 1, then flow", FLOW, "anchored", 0.25)
    seek = (*FLOW, *SEEK, FAST)
    yield Arm("seek", "flow, then stage 1B at Muon's full rate", seek, start="flow", short=True)
    early = {"start": "flow", "start_share": 0.25, "short": True}
    yield Arm("seek-early", "a quarter of the flow's training, then stage 1B", (*FLOW, *SEEK), **early)
    # The controls of stage 1B. Like it they train the decoder alone, with a fresh optimizer and a fresh EMA, whose
    # decay stage 1B counts per step and stage 1A per PAPER_BATCH images.
    decay = base.model.ema_decay ** (PAPER_BATCH / base.data.global_batch_size)
    control = (*SHORT, "model.train=decoder", "trainer.start_weights=model", f"model.ema_decay={decay}")
    yield Arm("one-step", "a quarter, then the same loss in one step", (*FLOW, *control, *LOGITS), **early)
    yield Arm("more", "a quarter, then more of it", (*FLOW, *control), **early)
    mixed = (*FLOW, *(setting for *_, setting in PARTS_OF_MIXED))
    yield Arm("mixed", ", ".join(part for _, part, _ in PARTS_OF_MIXED), mixed)
    for name, part, setting in PARTS_OF_MIXED:
        share = 0.5 if name == "image-loss" else 0.25  # the best of them in many passes goes on
        yield Arm(name, f"flow, {part}", (*FLOW, setting), share=share)
    image, early = (*FLOW, PARTS_OF_MIXED[0][-1]), {**early, "start": "image-loss"}
    yield Arm("image-loss-seek", "flow, loss on the image, then stage 1B", (*image, *SEEK), **early)
    yield Arm("image-loss-more", "flow, loss on the image, then more of it", (*image, *control), **early)
    one_step = (*image, *control, *LOGITS)
    yield Arm("image-loss-one-step", "flow, loss on the image, then the same loss in one step", one_step, **early)
    fast = "flow, loss on the image, then stage 1B at Muon's full rate"
    yield Arm("image-loss-fast", fast, (*image, *SEEK, FAST), **early)
    # The loss on the image is about a fifth of the velocity's, so that the perceptual loss has five times the share.
    more, less = (f"opt.lpips_weight={factor * base.opt.lpips_weight:g}" for factor in (5, 0.2))
    yield Arm("lpips-more", "flow, five times the perceptual loss", (*FLOW, more), share=0.25)
    yield Arm("image-loss-less", "flow, loss on the image, a fifth of the perceptual loss", (*image, less), share=0.25)
    five = "flow, loss on the image, five times the perceptual loss"
    yield Arm("image-loss-lpips", five, (*image, more), share=0.25)
    yield Arm("no-lpips", "flow, no perceptual loss", (*FLOW, "opt.lpips_weight=0"))
    yield Arm("large", "flow, twice as wide", (*FLOW, *double))
    yield Arm("velocity", "flow, the network predicts velocities", (*FLOW, "model.prediction=velocity"))
    guided = ("model.enable_cfg=true", "eval.sampling.guidance=2", "eval.sampling.guidance_high=1")
    yield Arm("guided", "flow, guidance 2 from t = 0.145 to 1", (*FLOW, *guided))


def rows(study: Study, metadata: Row) -> Rows:
    scale = SCALES[study.scale]
    metadata["base"] = scale.base.to_dict()
    arms = list(arms_of(scale.base))
    again = [arm._replace(share=scale.twice[arm.name]) for arm in arms if arm.name in scale.twice]
    for seed, arm in [*((1, arm) for arm in arms), *((2, arm) for arm in again)]:
        checkpoints = checkpoints_of(arm, seed, study)
        for checkpoint in reversed(checkpoints):
            last = arm.share == 1 and checkpoint == checkpoints[-1]
            ids = scale.ids if last else (scale.ids[0], scale.ids[-1])
            passes = scale.passes if last and not arm.short else (1, scale.passes[-1])
            for row in measured(arm, seed, checkpoint, ids, passes, study):
                # a kept row may have an earlier label
                yield {**row, "label": arm.label, "last": last, "tflop": tflop(arm, row["trained"], scale.base)}
    if study.world.main:
        show(study)


def checkpoints_of(arm: Arm, seed: int, study: Study) -> list[Path]:
    """Train an arm. Returns a checkpoint for each share of its own training, the last one at the end."""
    scale, run = SCALES[study.scale], f"{arm.name}-seed{seed}"
    config, whole = scale.base.override(*arm.settings, f"trainer.seed={seed}"), duration(scale.base)
    if arm.share < 1:
        config = config.override(f"trainer.duration={round(arm.share * whole)} images")
    start = kept(f"{arm.start}-seed{seed}", arm.start_share, study) if arm.start else None
    begin = read_metadata(start)["images"] if start else 0
    if arm.short:
        return [study.train(config.override(f"trainer.duration={begin + scale.seek} images"), run, start).checkpoint]
    study.train(config.override(f"trainer.keep_every={round(min(scale.shares) * whole)} images"), run, start)
    return list(dict.fromkeys(kept(run, share, study) for share in scale.shares if share * whole > begin))


def duration(base: Config) -> int:
    """Images of a whole training."""
    return base.trainer.duration.images(base.data.global_batch_size, 0)


def tflop(arm: Arm, trained: int, base: Config) -> float:
    """Training compute up to ``trained`` images, by arithmetic, with that of the arm it starts from, in TFLOP."""
    start = {other.name: other for other in arms_of(base)}.get(arm.start)
    begin = round(arm.start_share * duration(base)) if start else 0
    flops = (trained - begin) * training_flops(base.override(*arm.settings), freeze_encoder=arm.short)
    return flops / 1e12 + (tflop(start, begin, base) if start else 0.0)


def kept(run: str, share: float, study: Study) -> Path:
    """The checkpoint of a run after about this share of its training."""
    checkpoints, whole = listing(study.folder(run) / CHECKPOINTS), duration(SCALES[study.scale].base)
    return min(checkpoints, key=lambda path: abs(read_metadata(path)["images"] - share * whole))


def measured(arm: Arm, seed: int, checkpoint: Path, ids: Sequence[int], passes: Sequence[int], study: Study) -> Rows:
    """Measure one checkpoint at each rate, with each number of passes."""
    scale, tokenizer = SCALES[study.scale], study.load(checkpoint)
    tokenizer.chunk_size = BATCH
    side = tokenizer.config.data.image_size
    trained = read_metadata(checkpoint)["images"]
    about = {"recipe": arm.name, "label": arm.label, "seed": seed, "trained": trained}
    about["parameters"] = sum(p.numel() for p in tokenizer.parameters())

    def measure(run: str, rate: float, steps: int) -> Row:
        candidate = FlowMoReconstructor(tokenizer, steps, bits_per_pixel=rate)
        indices, x = study.held_out_images(SHOWN, side)
        study.keep_images(run, originals=x, samples=candidate.reconstruct(x, indices).images.cpu())
        return {**about, "rate": rate, "passes": steps, **study.evaluate(candidate, side, scale.images)}

    for count, steps in product(ids, passes):
        run = f"{arm.name}-seed{seed}-{trained}-ids{count}-passes{steps}"
        yield study.once(run, partial(measure, run, tokenizer.rates(side, side)[count - 1], steps))


def show(study: Study) -> None:
    """Draw what one and many passes make of the same codes, at the lowest and the highest rate.

    ``idsN.png`` shows the longest training of each recipe, ``idsN-first.png`` the shortest that was measured.
    """
    scale = SCALES[study.scale]
    for count, (stem, length) in product((scale.ids[0], scale.ids[-1]), {"": -1, "-first": 0}.items()):
        strips = {}
        for arm in arms_of(scale.base):
            for steps in (1, scale.passes[-1]):
                found = list(study.folder("").glob(f"{arm.name}-seed1-*-ids{count}-passes{steps}/samples.png"))
                found.sort(key=lambda path: int(path.parent.name.split("-")[-3]))
                strips.setdefault("originals", found[length].with_name("originals.png"))
                strips[f"{arm.label}: {steps} passes"] = found[length]
        page.image_strips(strips, study.folder(f"ids{count}{stem}.png"))


def body(results: Results, plot: Path) -> str:
    rows = results["rows"]
    columns, whole = page.measured(rows, METRICS), [row for row in rows if row["last"]]
    groups = page.groups_of(whole or rows, "recipe")
    panels = [gain_panel(column, groups) for column in columns]
    if distances := [column for column in columns if column.key == "frechet_distance"]:
        panels.append(first_lengths_panel(distances[0], rows))
        panels += compute_panels(distances[0], rows)
    page.line_plots(panels, 2, plot)
    over_rates = plot.with_stem(f"{plot.stem}-rates")
    page.line_plots([rates_panel(column, groups) for column in columns], 3, over_rates)
    tables = "\n".join(f"**{column.heading}**\n\n{passes_table(column, groups)}" for column in columns)
    side, trained = results["base"]["data"]["image_size"], groups[0][0]["trained"]
    most = max(row["passes"] for row in rows)
    return f"""\
Whole trainings take {trained} images of {side} × {side} pixels. Stage 1B and its controls train on a few more, after
the whole or a quarter. The tables over passes hold these; the table over the training also holds recipes with a part
of it. The rates of a model, in bits per pixel, are prefixes of each token's ids. Means over {results["pictures"]}
held-out images, ± the standard deviation over seeds; – was not measured.
{page.feature_note(results)} Columns: passes of the decoder.

![metrics over the rate, in one and in {most} passes]({over_rates.name})

{tables}
One pass → {most} passes over the training, at the lowest and the highest rate. TFLOP are those of the training, by
arithmetic, from its first image on, with the perceptual network's:

{training_table(columns, rows)}
Where {most} passes become better than one: the rate at which the difference of the two
changes its sign, between measured rates by its logarithm.

{crossings_table(columns, rows)}"""


def passes_table(column: Column, groups: Sequence[Group]) -> str:
    """A metric over recipe, rate and passes."""
    passes = sorted({row["passes"] for group in groups for row in group})
    lines = []
    for rate in page.groups_of([row for group in groups for row in group], "recipe", "rate"):
        found = {
            same[0]["passes"]: page.cell(column.values(same), column.digits) for same in page.groups_of(rate, "passes")
        }
        lines.append([rate[0]["label"], f"{rate[0]['rate']:.4f}", *(found.get(count, "–") for count in passes)])
    return page.markdown_table(["", "bits per pixel", *map(str, passes)], lines)


def training_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Each metric in one and in most passes, by recipe, length of training and rate."""
    most, rates = max(row["passes"] for row in rows), {row["rate"] for row in rows}
    lines = []
    for group in page.groups_of(rows, "recipe", "trained", "rate"):
        found = {same[0]["passes"]: same for same in page.groups_of(group, "passes")}
        if group[0]["rate"] in (min(rates), max(rates)) and most in found:
            cells = (" → ".join(page.cell(c.values(found[count]), c.digits) for count in (1, most)) for c in columns)
            about = (str(group[0]["trained"]), f"{group[0]['tflop']:.0f}", f"{group[0]['rate']:.4f}")
            lines.append([group[0]["label"], *about, *cells])
    return page.markdown_table(
        ["", "images", "TFLOP", "bits per pixel", *(column.heading for column in columns)], lines
    )


def gains(column: Column, rows: Sequence[Row]) -> list[tuple[float, float, float]]:
    """For each rate, ascending: how much better most passes are than one, in the column's units, and its deviation.

    The difference is taken within each seed.
    """
    most, found = max(row["passes"] for row in rows), []
    for rate in page.groups_of(rows, "rate"):
        one, many = ({row["seed"]: row for row in rate if row["passes"] == passes} for passes in (1, most))
        both = [seed for seed in one if seed in many] if most > 1 else []
        gain = page.gain([many[seed] for seed in both], [one[seed] for seed in both], column, paired=True)
        if both and gain:
            found.append((rate[0]["rate"], gain.better, gain.spread or 0.0))
    return sorted(found)


def rates_panel(column: Column, groups: Sequence[Group]) -> page.Panel:
    """A metric over the rate, in one and in most passes, of the trainings that were measured at every rate."""
    rates = {row["rate"] for group in groups for row in group}
    most, found = max(row["passes"] for group in groups for row in group), []
    for group in groups:
        if {row["rate"] for row in group} == rates:
            words = {1: "one pass", most: f"{most} passes"}
            found += [{**row, "curve": f"{row['label']}: {words[n]}"} for row in group if (n := row["passes"]) in words]
    return replace(page.panel(column, found, "rate", "bits per pixel", log=2), paired=True)


def gain_panel(column: Column, groups: Sequence[Group]) -> page.Panel:
    panel = page.Panel(f"{column.name}: gain of many passes", "bits per pixel", log=2, levels={"one pass": (0, 0)})
    panel.curves = {group[0]["label"]: points for group in groups if (points := gains(column, group))}
    return panel


def first_lengths_panel(column: Column, rows: Sequence[Row]) -> page.Panel:
    """A metric in most passes over the same in one, after the shortest training: a point per recipe and rate."""
    most, shortest = max(row["passes"] for row in rows), min(row["trained"] for row in rows)
    panel = page.Panel(f"{column.name} in {most} passes, {shortest} images", "in one pass")
    for group in page.groups_of([row for row in rows if row["trained"] == shortest], "recipe"):
        for rate in page.groups_of(group, "rate"):
            one, many = ([row for row in rate if row["passes"] == passes] for passes in (1, most))
            found, other = column.mean(one), page.mean_and_deviation(column.values(many))
            if found and other:
                panel.curves.setdefault(group[0]["label"], []).append((found, *other))
    ends = [value for points in panel.curves.values() for point in points for value in point[:2]]
    if ends:
        panel.curves["one pass"] = [(value, value, 0.0) for value in (min(ends), max(ends))]
    return panel


def compute_panels(column: Column, rows: Sequence[Row]) -> Iterator[page.Panel]:
    """A metric in most passes over the training's compute, at the lowest and the highest rate: a curve per recipe."""
    most = max(row["passes"] for row in rows)
    for rate in sorted({min(row["rate"] for row in rows), max(row["rate"] for row in rows)}):
        found = [{**row, "curve": row["label"]} for row in rows if (row["rate"], row["passes"]) == (rate, most)]
        panel = page.panel(column, found, "tflop", "TFLOP of training")
        panel.title = f"{column.name} in {most} passes, {rate:.3f} bits per pixel"
        yield panel


def crossing(gained: Sequence[tuple[float, float, float]]) -> str:
    """The rates between which one pass becomes better than many, or the other way round."""
    if all(gain > 0 for _, gain, _ in gained):
        return "many at every rate"
    if all(gain <= 0 for _, gain, _ in gained):
        return "one at every rate"
    found = []
    for (low, before, _), (high, after, _) in pairwise(gained):
        if (before > 0) != (after > 0):
            share = before / (before - after)
            found.append(f"{'many' if before > 0 else 'one'} below {low * (high / low) ** share:.3f}")
    return ", ".join(found)


def crossings_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Which of one and many passes wins, by recipe and length of training."""
    lines = []
    for length in page.groups_of(rows, "recipe", "trained"):
        size = f"{length[0]['parameters'] / 1e6:.1f}"
        cells = (crossing(gains(column, length)) for column in columns)
        lines.append([length[0]["label"], size, str(length[0]["trained"]), *cells])
    return page.markdown_table(["", "M parameters", "images", *(column.name for column in columns)], lines)
