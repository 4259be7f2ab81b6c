"""Where the flow loss lies (section 3.2).

Beyond the paper: measures the error of a decoder's velocity, whose square is the paper's loss (equation 5), and the
error of its one-step estimate of the image (equation 6), which is t times as large. Weighted by the density of a
training's timesteps, they say how much of either loss lies below a timestep.

Cost: smoke a few seconds. cpu a minute per model of 7 M parameters on one core. gpu a minute per model of 80 M
parameters on one H100, by arithmetic. paper an hour per model of FlowMo-Lo's size on one H100, by arithmetic.
Expect: (written before the first run) where the network predicts images, a third to two thirds of the velocity loss
lies below t = 0.2, where an image is nearly known and a twentieth of the timesteps are drawn, and less than a twentieth
of the image loss. Training on the image loss halves the image's error above t = 0.5 and raises the velocity's below
0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from flowmo.checkpoint.run_folder import CHECKPOINTS
from flowmo.config import OptConfig
from flowmo.model import flow
from flowmo.model.sampler import image_seed, seeded_noise
from flowmo.precision import computing
from flowmo.streams import Stream, stream
from flowmo.tokenizer import FlowMo
from flowmo.train.state import read_metadata
from reproduce import page
from reproduce.runner import Results, Row, Rows, Scale, Study

TAKES_MODELS = True
SCALES = {
    "smoke": Scale(images=4),
    "cpu": Scale(images=250),
    "gpu": Scale(images=1000),
    "paper": Scale(images=50_000),
}
EDGES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Bounds of the intervals of t that errors are measured in. t = 1 itself, which ``opt.anchor`` trains, follows them."""
DRAWS = 1 << 20
"""Timesteps among which those of the measurement are chosen."""
NEARLY_KNOWN = 0.2
"""The table says how much of a loss lies below this edge."""
BATCH = 25
LOSSES = {"velocity_error": "velocity loss", "image_error": "image loss"}
SPACES = {"velocity_error": "velocity", "image_error": "image"}
"""Their ``opt.loss_space``."""


def rows(study: Study, metadata: Row) -> Rows:
    for source, name, tokenizer in study.load_models(distilled=False):
        if tokenizer.config.bits_per_pixel is None:
            study.report(f"{name} is skipped: the noise of a continuous code moves its training's timesteps.")
            continue
        trained = read_metadata(Path(source))["images"] if Path(source).parent.name == CHECKPOINTS else None
        about = {
            "arm": name,
            "label": name,
            "trained": trained,
            "trained_on": tokenizer.config.opt.loss_space,
        }
        run = f"{name}-{tokenizer.weights_identity()}"  # a run has many checkpoints
        yield study.once(run, lambda tokenizer=tokenizer, about=about: about | measure(tokenizer, study))


@torch.no_grad()
def measure(tokenizer: FlowMo, study: Study) -> Row:
    """Mean squared errors over the training's timesteps in each interval of ``EDGES`` and at t = 1.

    The decoder has whole codes and no guidance.
    """
    opt, decoder = tokenizer.config.opt, tokenizer.decoder
    indices, images = study.held_out_images(SCALES[study.scale].images, tokenizer.config.data.image_size)
    times = timesteps(opt.schedule, len(images))
    errors = {key: torch.zeros(len(times), dtype=torch.float64) for key in LOSSES}
    for batch in torch.arange(len(images)).split(BATCH):
        part = images[batch]
        noise = seeded_noise([image_seed(0, indices[i]) for i in batch], *part.shape[-2:])
        x, z = part.to(tokenizer.device), noise.to(tokenizer.device)
        ids = tokenizer.encode(part).ids
        with computing(tokenizer.precision, tokenizer.device):
            code = decoder.embed_code(tokenizer.quantizer.code_from_ids(ids))
        for i, t in enumerate(times[:, batch].to(x.device)):
            with computing(tokenizer.precision, tokenizer.device):
                velocity = decoder(flow.interpolate(x, z, t), code, t).float()
            error = (velocity - (z - x)).square().flatten(1).mean(dim=1)
            for key, space in SPACES.items():
                weight = flow.error_weight(t, space, tokenizer.config.model.prediction)
                weighted = error if weight is None else weight.square() * error
                errors[key][i] += float(weighted.sum()) / len(images)
    return {"probability": probabilities(opt), **{key: found.tolist() for key, found in errors.items()}}


def timesteps(schedule: str, count: int) -> Tensor:
    """Timesteps of ``count`` images in each interval of ``EDGES``, and t = 1: (intervals + 1) × ``count``.

    In an interval they are evenly spaced quantiles of a training's timesteps, in random order.
    """
    generator, parts = stream(0, Stream.TIMESTEP), []
    drawn = flow.sample_timesteps(DRAWS, schedule, generator).sort().values
    for low, high in pairwise(EDGES):
        inside = drawn[(low <= drawn) & (drawn < high)]
        quantiles = (torch.arange(count) + 0.5) / count
        parts.append(inside[(quantiles * len(inside)).long()][torch.randperm(count, generator=generator)])
    return torch.stack([*parts, torch.ones(count)])


def probabilities(opt: OptConfig) -> list[float]:
    """Probability of each interval of ``EDGES`` under a training's timesteps, then of t = 1."""
    edges, uniform = torch.tensor(EDGES, dtype=torch.float64), flow.DISTRIBUTIONS[opt.schedule]
    below = uniform * edges + (1 - uniform) * torch.special.ndtr(torch.logit(edges))
    return [*((1 - opt.anchor) * below.diff()).tolist(), opt.anchor]


def shares_below(row: Row, key: str | None = None) -> list[float]:
    """Share of a loss below each edge after the first, and of all of it; without ``key``, of the timesteps."""
    parts = [p * (row[key][i] if key else 1.0) for i, p in enumerate(row["probability"])]
    return [below / sum(parts) for below in accumulate(parts)]


def body(results: Results, plot: Path) -> str:
    rows = results["rows"]
    page.line_plots([error_panel(rows), *(share_panel(rows, key) for key in LOSSES)], 3, plot)
    return f"""\
Errors on {results["pictures"]} held-out images, of the whole code, without guidance. The velocity loss is the mean
square of the velocity's error, the image loss that of t times this error, both over the timesteps of the model's own
training. Each image has one of these timesteps in each interval.

{share_table(rows)}
Mean squared error of the velocity, in intervals of t:

{error_table(rows, "velocity_error")}
Mean squared error of the estimated image, of numbers from −1 to 1:

{error_table(rows, "image_error")}"""


def share_table(rows: Sequence[Row]) -> str:
    """Each loss, and how much of it and of the timesteps lies below ``NEARLY_KNOWN``."""
    index, lines = EDGES.index(NEARLY_KNOWN) - 1, []
    for row in rows:
        losses = (sum(p * e for p, e in zip(row["probability"], row[key], strict=True)) for key in LOSSES)
        shares = (shares_below(row, key)[index] for key in (None, *LOSSES))
        about = (row["label"], "–" if row["trained"] is None else str(row["trained"]), row["trained_on"])
        lines.append([*about, *(f"{x:.3f}" for x in losses), *(f"{100 * x:.1f} %" for x in shares)])
    below = (f"{what} below t = {NEARLY_KNOWN}" for what in ("timesteps", *LOSSES.values()))
    return page.markdown_table(["model", "images", "trained on the loss on the", *LOSSES.values(), *below], lines)


def error_table(rows: Sequence[Row], key: str) -> str:
    header = [*(f"{low:g} to {high:g}" for low, high in pairwise(EDGES)), "1"]
    return page.markdown_table(["model", *header], ([row["label"], *(f"{e:.3f}" for e in row[key])] for row in rows))


def error_panel(rows: Sequence[Row]) -> page.Panel:
    panel, middles = page.Panel("squared error of the image", "t"), [(a + b) / 2 for a, b in pairwise(EDGES)]
    for row in rows:
        panel.curves[row["label"]] = [(t, e, 0.0) for t, e in zip([*middles, 1.0], row["image_error"], strict=True)]
    return panel


def share_panel(rows: Sequence[Row], key: str) -> page.Panel:
    panel = page.Panel(f"{LOSSES[key]} below t (%)", "t")
    for row in rows:
        shares = shares_below(row, key)[:-1]  # the last is t = 1 itself
        panel.curves[row["label"]] = [(t, 100 * s, 0.0) for t, s in zip(EDGES, [0.0, *shares], strict=True)]
    return panel
