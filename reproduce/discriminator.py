"""FlowMo and a convolutional tokenizer, each with and without a discriminator (table 1).

Reproduces table 1's question where both may have what the other has. All four have equal bits, training images in the
same order and perceptual loss; the convolutional one has a fifth fewer parameters at scale cpu. FlowMo learns by Muon,
the convolutional one and the discriminators by Adam. A discriminator joins after half of the training. Weights are kept
along the way, so that trends can be read. At scale cpu both train longer without a discriminator, to equal FLOPs.
FlowMo is measured in one pass, for which its recipe is made.

Cost: smoke half a minute. cpu eight trainings of 20 to 90 minutes on one core. gpu 10 minutes on one
H100, by arithmetic at a fifth of its peak. paper 30 hours per training of FlowMo and 100 of the convolutional one, by
arithmetic on one H100 at 40 % of its peak.
Expect: (written before the first run) with convolutions in FlowMo's decoder, and two and a half times the training of
``peer``, the convolutional tokenizer is ahead by 0.5 to 1 dB instead of 2.9. The gap shrinks from a quarter of the
training to its end. Discriminators lower the Fréchet distance of both by a tenth and cost 0.5 dB. (Written before the
longer trainings) after 153 and 150 TFLOP FlowMo is ahead in PSNR by 2 dB and in LPIPS, and the Fréchet distances, 260
each, are within 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from flowmo.config import Config
from flowmo.evaluate.reconstruction import FlowMoReconstructor
from flowmo.losses.perceptual import build_distance
from flowmo.streams import Stream, seed_global
from flowmo.tokenizer import FlowMo
from reproduce import StudyError, page
from reproduce.adversarial import train_adversarial, weights_after
from reproduce.bases import GPU_NESTED, NESTED_BASE, ONE_RATE, PAPER_NESTED, SMOKE_NESTED
from reproduce.convolutional import (
    ADVERSARIAL_START,
    ConvolutionalReconstructor,
    ConvolutionalTokenizer,
    fitting_width,
    step_flops,
)
from reproduce.runner import Results, Row, Rows, Scale, Study

SHARES = (0.25, 0.5, 1.0)
RATES = {"flowmo": 1e-3, "convolutional": 2e-3}
"""Learning rates. In ``peer``, the convolutional one chose this from three; FlowMo's is that of Muon."""
DISCRIMINATOR_RATES = {"flowmo": 0.1, "convolutional": 1.0}
"""Learning rates of the discriminators over those of their tokenizers, chosen by trials from half of the training."""
SCALES = {
    "smoke": Scale(base=SMOKE_NESTED.override(*ONE_RATE), images=4, shares=(0.5, 1.0), longer={"flowmo": (1.5,)}),
    "cpu": Scale(
        base=NESTED_BASE.override(*ONE_RATE, "trainer.duration=24k images", "trainer.checkpoint_every=2k images"),
        images=250,
        seeds=2,
        shares=SHARES,
        longer={"flowmo": (1.5, 2.0, 3.0), "convolutional": (1.5,)},
    ),
    "gpu": Scale(base=GPU_NESTED.override(*ONE_RATE), images=1000, seeds=2, shares=SHARES, longer={}),
    "paper": Scale(base=PAPER_NESTED.override(*ONE_RATE), images=50_000, shares=SHARES, longer={}),
}
"""``shares`` of the training after which the weights are measured; without a discriminator also ``longer`` ones, by
kind."""


class Arm(NamedTuple):
    kind: str
    adversarial: bool

    @property
    def name(self) -> str:
        return f"{self.kind}-{'with' if self.adversarial else 'without'}"

    @property
    def label(self) -> str:
        tokenizer = {"flowmo": "FlowMo", "convolutional": "convolutional"}[self.kind]
        return f"{tokenizer}, {'with' if self.adversarial else 'without'} a discriminator"

    def build(self, config: Config, width: int) -> FlowMo | ConvolutionalTokenizer:
        return FlowMo(config) if self.kind == "flowmo" else ConvolutionalTokenizer(config, width)


ARMS = [Arm(kind, adversarial) for kind in RATES for adversarial in (False, True)]


def rows(study: Study, metadata: Row) -> Rows:
    if study.world.size > 1:
        raise StudyError("These tokenizers train in one process. Start the study without torchrun.")
    scale = SCALES[study.scale]
    base = scale.base
    own = sum(p.numel() for p in FlowMo(base).parameters())
    width = fitting_width(base, own)
    perceptual = build_distance(base.opt.lpips_mode)
    built = {arm: arm.build(base, width) for arm in ARMS}
    metadata["parameters"] = {arm.name: sum(p.numel() for p in built[arm].parameters()) for arm in ARMS}
    metadata["flops"] = {arm.name: step_flops(built[arm], perceptual, arm.adversarial) for arm in ARMS}
    metadata["bits_per_pixel"], metadata["learning_rates"] = base.bits_per_pixel, RATES
    for seed in range(1, scale.seeds + 1):
        for arm in ARMS:
            yield from trained_rows(arm, seed, width, study)


def trained_rows(arm: Arm, seed: int, width: int, study: Study) -> Rows:
    """Train one tokenizer and measure it at each length."""
    scale, run = SCALES[study.scale], f"{arm.name}-seed{seed}"
    shares = [*scale.shares, *(() if arm.adversarial else scale.longer.get(arm.kind, ()))]
    config = scale.base.override(f"opt.lr={RATES[arm.kind]}", f"trainer.seed={seed}")
    batch = config.data.global_batch_size
    steps = config.trainer.duration.images(batch, 0) // batch
    lengths = [round(share * steps) * batch for share in shares]
    config = config.override(f"trainer.duration={lengths[-1]} images")
    seed_global(seed, Stream.WEIGHTS)
    tokenizer = arm.build(config, width)
    seconds = train_adversarial(tokenizer, run, study, arm.adversarial, lengths, DISCRIMINATOR_RATES[arm.kind])
    about = {"arm": arm.name, "label": arm.label, "curve": arm.label, "seed": seed}
    for share, images in zip(shares, lengths, strict=True):
        shown = {**about, "images": images, "share": share, "seconds": share / shares[-1] * seconds}
        yield study.once(f"{run}-{images}", partial(measured, tokenizer, run, images, shown, study))


def measured(tokenizer: FlowMo | ConvolutionalTokenizer, run: str, images: int, about: Row, study: Study) -> Row:
    """Metrics of a run's weights after so many images."""
    state = torch.load(weights_after(images, run, study), weights_only=True, map_location=tokenizer.device)
    tokenizer.load_state_dict(state, strict=False)
    tokenizer.eval().requires_grad_(False)
    if isinstance(tokenizer, FlowMo):
        candidate: FlowMoReconstructor | ConvolutionalReconstructor = FlowMoReconstructor(tokenizer, steps=1)
    else:
        candidate = ConvolutionalReconstructor(tokenizer, study.world.device)
    side = tokenizer.config.data.image_size
    indices, x = study.held_out_images(6, side)
    study.keep_images(f"{run}-{images}", originals=x, samples=candidate.reconstruct(x, indices).images.cpu())
    return {**about, **study.evaluate(candidate, side, SCALES[study.scale].images)}


def body(results: Results, plot: Path) -> str:
    rows = [{**row, "tflop": tflop(row, results["flops"])} for row in results["rows"]]
    columns = page.measured(rows)
    page.line_plots([page.panel(column, rows, "tflop", "TFLOP of training", 2) for column in columns], 3, plot)
    groups = page.groups_of([row for row in rows if row["share"] == 1])
    base = SCALES[results["scale"]].base
    images = base.trainer.duration.images(base.data.global_batch_size, 0)
    compute = {"TFLOP of training": lambda group: f"{group[0]['tflop']:.0f}"}
    parameters = {"M parameters": lambda group: f"{results['parameters'][group[0]['arm']] / 1e6:.2f}"}
    first = {**page.LABEL_AND_SEEDS, **parameters, **compute}
    alone = page.groups_of([row for row in rows if row["arm"].endswith("without")], "arm", "images")
    over = {**page.LABEL_AND_SEEDS, "images": lambda group: str(group[0]["images"]), **compute}
    rates = ", ".join(f"{kind} {rate:g}" for kind, rate in results["learning_rates"].items())
    return f"""\
Each trains on {images} images, the same in the same order, with {results["bits_per_pixel"]:.4g} bits a
pixel of one bottleneck and the same perceptual loss. FLOPs are counted, with those of the discriminator and of LPIPS.
Learning rates: {rates}. Means ± standard deviations over seeds, on {results["pictures"]} held-out images.
{page.feature_note(results)} s: median seconds of training.

{page.table(groups, columns, first=first, last=page.SECONDS)}
{comparisons(groups, columns)}
Over the training, without a discriminator:

{page.table(alone, columns, first=over)}"""


def tflop(row: Row, flops: Mapping[str, float]) -> float:
    """Training compute. ``flops`` of an image are means over a run, whose first half has no discriminator."""
    arm = row["arm"] if row["share"] > ADVERSARIAL_START else f"{row['arm'].partition('-')[0]}-without"
    return flops[arm] * row["images"] / 1e12


def comparisons(groups: Sequence[page.Group], columns: Sequence[page.Column]) -> str:
    """FlowMo against its peer without and with discriminators, and what each gains from one."""
    by_name = {group[0]["arm"]: group for group in groups}
    pairs = [(Arm("flowmo", one), Arm("convolutional", one)) for one in (False, True)]
    pairs += [(Arm(kind, True), Arm(kind, False)) for kind in RATES]
    known = [pair for pair in pairs if all(arm.name in by_name for arm in pair)]
    return "\n".join(page.comparison(by_name[a.name], by_name[b.name], columns) for a, b in known)
