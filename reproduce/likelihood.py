"""Log-likelihood by the reverse ODE (section 3.4).

Reproduces a measurement that the paper names without a number: the likelihood of held-out images given their own code,
given another image's and given none, and of samples of their own code. The difference between codes, in bits, is what
a code is worth. An image of 256 levels has no density, so that a little of the path's own noise is mixed in, up to
t = ``START``; the likelihood is that of the mixture under the flow.

Cost: smoke a few seconds. cpu five minutes per model of 5 M parameters on two cores. gpu 5 minutes per model of 80 M
parameters on one H100, by arithmetic. paper a day per model of FlowMo-Lo's size on one H100, by arithmetic.
Expect: samples are likelier than images; a code of ``nano`` saves fewer bits over no code than it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flowmo.model import flow
from flowmo.model.sampler import image_seed, seeded_noise
from flowmo.streams import Stream, stream
from flowmo.tokenizer import FlowMo
from reproduce import page
from reproduce.page import Column
from reproduce.reverse_ode import bits_per_dimension, log_likelihood
from reproduce.runner import Results, Row, Rows, Scale, Study

TAKES_MODELS = True
SCALES = {
    "smoke": Scale(images=2, steps=2, probes=1),
    "cpu": Scale(images=32, steps=32, probes=2),
    "gpu": Scale(images=256, steps=100, probes=4),
    "paper": Scale(images=1000, steps=100, probes=4),
}
START = 0.05
"""The velocity of a decoder that predicts images is its error divided by t, which is stiff below this time."""
BATCH = 4
KINDS = {
    "own": "images, their own code",
    "other": "images, another image's code",
    "null": "images, no code",
    "sample": "samples, their own code",
}
COLUMNS = (Column("bits", "bits a number ↓", 3), Column("spread", "spread over images ↓", 3))


def rows(study: Study, metadata: Row) -> Rows:
    scale = SCALES[study.scale]
    metadata |= {"steps": scale.steps, "probes": scale.probes}
    for _, name, tokenizer in study.load_models(distilled=False):
        for kind in KINDS:
            if kind == "null" and not tokenizer.config.model.enable_cfg:
                study.report(f"{name} without a code is skipped: its training has no null code.")
                continue
            yield study.once(f"{name}-{kind}", partial(measure, name, kind, tokenizer, study))


def measure(name: str, kind: str, tokenizer: FlowMo, study: Study) -> Row:
    """Bits per number of held-out images, or of samples of their codes, given the code that ``kind`` names."""
    scale = SCALES[study.scale]
    indices, x = study.held_out_images(scale.images, tokenizer.config.data.image_size)
    codes = tokenizer.encode(x)
    code = codes.code if codes.ids is None else tokenizer.quantizer.code_from_ids(codes.ids)
    if kind == "sample":
        x = tokenizer.decode(codes, seed=[image_seed(0, index) for index in indices]).cpu()
    if kind == "other":
        code = code.roll(1, dims=0)
    noise = seeded_noise([image_seed(1, index) for index in indices], *x.shape[-2:])
    x_t = flow.interpolate(x, noise, torch.full((len(x),), START)).to(tokenizer.device)
    times = torch.linspace(START, 1, scale.steps + 1, dtype=torch.float64).tolist()
    generator = stream(0, Stream.PROBES)  # the same probes for every kind
    found = []
    for part, part_code in zip(x_t.split(BATCH), code.split(BATCH), strict=True):
        velocity = decoder_velocity(tokenizer, part_code, keep=kind != "null")
        found.append(log_likelihood(velocity, part, times, probes=scale.probes, generator=generator)[0].cpu())
    nats = torch.cat(found)
    bits = bits_per_dimension(nats, x[0].numel())
    return {
        **{"model": name, "arm": f"{name}-{kind}", "label": f"{name}: {KINDS[kind]}", "kind": kind},
        "bits": float(bits.mean()),
        "spread": float(bits.std()) if len(bits) > 1 else 0.0,
        "bits_of_picture": float(-nats.mean() / math.log(2)),
        "bits_of_code": tokenizer.config.bits_per_image,
    }


def decoder_velocity(tokenizer: FlowMo, code: Tensor, keep: bool) -> Callable[[Tensor, float], Tensor]:
    """The decoder's velocity field, given codes (b tokens channels) or, unless ``keep``, none."""
    decoder = tokenizer.decoder
    embedded = decoder.embed_code(code, torch.full((len(code),), keep, device=code.device))
    return lambda x, t: decoder(x, embedded, torch.full((1,), t, device=x.device))


def body(results: Results, plot: Path) -> str:
    groups = page.groups_of(results["rows"])
    page.dot_plots([groups], COLUMNS[:1], plot)
    return f"""\
{results["pictures"]} held-out images, {results["steps"]} steps of Heun's method from t = {START}, Hutchinson's estimate
of the divergence from {results["probes"]} probes, no guidance. Bits per number of an image of 256 levels.

{page.table(groups, COLUMNS, first={"": "label"})}
{worth(results["rows"])}"""


def worth(rows: Sequence[Row]) -> str:
    """Bits that a code saves over another image's and over none, beside the bits that it takes."""
    text = ""
    for group in page.groups_of(rows, "model"):
        bits, size = {row["kind"]: row["bits_of_picture"] for row in group}, group[0]["bits_of_code"]
        if not {"own", "other", "null"} <= bits.keys():
            continue
        saved, over_none = bits["other"] - bits["own"], bits["null"] - bits["own"]
        code = f"an image's code ({'continuous' if size is None else f'{size:g} bits'})"
        text += (
            f"- {group[0]['model']}: {code} saves {saved:.0f} bits over another image's, {over_none:.0f} over none.\n"
        )
    return text
