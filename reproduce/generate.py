"""Stage 2 (section 4.3, table 2): what a MaskGiT draws from a tokenizer's ids, between a floor and a ceiling.

A generator learns the ids of class-labelled pictures. Its pictures are compared with those it was trained on by a
distance of features, beside the tokenizer's own reconstructions of them (no generator can be expected below), beside
held-out pictures (another draw of the same kind), and beside ids drawn each from how often it occurs at its place (what
a generator must beat). An independent classifier says whether the class that was asked for is to be seen. Softmax
temperature and guidance are swept, the best of them is drawn again with the other order of revealing and with bit
tokens. Table 2's own question, which of several tokenizers a generator draws best from, is that of the study
``tokenizers``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flowmo.config import Config, preset
from flowmo.data.tokens import Tokens
from flowmo.evaluate.reconstruction import Evaluators
from flowmo.generate.classes import class_titles
from flowmo.generate.generator import Generator
from flowmo.generate.samples import SampleSettings
from flowmo.tokenizer import FlowMo
from reproduce.generation import (
    COLUMNS,
    Drawn,
    Judge,
    generated,
    independent,
    judged,
    make_tokens,
    reconstructions,
    train_generator,
)
from reproduce.page import (
    Group,
    Row,
    figures_table,
    markdown_table,
    measured_columns,
    subplots,
    versions_line,
    write_page,
)
from reproduce.study import Place, named_models, read_results, write_results

TITLE = "pictures from tokens (section 4.3)"


@dataclass(frozen=True)
class Scale:
    """How large the study is.

    Attributes:
        generator: the network and its training.
        pictures: generated, and training pictures to compare them with, for each row.
        temperatures: of the first step; the last step's is ``falling`` times it.
        cost: what it takes, in words.
    """

    generator: Config
    pictures: int
    steps: int
    temperatures: tuple[float, ...]
    guidances: tuple[float, ...]
    cost: str
    falling: float = 0.4


NANO = preset("maskgit_nano").override("trainer.tensorboard=false", "trainer.sample_every=0", "data.num_workers=0")
SCALES = {
    "smoke": Scale(
        NANO.override(
            *("generator.hidden_size=32", "generator.depth=1", "generator.num_heads=2", "data.global_batch_size=4"),
            *("trainer.duration=2 steps", "trainer.log_every=1 step", "opt.warmup=0"),
        ),
        *(6, 2, (1.0,), (1.5,)),
        "half a minute on two CPU cores; its figures mean nothing",
    ),
    "cpu": Scale(
        NANO.override(
            *("generator.depth=4", "trainer.duration=32k images", "trainer.log_every=640 images"),
            *("trainer.checkpoint_every=3200 images", "opt.warmup=3200 images"),
        ),
        *(300, 12, (0.7, 1.0, 1.3), (1.0, 1.5, 3.0)),
        "two and a half hours on one CPU core",
    ),
    "gpu": Scale(
        preset("maskgit_nano").override(
            *("generator.hidden_size=512", "generator.depth=12", "generator.num_heads=8", "data.global_batch_size=128"),
            *("trainer.duration=2M images", "opt.lr=5e-4", "trainer.compile=true"),
        ),
        *(5000, 64, (0.7, 1.0, 1.3, 1.6), (1.0, 1.5, 3.0)),
        "about 25 minutes on one H100, by arithmetic",
    ),
    "paper": Scale(
        preset("maskgit"),
        *(50_000, 64, (1.0, 1.3, 1.6), (1.0, 1.5, 2.0)),
        "300 epochs of ImageNet: 40 hours on 8 H100 at 40 % of their peak, by arithmetic",
    ),
}


def run(place: Place, judges: Evaluators) -> None:
    """Tokenize, train, draw, measure; what is already there is not made again."""
    scale = SCALES[place.scale]
    rows: list[dict[str, Any]] = []
    for number, (name, tokenizer) in enumerate(named_models(place)):
        judge = Judge(place, judges, scale.pictures, tokenizer.config.data.image_size)
        for row in study_tokenizer(name, number == 0, tokenizer, judge, scale, place):
            rows.append(row)
            facts = {
                "pictures": scale.pictures,
                "steps": scale.steps,
                "falling": scale.falling,
                "classes": [*class_titles(judge.classes)],
                "models": list(place.models),
                "generator": scale.generator.to_dict()["generator"],
            }
            write_results(place, {**facts, "judges": judges.describe()}, rows)
    if place.world.main:
        draw(place)


def study_tokenizer(
    name: str, first: bool, tokenizer: FlowMo, judge: Judge, scale: Scale, place: Place
) -> Iterator[dict[str, Any]]:
    """All rows of one tokenizer; of the first, bit tokens too."""
    there = make_tokens(tokenizer, name, place)
    tokens = Tokens(there.train, tokenizer.identity())
    labels = judge.evenly()

    def row(kind: str, label: str, make: Callable[[], Drawn], **facts: Any) -> dict[str, Any]:
        return judged(f"{name}-{kind}", label, judge, place, make, tokenizer=name, kind=kind, **facts)

    yield row("originals", "the training pictures themselves", lambda: judge.originals)
    yield row("others", "held-out pictures", lambda: judge.others)
    make = partial(reconstructions, tokenizer, judge.originals, judge.places)
    yield row("floor", "reconstructions of training pictures", make)
    make = partial(independent, tokenizer, tokens, judge.originals.labels)
    yield row("ceiling", "each id by its frequency at its place", make)

    def drawn(trained: tuple[Generator, float], kind: str, label: str, **drawing: Any) -> dict[str, Any]:
        generator, nats = trained
        make = partial(generated, generator, tokenizer, labels, SampleSettings(steps=scale.steps, **drawing), place)
        return row(kind, label, make, cross_entropy=nats, **drawing)

    table, swept = train_generator(scale.generator, f"{name}-table", there), []
    for temperature, guidance in itertools.product(scale.temperatures, scale.guidances):
        drawing = {
            "temperature": temperature,
            "last_temperature": temperature * scale.falling,
            "guidance": guidance,
            "order": "confidence",
        }
        label = f"temperature {temperature:g}, guidance {guidance:g}"
        swept.append({**drawn(table, f"t{temperature:g}-g{guidance:g}", label, **drawing), "swept": True})
        yield swept[-1]
    best = min(swept, key=lambda found: found["frechet_distance"])
    drawing = {key: best[key] for key in ("temperature", "last_temperature", "guidance")}
    at = f"temperature {best['temperature']:g}, guidance {best['guidance']:g}"
    yield drawn(table, "halton", f"Halton order, {at}", order="halton", **drawing)
    if first:
        bits = train_generator(scale.generator.override("generator.bit_tokens=true"), f"{name}-bits", there)
        yield drawn(bits, "bits", f"bit tokens, {at}", order="confidence", **drawing)


def draw(place: Place) -> None:
    """The table and the plot of the results in ``place.out``."""
    results = read_results(place)
    rows = results["rows"]
    plot(rows, place)
    several = len({row["tokenizer"] for row in rows}) > 1
    told: dict[str, Callable[[Group], str]] = {"tokenizer": lambda group: group[0]["tokenizer"]} if several else {}
    told[""] = lambda group: group[0]["label"]
    table = figures_table([[row] for row in rows], measured_columns(rows, COLUMNS), first=told)
    network = results["generator"]
    shape = f"{network['depth']} blocks of width {network['hidden_size']}"
    models = " ".join(results["models"])
    text = f"""# Study: {TITLE}, at scale `{place.scale}`

    python -m reproduce generate --scale {place.scale} --data PICTURES --held-out HELD_OUT --models {models}

A generator of {shape}, trained on the ids of PICTURES and their mirror images, the checkpoint that predicts the ids of
HELD_OUT best, {results["steps"]} steps a picture, one seed. Each row: {results["pictures"]} pictures, evenly over the
classes, against as many of PICTURES; a Fréchet distance of so few is too large, so compare within this table only
({rows[0]["feature_network"]}). Other pictures of the same kind, HELD_OUT, show how much. The last step's temperature is
{results["falling"]:g} times the first's. Class recognised: by MobileNet V2 (ImageNet, torchvision's weights), among
{", ".join(results["classes"])}; chance is {1 / len(results["classes"]):.2f}.

{table}
{predicted(rows)}
![Fréchet distance and accuracy over temperature and guidance]({place.stem}.png)

{results["machine"]}, {versions_line(results)}
"""
    write_page(place, text)


def predicted(rows: Sequence[Row]) -> str:
    """How well each generator predicts ids, from its first row."""
    header = ("tokenizer", "generator", "held-out nats a hidden id ↓")
    found: dict[tuple[str, str], str] = {}
    for row in rows:
        if "cross_entropy" in row:
            variant = "bit tokens" if row["kind"] == "bits" else "a table of ids"
            found.setdefault((row["tokenizer"], variant), f"{row['cross_entropy']:.3f}")
    return markdown_table(header, [(*key, value) for key, value in found.items()])


def plot(rows: Sequence[Row], place: Place) -> None:
    """Both figures over temperature, a line a guidance, between floor and ceiling."""
    first = rows[0]["tokenizer"]
    mine = [row for row in rows if row["tokenizer"] == first]
    swept = [row for row in mine if row.get("swept")]
    figure, axes = subplots(1, 2, (9, 3.6))
    shown = {"frechet_distance": "Fréchet distance", "accuracy": "class recognised"}
    levels = {"others": ("-", "held-out"), "floor": ("--", "reconstructions"), "ceiling": (":", "independent ids")}
    for axis, (key, name) in zip(axes.flat, shown.items(), strict=True):
        for guidance in sorted({row["guidance"] for row in swept}):
            points = [(row["temperature"], row[key]) for row in swept if row["guidance"] == guidance]
            if all(value is not None for _, value in points):
                axis.plot(*zip(*points, strict=True), "o-", label=f"guidance {guidance:g}")
        for kind, (style, label) in levels.items():
            level = next((row[key] for row in mine if row["kind"] == kind), None)
            if level is not None:
                axis.axhline(level, color="gray", linestyle=style, label=label)
        axis.set(xlabel="temperature of the first step", title=name)
        axis.grid(alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=8)
    figure.savefig(place.out / f"{place.stem}.png", dpi=110)
