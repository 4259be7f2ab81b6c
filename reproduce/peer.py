"""FlowMo against a convolutional, adversarially trained tokenizer (table 1).

Reproduces table 1's question with all else equal. Both see the same images in the same order, have the same bits of the
same bottleneck, and equal parameters and training FLOPs, both counted. Each tries the same learning rates on equal
shares of these FLOPs, measured on training images; the best one then trains at every seed.

Cost: smoke half a minute. cpu 80 minutes on one core, 20 of them for learning rates. gpu 15 minutes on one H100, by
arithmetic at a fifth of its peak. paper two trainings of 1600 hours on one H100, by arithmetic at 40 % of its peak, and
a twentieth for learning rates.
Expect: at scale cpu, the convolutional tokenizer wins every metric. The paper's FlowMo wins at its size.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmo.config import Config
from flowmo.data import open_source
from flowmo.evaluate.reconstruction import FlowMoReconstructor
from flowmo.losses.perceptual import build_distance
from flowmo.tokenizer import FlowMo
from flowmo.train.cost import run_flops
from reproduce import StudyError, page
from reproduce.adversarial import STATE, train_peer
from reproduce.bases import GPU_LONG, PAPER_LO, SMOKE_ABLATION, TINY_LONG
from reproduce.convolutional import ConvolutionalReconstructor, ConvolutionalTokenizer, fitting_width, step_flops
from reproduce.page import Column
from reproduce.runner import Results, Row, Rows, Scale, Study

SCALES = {
    "smoke": Scale(base=SMOKE_ABLATION, images=4, rates=(1e-3,), trial=1.0),
    "cpu": Scale(base=TINY_LONG, seeds=2, images=200, rates=(5e-4, 1e-3, 2e-3), trial=0.2),
    "gpu": Scale(base=GPU_LONG, seeds=2, images=1000, rates=(3e-4, 1e-3), trial=0.2),
    "paper": Scale(base=PAPER_LO.override("data.max_microbatch=32"), images=50_000, rates=(1e-4, 2e-4), trial=0.02),
}
"""Both try the learning ``rates`` for the share ``trial`` of the training."""
KINDS = {"flowmo": "FlowMo", "convolutional": "convolutional, adversarial"}
TIMED = 16
"""Images that are decoded in one batch, and one by one, for their time."""
TIMES = (
    Column("decode_alone", "decoding alone (ms) ↓", 2),
    Column("decode_together", f"in batches of {TIMED} (ms) ↓", 2),
)


def match(config: Config, study: Study) -> Row:
    """Equal conditions: the peer's ``width``, and by kind the ``images``, ``parameters`` and training ``flops``.

    Raises:
        StudyError: the study runs under torchrun, and the peer trains in one process.
    """
    if study.world.size > 1:
        raise StudyError("The convolutional peer trains in one process. Start the study without torchrun.")
    parameters = sum(p.numel() for p in FlowMo(config).parameters())
    width = fitting_width(config, parameters)
    theirs = sum(p.numel() for p in ConvolutionalTokenizer(config, width).parameters())
    perceptual = build_distance(config.opt.lpips_mode) if config.opt.lpips_weight else None
    own, flops = run_flops(config, len(open_source(study.data)))
    their_cost = step_flops(ConvolutionalTokenizer(config, width), perceptual)
    batch = config.data.global_batch_size
    equal = max(round(flops / their_cost / batch), 1) * batch
    return {
        "width": width,
        "images": {"flowmo": own, "convolutional": equal},
        "flops": {"flowmo": flops, "convolutional": equal * their_cost},
        "parameters": {"flowmo": parameters, "convolutional": theirs},
    }


def rows(study: Study, metadata: Row) -> Rows:
    scale = SCALES[study.scale]
    equal = match(scale.base, study)
    rates = {kind: best_rate(kind, equal, study) for kind in KINDS}
    metadata |= {"rates": list(scale.rates), "chosen": rates, "trial": scale.trial}
    metadata |= {key: equal[key] for key in ("parameters", "flops", "images")}
    metadata["bits_per_pixel"] = scale.base.bits_per_pixel
    for seed in range(1, scale.seeds + 1):
        for kind, label in KINDS.items():
            about, run = {"arm": kind, "label": label, "seed": seed}, f"{kind}-seed{seed}"
            yield study.once(run, partial(train_and_measure, kind, run, rates[kind], seed, equal, study, about))


def best_rate(kind: str, equal: Row, study: Study) -> float:
    """The learning rate whose trial has the best AlexNet LPIPS on training images, or PSNR where LPIPS is missing."""
    scale = SCALES[study.scale]
    if len(scale.rates) == 1:
        return scale.rates[0]
    on_training, found = replace(study, held_out=study.data), {}
    for rate in scale.rates:
        run = f"trial-{kind}-{rate:g}"
        make = partial(train_and_measure, kind, run, rate, 0, equal, on_training, {"rate": rate}, scale.trial)
        row = study.once(run, make)
        found[rate] = row["psnr"] if row["lpips_alex"] is None else -row["lpips_alex"]
        study.delete_checkpoints(run)
        (study.folder(run) / STATE).unlink(missing_ok=True)
    return max(found, key=found.__getitem__)


def train_and_measure(
    kind: str, run: str, rate: float, seed: int, equal: Row, study: Study, about: Mapping[str, Any], share: float = 1
) -> Row:
    """Train one tokenizer for a share of its images and measure it, with the time of decoding."""
    scale, device = SCALES[study.scale], study.world.device
    duration = f"trainer.duration={round(share * equal['images'][kind])} images"
    config = scale.base.override(f"opt.lr={rate}", f"trainer.seed={seed}", duration)
    if kind == "flowmo":
        trained = study.train(config, run)
        tokenizer, seconds = study.load(trained.checkpoint), trained.seconds
        candidate = FlowMoReconstructor(tokenizer)
    else:
        tokenizer, seconds = train_peer(config, equal["width"], run, study)
        candidate = ConvolutionalReconstructor(tokenizer, device)
    side = config.data.image_size
    _, x = study.held_out_images(TIMED, side)
    made = candidate.reconstruct(x, range(len(x)))
    if made.ids is None:
        raise StudyError("Decoding is timed from ids, and this bottleneck has none. Choose one with ids.")
    study.keep_images(run, originals=x, samples=made.images.cpu())
    times = timed(tokenizer, made.ids.to(device))
    return {**about, "seconds": seconds, **times, **study.evaluate(candidate, side, scale.images)}


def timed(tokenizer: FlowMo | ConvolutionalTokenizer, ids: Tensor) -> dict[str, float]:
    """Milliseconds per image, the best of three: one by one, and in one batch."""

    def best(batch: Tensor) -> float:
        taken = []
        if isinstance(tokenizer, FlowMo):
            tokenizer.chunk_size = len(batch)  # it decodes chunks of this size, padded if need be
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            tokenizer.decode(batch)
            if batch.is_cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return 1000 * min(taken[1:]) / len(batch)

    return {"decode_alone": best(ids[:1]), "decode_together": best(ids)}


def body(results: Results, plot: Path) -> str:
    groups, columns = page.groups_of(results["rows"]), page.measured(results["rows"])
    page.dot_plots([groups], columns, plot)
    first = {
        **page.LABEL_AND_SEEDS,
        "M parameters": lambda group: f"{results['parameters'][group[0]['arm']] / 1e6:.2f}",
        "TFLOP of training": lambda group: f"{results['flops'][group[0]['arm']] / 1e12:.0f}",
        "images": lambda group: str(results["images"][group[0]["arm"]]),
    }
    rates = ", ".join(f"{rate:g}" for rate in results["rates"])
    chosen = ", ".join(f"{KINDS[kind]} {rate:g}" for kind, rate in results["chosen"].items())
    return f"""\
Both have {results["bits_per_pixel"]:.4g} bits per pixel of one bottleneck, the same images in the same order, equal
parameters and equal training FLOPs, both counted, including those of the discriminator and LPIPS. Learning rates, each
the best of {rates} in trials of {results["trial"]:.0%} of these FLOPs: {chosen}.
Means ± standard deviations over seeds, on {results["pictures"]} held-out images. {page.feature_note(results)}
Milliseconds per image.

{page.table(groups, [*columns, *TIMES], first=first)}
{page.comparison(*groups, (*columns, *TIMES), ("FlowMo", "its peer")) if len(groups) == 2 else ""}"""
