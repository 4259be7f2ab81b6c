"""Log-likelihood by the reverse ODE (section 3.4): what does a code tell of its picture, and are samples likelier?

The likelihood of held-out pictures given their own code, given another picture's and given no code; and of samples of
their code. What a code is worth is the difference in bits to another's, beside the bits that it takes.

Notable: a picture of 256 levels has no density. A little of the path's own noise is mixed in, up to t = ``START``, and
the likelihood is that of the mixture under the flow there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowmo.evaluate.reconstruction import Evaluators
from flowmo.model import flow
from flowmo.model.likelihood import bits_per_number, log_likelihood
from flowmo.model.sampler import image_seed, seeded_noise
from flowmo.model.transformer import MIN_PREDICTION_TIME
from flowmo.streams import Stream, stream
from flowmo.tokenizer import FlowMo
from reproduce.page import (
    Column,
    bars,
    figures_table,
    groups_of,
    held_out,
    versions_line,
    write_page,
)
from reproduce.study import Place, judged_count, named_models, once, read_results, write_results

TITLE = "log-likelihood by the reverse ODE (section 3.4)"
START = MIN_PREDICTION_TIME
"""Below it the velocity of a decoder that predicts pictures is damped, and no flow of densities."""

BATCH = 4
KINDS = {
    "own": "pictures, their own code",
    "other": "pictures, another picture's code",
    "null": "pictures, no code",
    "sample": "samples, their own code",
}
COLUMNS = (Column("bits", "bits a number ↓", 3), Column("spread", "spread over pictures ↓", 3))


@dataclass(frozen=True)
class Scale:
    """How large the study is: held-out pictures, steps of the ODE, probes of the divergence; and what it takes."""

    pictures: int
    steps: int
    probes: int
    cost: str


SCALES = {
    "smoke": Scale(2, 2, 1, "a few seconds on two CPU cores; its figures mean nothing"),
    "cpu": Scale(32, 32, 2, "five minutes a model of 5 M parameters on two CPU cores"),
    "gpu": Scale(256, 100, 4, "about 5 minutes a model of 80 M parameters on one H100, by arithmetic"),
    "paper": Scale(1000, 100, 4, "a day a model of FlowMo-Lo's size on one H100, by arithmetic"),
}


def run(place: Place, judges: Evaluators) -> None:
    """Measure what is not there; draw."""
    scale = SCALES[place.scale]
    rows: list[dict[str, Any]] = []
    for name, tokenizer in named_models(place):
        if tokenizer.config.model.mean_velocity:
            place.report(f"{name} is distilled: it has no velocity at a time, and is left out")
            continue
        for kind in KINDS:

            def make(tokenizer: FlowMo = tokenizer, kind: str = kind, name: str = name) -> dict[str, Any]:
                facts = {"model": name, "arm": f"{name}-{kind}", "label": f"{name}: {KINDS[kind]}", "kind": kind}
                return {**facts, **likelihood(tokenizer, kind, scale, place)}

            rows.append(once(f"{name}-{kind}", place, make))
            facts = {"pictures": judged_count(place, scale.pictures), "steps": scale.steps, "probes": scale.probes}
            write_results(place, facts, rows)
    if place.world.main:
        draw(place)


def likelihood(tokenizer: FlowMo, kind: str, scale: Scale, place: Place) -> dict[str, Any]:
    """Bits a number of held-out pictures, or of samples of their codes, given what ``kind`` says."""
    indices, x = held_out(place, scale.pictures, tokenizer.config.data.image_size)
    codes = tokenizer.encode(x)
    code = codes.code if codes.ids is None else tokenizer.quantizer.code_from_ids(codes.ids)
    if kind == "sample":
        x = tokenizer.decode(codes, seed=[image_seed(0, index) for index in indices]).cpu()
    if kind == "other":
        code = code.roll(1, dims=0)
    noise = seeded_noise([image_seed(1, index) for index in indices], *x.shape[-2:])
    x_t = flow.interpolate(x, noise, torch.full((len(x),), START)).to(tokenizer.device)
    generator = stream(0, Stream.PROBES)  # the same signs for every kind
    found = []
    for start in range(0, len(x_t), BATCH):
        rows = slice(start, start + BATCH)
        velocity_of = velocity(tokenizer, code[rows], keep=kind != "null")
        times = torch.linspace(START, 1, scale.steps + 1, dtype=torch.float64).tolist()
        nats, _ = log_likelihood(velocity_of, x_t[rows], times, probes=scale.probes, generator=generator)
        found.append(nats.cpu())
    nats = torch.cat(found)
    bits = bits_per_number(nats, x[0].numel())
    return {
        "bits": float(bits.mean()),
        "spread": float(bits.std()) if len(bits) > 1 else 0.0,
        "bits_of_picture": float(-nats.mean() / math.log(2)),
        "bits_of_code": tokenizer.config.bits_per_image,
    }


def velocity(tokenizer: FlowMo, code: Tensor, keep: bool) -> Any:
    """The decoder's velocity at any t for codes b × tokens × channels, or for none."""
    decoder = tokenizer.decoder
    embedded = decoder.embed_code(code, torch.full((len(code),), keep, device=code.device))

    def at(x: Tensor, t: float) -> Tensor:
        return decoder(x, embedded, decoder.modulate(torch.full((1,), t, device=x.device)))

    return at


def draw(place: Place) -> None:
    """The table and the plot of the results in ``place.out``."""
    results = read_results(place)
    groups = groups_of(results["rows"])
    bars(groups, COLUMNS[:1], place)
    text = f"""# Study: {TITLE}, at scale `{place.scale}`

    python -m reproduce {place.name} --scale {place.scale} --data PICTURES --held-out HELD_OUT --models MODEL ...

{results["pictures"]} held-out pictures, {results["steps"]} steps of Heun's method from t = {START}, Hutchinson's
estimate of the divergence from {results["probes"]} probes, no guidance. Bits a number of a picture of 256 levels.

{figures_table(groups, COLUMNS, first={"": lambda group: group[0]["label"]})}
{worth(results["rows"])}
![bits a number]({place.stem}.png)

{versions_line(results)}
"""
    write_page(place, text)


def worth(rows: list[dict[str, Any]]) -> str:
    """What a code saves over another's, and over none, beside what it takes."""
    lines = []
    for group in groups_of(rows, "model"):
        bits = {row["kind"]: row["bits_of_picture"] for row in group}
        takes = group[0]["bits_of_code"]
        size = "continuous" if takes is None else f"{takes:g} bits"
        lines.append(
            f"- {group[0]['model']}: a picture's code ({size}) saves {bits['other'] - bits['own']:.0f} bits over "
            f"another picture's, {bits['null'] - bits['own']:.0f} bits over none."
        )
    return "\n".join(lines) + "\n"
