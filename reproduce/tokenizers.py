"""Which tokenizer a generator draws best from (table 2's question), at equal bits and with all else equal.

A FlowMo after stage 1A alone, the same one after stage 1B, and a convolutional, adversarial tokenizer of the bits,
parameters and training FLOPs of stage 1A. On the ids of each the same MaskGiT learns from several seeds, and what it
draws is compared with the training pictures, beside what the tokenizer itself makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import flowmo
from flowmo.config import Config, preset
from flowmo.data import open_source
from flowmo.evaluate.reconstruction import Evaluators
from flowmo.generate.classes import class_titles
from flowmo.generate.samples import SampleSettings
from flowmo.train.state import read_metadata
from reproduce import bases
from reproduce.adversarial import train_peer
from reproduce.bases import GPU_BASE, PAPERS_SAMPLER, SMOKE_BASE, TINY_BASE
from reproduce.generation import (
    COLUMNS,
    Judge,
    Tokenizer,
    generated,
    judged,
    make_tokens,
    reconstructions,
    train_generator,
)
from reproduce.page import (
    Column,
    Group,
    bars,
    figures_table,
    gain,
    groups_of,
    in_words,
    markdown_table,
    measured_columns,
    versions_line,
    write_page,
)
from reproduce.peer import Match
from reproduce.posttrain import DISTANCE
from reproduce.study import Place, StudyError, read_results, train, write_results

TITLE = "what one generator draws from the ids of several tokenizers (table 2)"
KINDS = {
    "pretrained": "FlowMo, stage 1A alone",
    "posttrained": "FlowMo, stages 1A and 1B",
    "convolutional": "convolutional, adversarial",
}
BITS = Column("cross_entropy", "bits to predict a hidden id ↓", 2, 1 / math.log(2))


@dataclass(frozen=True)
class Scale(bases.Scale):
    """How large the study is; ``base`` is the FlowMo, whose bits and training the others take over.

    Attributes:
        peer_rate: learning rate of the convolutional tokenizer.
        posttraining: images of stage 1B.
        generator: the network and its training; ``seeds`` of it.
        steps: of drawing.
    """

    peer_rate: float
    posttraining: int
    generator: Config
    steps: int


NANO = preset("maskgit_nano").override("trainer.tensorboard=false", "trainer.sample_every=0", "data.num_workers=0")
SCALES = {
    "smoke": Scale(
        SMOKE_BASE.override(*PAPERS_SAMPLER, "eval.sampling.sample_steps=2"),
        *(1, 6),
        "half a minute on two CPU cores; its figures mean nothing",
        *(1e-3, 4),
        NANO.override(
            *("generator.hidden_size=32", "generator.depth=1", "generator.num_heads=2", "data.global_batch_size=4"),
            *("trainer.duration=2 steps", "trainer.log_every=1 step", "opt.warmup=0"),
        ),
        2,
    ),
    "cpu": Scale(
        TINY_BASE.override("trainer.duration=900 steps"),
        *(2, 300),
        "an hour and a half on one CPU core",
        *(2e-3, 2048),
        NANO.override(
            *("generator.depth=4", "trainer.duration=19200 images", "trainer.log_every=640 images"),
            *("trainer.checkpoint_every=3200 images", "opt.warmup=3200 images"),
        ),
        12,
    ),
    "gpu": Scale(
        GPU_BASE.override(*PAPERS_SAMPLER, "trainer.duration=6000 steps", "model.code_length=64"),
        *(2, 2000),
        "about 25 minutes on one H100, by arithmetic",
        *(1e-3, 16384),
        NANO.override(
            *("generator.hidden_size=512", "generator.depth=8", "generator.num_heads=8", "data.global_batch_size=128"),
            *("trainer.duration=500k images", "opt.lr=5e-4", "trainer.compile=true"),
        ),
        64,
    ),
    "paper": Scale(
        preset("lo").override("data.global_batch_size=128"),
        *(1, 50_000),
        "two tokenizers of 1600 hours on one H100 at 40 % of its peak and three generators of 320, by arithmetic",
        *(1e-4, 1_281_167),
        preset("maskgit"),
        64,
    ),
}
POSTTRAINED = (
    *("model.posttrain_sample=true", "opt.freeze_encoder_after=0", "opt.lr=1e-4", "opt.warmup=0", "opt.cooldown=0"),
    *("model.ema_decay=0.987", f"opt.lpips_mode={DISTANCE}", "opt.lpips_weight=0.01"),
)
"""Stage 1B as in the study ``posttrain``, at the paper's weight."""


def run(place: Place, judges: Evaluators) -> None:
    """Train tokenizers, then generators, draw and measure; what is already there is not made again."""
    if place.world.size > 1:
        raise StudyError("the peer is trained by one process; start the study without torchrun")
    scale = SCALES[place.scale]
    judge = Judge(place, judges, scale.pictures, scale.base.data.image_size)
    match = Match.of(scale.base, len(open_source(place.train)))
    facts = {
        **{"pictures": scale.pictures, "steps": scale.steps, "posttraining": scale.posttraining},
        **{"bits_per_picture": scale.base.bits_per_image, "side": scale.base.data.image_size},
        **{"classes": [*class_titles(judge.classes)], "match": asdict(match)},
        **{"generator": scale.generator.to_dict()["generator"], "judges": judges.describe()},
        "rates": [scale.base.opt.lr, scale.peer_rate],
    }
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        for row in study_tokenizer(kind, match, judge, place):
            rows.append(row)
            write_results(place, facts, rows)
    draw(place)


def study_tokenizer(kind: str, match: Match, judge: Judge, place: Place) -> Iterator[dict[str, Any]]:
    """The tokenizer's own pictures, then those of a generator a seed."""
    scale = SCALES[place.scale]
    tokenizer = train_tokenizer(kind, match, place)
    facts = {"arm": kind, "tokenizer": tokenizer.identity()}
    make = partial(reconstructions, tokenizer, judge.originals, judge.places)
    yield judged(f"{kind}-reconstructed", KINDS[kind], judge, place, make, kind="reconstructed", **facts)
    tokens = make_tokens(tokenizer, kind, place)
    for seed in range(1, scale.seeds + 1):
        name = f"{kind}-generator-seed{seed}"
        generator, nats = train_generator(scale.generator.override(f"trainer.seed={seed}"), name, tokens)
        drawing = SampleSettings(seed=seed, steps=scale.steps)
        make = partial(generated, generator, tokenizer, judge.evenly(), drawing, place)
        yield judged(name, KINDS[kind], judge, place, make, kind="generated", seed=seed, cross_entropy=nats, **facts)


def train_tokenizer(kind: str, match: Match, place: Place) -> Tokenizer:
    scale, device = SCALES[place.scale], str(place.world.device)
    if kind == "convolutional":
        config = scale.base.override(
            f"opt.lr={scale.peer_rate}", f"trainer.duration={match.images['convolutional']} images"
        )
        peer, _ = train_peer(config, match.width, kind, place)
        return peer.eval().requires_grad_(False)
    base = train(scale.base, "pretrained", place).checkpoint
    if kind == "pretrained":
        return flowmo.load(base, device=device)
    length = f"trainer.duration={read_metadata(base)['images'] + scale.posttraining} images"
    return flowmo.load(train(scale.base.override(*POSTTRAINED, length), kind, place, base).checkpoint, device=device)


def draw(place: Place) -> None:
    """The tables and the plot of the results in ``place.out``."""
    results = read_results(place)
    found = {kind: groups_of([row for row in results["rows"] if row["kind"] == kind]) for kind in WORDS}
    columns = measured_columns(results["rows"], COLUMNS)
    bars(found["generated"], [*columns, BITS], place)
    network, match, rates = results["generator"], results["match"], results["rates"]
    sizes = [
        (KINDS[kind], f"{match['parameters'][of] / 1e6:.2f}", f"{match['flops'][of] / 1e12:.0f}", match["images"][of])
        for kind, of in (("pretrained", "flowmo"), ("convolutional", "convolutional"))
    ]
    header = ("tokenizer", "M parameters", "TFLOP of training", "images")
    text = f"""# Study: {TITLE}, at scale `{place.scale}`

    python -m reproduce {place.name} --scale {place.scale} --data PICTURES --held-out HELD_OUT

{results["bits_per_picture"]:g} bits a picture of {results["side"]} × {results["side"]} pixels, of one bottleneck.
Learning rates: FlowMo {rates[0]:g}, its peer {rates[1]:g}, at scale `cpu` those that the study `peer` chose.

{markdown_table(header, ([str(value) for value in size] for size in sizes))}
Stage 1B: {results["posttraining"]} images more, for the decoder alone. Generators of {network["depth"]} blocks of width
{network["hidden_size"]}, all trained alike on the ids of PICTURES and their mirror images, the checkpoint that predicts
the ids of HELD_OUT best; {results["steps"]} steps a picture, the preset's temperatures, guidance and order. Each row:
{results["pictures"]} pictures against as many of PICTURES; a Fréchet distance of so few is too large, so compare within
this page only ({results["rows"][0]["feature_network"]}). Means ± standard deviations over seeds of the generator; each
tokenizer was trained once. Class recognised: by MobileNet V2 (ImageNet, torchvision's weights), among
{", ".join(results["classes"])}; chance is {1 / len(results["classes"]):.2f}.

{tables(found, columns)}
{verdict(found["generated"], columns)}
![figures of what was drawn from each]({place.stem}.png)

{results["machine"]}, {versions_line(results)}
"""
    write_page(place, text)


WORDS = {
    "reconstructed": "What each tokenizer makes of the training pictures",
    "generated": "What generators draw",
}


def tables(found: Mapping[str, Sequence[Group]], columns: Sequence[Column]) -> str:
    first: dict[str, Callable[[Group], str]] = {"": lambda group: group[0]["label"]}
    more = {"reconstructed": (first, columns)}
    more["generated"] = ({**first, "seeds": lambda group: str(len(group))}, [*columns, BITS])
    return "\n".join(
        f"{words}:\n\n{figures_table(found[kind], more[kind][1], first=more[kind][0])}" for kind, words in WORDS.items()
    )


def verdict(groups: Sequence[Group], columns: Sequence[Column]) -> str:
    """What stage 1B, and another kind of tokenizer, change in what is drawn."""
    if len(groups) < len(KINDS):  # a study that is not done
        return ""
    base, *others = groups
    lines = []
    for group in others:
        for column in columns:
            change = gain(group, base, column)
            if change is not None:
                better, spread = change
                words = in_words(better, spread)
                by = ": a difference of" if words == "not apart from" else ", by"
                size = f"{abs(better):.{column.places}f} (spread {spread:.{column.places}f})"
                lines.append(f"- {column.name}: {group[0]['label']} is {words} {base[0]['label']}{by} {size}.")
    return "\n".join(lines) + "\n"
