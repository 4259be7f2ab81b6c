"""Images from tokens (section 4.1).

Reproduces a MaskGIT on a tokenizer's ids. What it draws is compared with the training images, beside the tokenizer's
own reconstructions (the best to expect), held-out images (another sample of the same kind), and ids drawn independently
from their frequencies (what a generator must beat). A classifier says whether the class shows. Temperature and guidance
are swept; the best pair is drawn again in Halton order and with bit tokens. The recipe ``tokenizers`` asks table 2's
own question.

Cost: smoke half a minute. cpu two and a half hours on one core. gpu 25 minutes on one H100, by arithmetic. paper 300
epochs of ImageNet: 40 hours on 8 H100, by arithmetic at 40 % of their peak.
Expect: at scale cpu, a Fréchet distance halfway between reconstructions and independent ids; a third shows its class.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flowmo.config import preset
from flowmo.data.tokens import TokenDataset
from flowmo.generate.generator import Generator
from flowmo.tokenizer import FlowMo
from reproduce import generation, page
from reproduce.bases import CPU_GENERATOR, GPU_GENERATOR, SMOKE_GENERATOR
from reproduce.generation import COLUMNS, GenerationEvaluator, LabelledImages
from reproduce.runner import Results, Row, Rows, Scale, Study

TAKES_MODELS = True
LEVELS = {"others": "held-out", "floor": "reconstructions", "ceiling": "independent ids"}
"""Kinds of rows that the plot shows as levels."""
FALLING = 0.4
"""The last step's temperature, as a share of the first's."""
CPU = CPU_GENERATOR.override("trainer.duration=32k images")
GPU = GPU_GENERATOR.override("generator.depth=12", "trainer.duration=2M images")
SCALES = {
    "smoke": Scale(generator=SMOKE_GENERATOR, images=6, steps=2, temperatures=(1.0,), guidances=(1.5,)),
    "cpu": Scale(generator=CPU, images=300, steps=12, temperatures=(0.7, 1.0, 1.3), guidances=(1.0, 1.5, 3.0)),
    "gpu": Scale(generator=GPU, images=5000, steps=64, temperatures=(0.7, 1.0, 1.3, 1.6), guidances=(1.0, 1.5, 3.0)),
    "paper": Scale(
        generator=preset("maskgit"), images=50_000, steps=64, temperatures=(1.0, 1.3, 1.6), guidances=(1.0, 1.5, 2.5)
    ),
}
"""A guidance of 2.5 is the paper's 1.5, which counts from the class."""


def rows(study: Study, metadata: Row) -> Rows:
    scale = SCALES[study.scale]
    metadata |= {"steps": scale.steps, "falling": FALLING, "models": list(study.models)}
    for number, (_, name, tokenizer) in enumerate(study.load_models()):
        evaluator = GenerationEvaluator(study, scale.images, tokenizer.config.data.image_size)
        metadata |= evaluator.metadata(scale.generator)
        yield from tokenizer_rows(name, tokenizer, evaluator, study, bit_tokens=number == 0)


def tokenizer_rows(
    name: str, tokenizer: FlowMo, evaluator: GenerationEvaluator, study: Study, bit_tokens: bool
) -> Rows:
    """All rows of one tokenizer."""
    scale, tokens = SCALES[study.scale], generation.make_tokens(tokenizer, name, study)

    def row(kind: str, label: str, make: Callable[[], LabelledImages], **about: Any) -> Row:
        return evaluator.once(f"{name}-{kind}", label, make, tokenizer=name, kind=kind, **about)

    originals, ids = evaluator.originals, TokenDataset(tokens.data, tokenizer.identity())
    yield row("originals", "the training pictures themselves", lambda: originals)
    yield row("others", "held-out pictures", lambda: evaluator.others)
    make = partial(generation.reconstructions, tokenizer, evaluator)
    yield row("floor", "reconstructions of training pictures", make)
    make = partial(generation.independent_ids, tokenizer, ids, originals.labels)
    yield row("ceiling", "each id by its frequency at its position", make)

    def drawn(trained: tuple[Generator, float], kind: str, label: str, **settings: Any) -> Row:
        generator, nats = trained
        labels = evaluator.balanced_labels()
        make = partial(generation.generated, generator, tokenizer, labels, study, steps=scale.steps, **settings)
        return row(kind, label, make, cross_entropy=nats, **settings)

    table, swept = generation.train_generator(scale.generator, f"{name}-table", tokens), []
    for temperature, guidance in itertools.product(scale.temperatures, scale.guidances):
        settings = {"temperature": temperature, "last_temperature": temperature * FALLING, "guidance": guidance}
        label, kind = f"temperature {temperature:g}, guidance {guidance:g}", f"t{temperature:g}-g{guidance:g}"
        swept.append({**drawn(table, kind, label, **settings, order="confidence"), "swept": True})
        yield swept[-1]
    best = min(swept, key=lambda row: row["frechet_distance"])
    settings = {key: best[key] for key in ("temperature", "last_temperature", "guidance")}
    yield drawn(table, "halton", f"Halton order, {best['label']}", **settings, order="halton")
    if bit_tokens:
        config = scale.generator.override("generator.bit_tokens=true")
        bits = generation.train_generator(config, f"{name}-bits", tokens)
        yield drawn(bits, "bits", f"bit tokens, {best['label']}", **settings, order="confidence")


def body(results: Results, plot: Path) -> str:
    rows, network = results["rows"], results["generator"]
    mine = page.groups_of(rows, "tokenizer")[0]
    curves = [{**row, "curve": LEVELS[row["kind"]]} for row in mine if row["kind"] in LEVELS]
    curves += [{**row, "curve": f"guidance {row['guidance']:g}"} for row in mine if row.get("swept")]
    shown = page.measured(rows, (COLUMNS[0], COLUMNS[-1]))
    page.line_plots([page.panel(c, curves, "temperature", "temperature of the first step") for c in shown], 2, plot)
    first = {"tokenizer": "tokenizer", "": "label"} if len(page.groups_of(rows, "tokenizer")) > 1 else {"": "label"}
    return f"""\
A generator of {network["depth"]} blocks of width {network["hidden_size"]}, trained on the ids of IMAGES and their
mirror images; the checkpoint that predicts the ids of HELD_OUT best; {results["steps"]} steps per image; one seed. The
last step's temperature is {results["falling"]:g} times the first's. Held-out images show how large the distance of two
samples of the same kind is. {generation.page_note(results)}

{page.table([[row] for row in rows], page.measured(rows, COLUMNS), first=first)}
{cross_entropies(rows)}"""


def cross_entropies(rows: Sequence[Row]) -> str:
    """How well each generator predicts held-out ids."""
    found: dict[tuple[str, str], str] = {}
    for row in rows:
        if "cross_entropy" in row:
            variant = "bit tokens" if row["kind"] == "bits" else "a table of ids"
            found[row["tokenizer"], variant] = f"{row['cross_entropy']:.3f}"
    header = ("tokenizer", "generator", "held-out nats a masked id ↓")
    return page.markdown_table(header, [(*key, value) for key, value in found.items()])
