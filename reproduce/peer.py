"""FlowMo against a convolutional, adversarially trained tokenizer (table 1's question), with all else equal.

Both see the same pictures in the same order and make the same bits of the same bottleneck; their parameters are as many
and their training costs as many FLOPs, both counted. Each tries the same learning rates on equal shares of these FLOPs,
judged on training pictures, and is then trained with its best at every seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flowmo
from flowmo.config import Config, preset
from flowmo.data import open_source
from flowmo.evaluate.reconstruction import Evaluators, FlowMoReconstructor, Reconstructor
from flowmo.losses.perceptual import build_distance
from flowmo.tokenizer import FlowMo
from flowmo.train.cost import training_cost
from flowmo.train.schedule import Schedule
from reproduce import bases
from reproduce.adversarial import STATE, train_peer
from reproduce.bases import GPU_BASE, PAPERS_SAMPLER, SMOKE_BASE, TINY_BASE
from reproduce.convolutional import ConvolutionalReconstructor, ConvolutionalTokenizer, fitting_width, step_flops
from reproduce.page import (
    COLUMNS,
    Column,
    Group,
    bars,
    figures_table,
    gain,
    groups_of,
    held_out,
    in_words,
    judged_by,
    measured_columns,
    save_images,
    show_samples,
    versions_line,
    write_page,
)
from reproduce.study import (
    Place,
    StudyError,
    figures_of,
    forget_checkpoints,
    judged_count,
    once,
    read_results,
    train,
    write_results,
)

TITLE = "FlowMo against a convolutional, adversarially trained tokenizer (table 1)"
KINDS = {"flowmo": "FlowMo", "convolutional": "convolutional, adversarial"}
TIMED = 16
"""Pictures that are decoded at once, and one by one, for their time."""
TIMES = (
    Column("decode_alone", "decoding alone (ms) ↓", 2),
    Column("decode_together", f"in batches of {TIMED} (ms) ↓", 2),
)


@dataclass(frozen=True)
class Scale(bases.Scale):
    """How large the study is; ``base`` is the FlowMo, whose pictures and bits the peer takes over.

    Attributes:
        rates: learning rates that both try.
        trial: share of the length of a trial.
    """

    rates: tuple[float, ...]
    trial: float


SCALES = {
    "smoke": Scale(
        SMOKE_BASE.override(*PAPERS_SAMPLER, "eval.sampling.sample_steps=2"),
        *(1, 4),
        "half a minute on two CPU cores; its figures mean nothing",
        *((1e-3,), 1.0),
    ),
    "cpu": Scale(
        TINY_BASE.override("trainer.duration=900 steps"),
        *(2, 200),
        "80 minutes on one CPU core, 20 of them for learning rates; convolutions are as fast there as products",
        *((5e-4, 1e-3, 2e-3), 0.2),
    ),
    "gpu": Scale(
        GPU_BASE.override(*PAPERS_SAMPLER, "trainer.duration=6000 steps", "model.code_length=64"),
        *(2, 1000),
        "about 15 minutes on one H100 by arithmetic, at a fifth of its peak",
        *((3e-4, 1e-3), 0.2),
    ),
    "paper": Scale(
        preset("lo").override("data.global_batch_size=128"),
        *(1, 50_000),
        "two trainings of 1600 hours on one H100 at 40 % of its peak, by arithmetic, and a twentieth for rates",
        *((1e-4, 2e-4), 0.02),
    ),
}


@dataclass(frozen=True)
class Match:
    """What makes the fight fair: the peer's width and images, and what is counted of both."""

    width: int
    images: dict[str, int]
    parameters: dict[str, int]
    flops: dict[str, float]

    @classmethod
    def of(cls, config: Config, pictures: int) -> Match:
        """For ``config``, on a training set of so many pictures."""
        parameters = sum(p.numel() for p in FlowMo(config).parameters())
        width = fitting_width(config, parameters)
        perceptual = build_distance(config.opt.lpips_mode) if config.opt.lpips_weight else None
        costs = {"flowmo": training_cost(config).flops, "convolutional": step_flops(config, width, perceptual)}
        batch = config.data.global_batch_size
        own = Schedule.of(config, batch, pictures).duration
        equal = max(round(own * costs["flowmo"] / costs["convolutional"] / batch), 1) * batch
        images = {"flowmo": own, "convolutional": equal}
        theirs = sum(p.numel() for p in ConvolutionalTokenizer(config, width).parameters())
        return cls(
            width,
            images,
            {"flowmo": parameters, "convolutional": theirs},
            {kind: images[kind] * costs[kind] for kind in KINDS},
        )


def run(place: Place, judges: Evaluators) -> None:
    """Match, tune, train, measure and draw; what is already there is not made again."""
    if place.world.size > 1:
        raise StudyError("the peer is trained by one process; start the study without torchrun")
    scale = SCALES[place.scale]
    match = Match.of(scale.base, len(open_source(place.train)))
    rates = {kind: best_rate(kind, match, place, judges) for kind in KINDS}
    rows: list[dict[str, Any]] = []
    for seed in range(1, scale.seeds + 1):
        for kind in KINDS:
            name = f"{kind}-seed{seed}"
            settings = (f"opt.lr={rates[kind]}", f"trainer.seed={seed}")
            facts = {"arm": kind, "label": KINDS[kind], "seed": seed}
            make = partial(make_row, facts, settings, match, name, place, judges)
            rows.append(once(name, place, make))
            counted = {"parameters": match.parameters, "flops": match.flops, "images": match.images}
            facts = {"rates": list(scale.rates), "chosen": rates, "trial": scale.trial, **counted}
            bits = scale.base.bits_per_pixel
            write_results(
                place, {"pictures": judged_count(place, scale.pictures), "bits_per_pixel": bits, **facts}, rows
            )
    if place.world.main:
        show_samples(rows, "flowmo-seed1", place)
        draw(place)


def best_rate(kind: str, match: Match, place: Place, judges: Evaluators) -> float:
    """The learning rate whose trial makes the best of training pictures, by AlexNet's LPIPS, or PSNR without it."""
    scale = SCALES[place.scale]
    if len(scale.rates) == 1:
        return scale.rates[0]
    there, found = replace(place, held_out=place.train), {}
    for rate in scale.rates:
        name = f"trial-{kind}-{rate:g}"
        settings = (f"opt.lr={rate}", "trainer.seed=0")
        row = once(name, there, partial(make_row, {"rate": rate}, settings, match, name, there, judges, scale.trial))
        found[rate] = row["psnr"] if row["lpips_alex"] is None else -row["lpips_alex"]
        forget(name, place)
    return max(found, key=found.__getitem__)


def make_row(
    facts: dict[str, Any],
    settings: tuple[str, ...],
    match: Match,
    name: str,
    place: Place,
    judges: Evaluators,
    share: float = 1.0,
) -> dict[str, Any]:
    """Train one tokenizer of the kind that ``name`` holds, for a share of its images, and measure it."""
    scale, device = SCALES[place.scale], place.world.device
    kind = next(kind for kind in KINDS if kind in name)
    config = scale.base.override(*settings, f"trainer.duration={round(share * match.images[kind])} images")
    if kind == "flowmo":
        trained = train(config, name, place)
        tokenizer, seconds = flowmo.load(trained.checkpoint, device=str(device)), trained.seconds
        candidate: Reconstructor = FlowMoReconstructor(tokenizer)
        decode = partial(decode_flowmo, tokenizer)
    else:
        peer, seconds = train_peer(config, match.width, name, place)
        candidate = ConvolutionalReconstructor(peer, device)
        decode = peer.decode
    side = config.data.image_size
    _, x = held_out(place, TIMED, side)
    made = candidate.reconstruct(x, range(len(x)))
    if made.ids is None:
        raise StudyError("decoding is timed from ids, and this bottleneck has none")
    save_images({"originals": x[:6], "samples": made.images[:6].cpu()}, name, place)
    figures = figures_of(candidate, side, place, judges, scale.pictures)
    return {**facts, "seconds": seconds, **timed(decode, made.ids.to(device)), **figures}


def decode_flowmo(tokenizer: FlowMo, ids: Tensor) -> Tensor:
    tokenizer.chunk_size = len(ids)
    return tokenizer.decode(ids)


def timed(decode: Callable[[Tensor], Tensor], ids: Tensor) -> dict[str, float]:
    """Milliseconds a picture, the best of three: one by one, and all together."""

    def best(batch: Tensor) -> float:
        taken = []
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            decode(batch)
            if batch.is_cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return 1000 * min(taken[1:]) / len(batch)

    return {"decode_alone": best(ids[:1]), "decode_together": best(ids)}


def forget(name: str, place: Place) -> None:
    forget_checkpoints(name, place)
    if place.world.main:
        (place.folder(name) / STATE).unlink(missing_ok=True)


def draw(place: Place) -> None:
    """The table and the plot of the results in ``place.out``."""
    results = read_results(place)
    groups = groups_of(results["rows"])
    columns = measured_columns(results["rows"])
    bars(groups, columns, place)
    told = {
        "": lambda group: group[0]["label"],
        "seeds": lambda group: str(len(group)),
        "M parameters": lambda group: f"{results['parameters'][group[0]['arm']] / 1e6:.2f}",
        "TFLOP of training": lambda group: f"{results['flops'][group[0]['arm']] / 1e12:.0f}",
        "images": lambda group: str(results["images"][group[0]["arm"]]),
    }
    rates = ", ".join(f"{rate:g}" for rate in results["rates"])
    chosen = ", ".join(f"{KINDS[kind]} {rate:g}" for kind, rate in results["chosen"].items())
    text = f"""# Study: {TITLE}, at scale `{place.scale}`

    python -m reproduce {place.name} --scale {place.scale} --data PICTURES --held-out HELD_OUT

Both with {results["bits_per_pixel"]:.4g} bits a pixel of one bottleneck, the same pictures in the same order, equal
parameters and equal FLOPs of training, both counted, the discriminator's and LPIPS's among them. Learning rates, each
the best of {rates} in trials of {results["trial"]:.0%} of these FLOPs: {chosen}.
Means ± standard deviations over seeds of the figures on {results["pictures"]} pictures that nothing was trained on.
{judged_by(results)} Milliseconds a picture on {results["machine"]}.

{figures_table(groups, [*columns, *TIMES], first=told)}
{verdict(groups)}
![figures of both]({place.stem}.png)

{versions_line(results)}
"""
    write_page(place, text)


def verdict(groups: Sequence[Group]) -> str:
    """Who wins which figure."""
    ours, peer = groups
    lines = []
    for column in (*COLUMNS, *TIMES):
        found = gain(ours, peer, column)
        if found is not None:
            better, spread = found
            by = f"{abs(better):.{column.places}f} (spread {spread:.{column.places}f})"
            lines.append(f"- {column.name}: FlowMo is {in_words(better, spread)} its peer, by {by}.")
    return "\n".join(lines) + "\n"
