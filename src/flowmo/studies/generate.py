"""Stage 2 (section 4.3, table 2): what a MaskGiT draws from a tokenizer's ids, between a floor and a ceiling.

A generator learns the ids of class-labelled pictures. Its pictures are compared with those it was trained on by a
distance of features, beside the tokenizer's own reconstructions of them (no generator can be expected below) and
beside ids drawn each from how often it occurs at its place (what a generator must beat). An independent classifier
says whether the class that was asked for is to be seen. Softmax temperature and guidance are swept, the best of them
is drawn again with the other order of revealing and with bit tokens, and other tokenizers at equal bits can take part
(table 2's question).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowmo
from flowmo.checkpoint import write_content
from flowmo.config import Config, preset
from flowmo.data import evenly_spread, open_source
from flowmo.data.tokens import Tokens
from flowmo.errors import FlowMoError
from flowmo.evaluate.features import FeatureNetwork
from flowmo.evaluate.figures import grid
from flowmo.evaluate.generation import GenerationSummary, Seen, look
from flowmo.evaluate.reconstruction import Judges, read_crops
from flowmo.generate import produce
from flowmo.generate.classes import display_name
from flowmo.generate.generator import Generator, load_generator
from flowmo.generate.produce import Drawing
from flowmo.generate.tokenize import tokenize
from flowmo.pictures import to_bytes, to_picture
from flowmo.studies.classifier import Classifier
from flowmo.studies.page import markdown_table, subplots
from flowmo.studies.study import Place, StudyError, once, read_results, train, write_results
from flowmo.tokenizer import FlowMo
from flowmo.train.state import read_facts
from flowmo.train.task import multiplies_bfloat16

TITLE = "pictures from tokens (section 4.3, table 2)"
COLUMNS = (
    ("frechet_distance", "Fréchet distance ↓", 1),
    ("kernel_distance", "kernel distance × 1000 ↓", 1),
    ("precision", "precision ↑", 3),
    ("recall", "recall ↑", 3),
    ("accuracy", "class recognised ↑", 3),
)
BATCH = 16
SHOWN = 8


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
            *("generator.depth=6", "trainer.duration=64k images", "trainer.log_every=640 images"),
            *("trainer.checkpoint_every=3200 images", "opt.warmup=3200 images"),
        ),
        *(500, 16, (0.7, 1.0, 1.3), (1.0, 1.5, 3.0)),
        "two to three hours on two CPU cores",
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


class Pictures:
    """Some pictures in memory, as ``flowmo.evaluate.generation.look`` takes them: uint8 b 3 h w."""

    def __init__(self, name: str, images: Tensor):
        self.name, self.images = name, images

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[Tensor]:
        return iter(self.images.split(size))


def run(place: Place, judges: Judges) -> None:
    """Tokenize, train, draw, measure; what is already there is not made again."""
    scale = SCALES[place.scale]
    if judges.features is None:
        raise StudyError("the study needs a feature network; see the README on FLOWMO_WEIGHTS")
    source = open_source(place.train)
    if len(source.classes) < 2:
        raise StudyError(f"{place.train}: has no classes; give a folder with one folder a class")
    classifier = find_classifier(source.classes, place)
    rows: list[dict[str, Any]] = []
    for number, model in enumerate(place.models):
        tokenizer = flowmo.load(model, device=str(place.world.device))
        judge = Judge(tokenizer, Path(place.train), scale, place, judges.features, classifier)
        for row in study_tokenizer(Path(model).stem, number, tokenizer, judge, scale, place):
            rows.append(row)
            facts = {
                "pictures": scale.pictures,
                "steps": scale.steps,
                "falling": scale.falling,
                "classes": [display_name(name) for name in source.classes],
            }
            network = scale.generator.to_dict()["generator"]
            write_results(place, {**facts, "judges": judges.describe(), "generator": network}, rows)
    if place.world.main:
        draw(place)


def find_classifier(classes: Sequence[str], place: Place) -> Classifier | None:
    try:
        return Classifier(classes)
    except (FlowMoError, ValueError, OSError) as error:
        place.report(f"no classifier: {error}")
        return None


class Judge:
    """Compares pictures with those that generators were trained on, and asks a classifier."""

    def __init__(
        self,
        tokenizer: FlowMo,
        train: Path,
        scale: Scale,
        place: Place,
        network: FeatureNetwork,
        classifier: Classifier | None,
    ):
        self.network, self.classifier, self.world = network, classifier, place.world
        source = open_source(train)
        self.places = evenly_spread(scale.pictures, len(source))
        side = tokenizer.config.data.image_size
        chunks = [self.places[i : i + BATCH] for i in range(0, len(self.places), BATCH)]
        self.originals = torch.cat([to_bytes(read_crops(source, chunk, side, enlarge=True)) for chunk in chunks])
        self.labels = torch.tensor([source.label(index) for index in self.places])
        self.classes = source.classes
        self._reference: Seen | None = None

    def __call__(self, name: str, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """Figures of pictures uint8 b 3 h w of classes."""
        if self._reference is None:
            self._reference = look(Pictures("training pictures", self.originals), self.network, world=self.world)
        seen = look(Pictures(name, images), self.network, world=self.world)
        found = GenerationSummary.of(seen, self._reference, self.network, (name, "training pictures")).as_dict()
        return {**found, "accuracy": self._accuracy(images, labels)}

    def _accuracy(self, images: Tensor, labels: Tensor) -> float | None:
        if self.classifier is None:
            return None
        found = torch.cat([self.classifier(chunk.float() / 127.5 - 1) for chunk in images.split(BATCH)])
        return float((found == labels).double().mean())


def study_tokenizer(
    name: str, number: int, tokenizer: FlowMo, judge: Judge, scale: Scale, place: Place
) -> Iterator[dict[str, Any]]:
    """All rows of one tokenizer."""
    folders = {}
    for part, pictures in (("train", place.train), ("held_out", place.held_out)):
        folders[part] = place.folder(f"{name}-tokens") / part
        tokenize(
            tokenizer,
            open_source(pictures),
            folders[part],
            name=Path(pictures).name,
            model=name,
            flip=part == "train",
            world=place.world,
        )
    tokens = Tokens(folders["train"], tokenizer.identity())

    def row(kind: str, label: str, **facts: Any) -> dict[str, Any]:
        return {"tokenizer": name, "tokenizer_identity": tokenizer.identity(), "kind": kind, "label": label, **facts}

    def judged(kind: str, label: str, make: Callable[[], tuple[Tensor, Tensor]], **facts: Any) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            images, labels = make()
            keep_grid(images, labels, judge, place, f"{name}-{kind}")
            return row(kind, label, **facts, **judge(label, images, labels))

        return once(f"{name}-{kind}", place, measure)

    yield judged("originals", "the training pictures' classes", lambda: (judge.originals, judge.labels))
    yield judged("floor", "reconstructions of training pictures", lambda: reconstructions(tokenizer, judge))
    yield judged("ceiling", "each id by its frequency at its place", lambda: independent(tokenizer, tokens, judge))

    def generated(generator: Generator, **drawing: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        def make() -> tuple[Tensor, Tensor]:
            labels = torch.tensor([i * len(judge.classes) // scale.pictures for i in range(scale.pictures)])
            return sampled(generator, tokenizer, labels, Drawing(steps=scale.steps, **drawing), place), labels

        return make

    def trained(variant: str, *settings: str) -> Generator:
        there = replace(place, train=str(folders["train"]), held_out=str(folders["held_out"]))
        judging = (f"data.val={there.held_out}", "trainer.best_metric=cross_entropy")
        last = train(scale.generator.override(*settings, *judging), f"{name}-{variant}", there).checkpoint
        best = last.with_name(f"{read_facts(last)['best_step']:08d}{last.suffix}")
        return load_generator(best, device=str(place.world.device))

    generator = trained("table")
    swept = []
    for temperature, guidance in itertools.product(scale.temperatures, scale.guidances):
        drawing = {
            "temperature": temperature,
            "last_temperature": temperature * scale.falling,
            "guidance": guidance,
            "order": "confidence",
        }
        label = f"temperature {temperature:g}, guidance {guidance:g}"
        kind = f"t{temperature:g}-g{guidance:g}"
        swept.append(judged(kind, label, generated(generator, **drawing), swept=True, **drawing))
        yield swept[-1]
    best = min(swept, key=lambda found: found["frechet_distance"])
    drawing = {key: best[key] for key in ("temperature", "last_temperature", "guidance")}
    at = f"temperature {best['temperature']:g}, guidance {best['guidance']:g}"
    make = generated(generator, **drawing, order="halton")
    yield judged("halton", f"Halton order, {at}", make, order="halton", **drawing)
    if number == 0:
        bits = trained("bits", "generator.bit_tokens=true")
        make = generated(bits, **drawing, order="confidence")
        yield judged("bits", f"bit tokens, {at}", make, order="confidence", **drawing)


def reconstructions(tokenizer: FlowMo, judge: Judge) -> tuple[Tensor, Tensor]:
    """What the tokenizer makes of the training pictures: no generator of its ids can be expected to do better."""
    images = []
    for start in range(0, len(judge.places), BATCH):
        codes = tokenizer.encode(judge.originals[start : start + BATCH].float() / 127.5 - 1)
        images.append(to_bytes(tokenizer.decode(codes, seed=judge.places[start : start + BATCH]).cpu()))
    return torch.cat(images), judge.labels


def independent(tokenizer: FlowMo, tokens: Tokens, judge: Judge) -> tuple[Tensor, Tensor]:
    """Every id drawn alone, as often as the tokens have it at its place."""
    generator = torch.Generator().manual_seed(0)
    every = torch.stack([tokens.ids(index) for index in range(len(tokens))])
    count = len(judge.labels)
    picks = torch.randint(len(every), (count, *every.shape[1:]), generator=generator)
    ids = every.gather(0, picks)
    images = [
        to_bytes(tokenizer.decode(chunk, seed=list(range(i * BATCH, i * BATCH + len(chunk)))).cpu())
        for i, chunk in enumerate(ids.split(BATCH))
    ]
    return torch.cat(images), judge.labels


def sampled(generator: Generator, tokenizer: FlowMo, labels: Tensor, drawing: Drawing, place: Place) -> Tensor:
    """uint8 b 3 h w, the same on any number of processes, which share the work."""
    chunks = list(range(0, len(labels), BATCH))
    side = tokenizer.config.data.image_size
    images = torch.zeros(len(labels), 3, side, side, dtype=torch.int32)
    device = place.world.device
    for start in chunks[place.world.rank :: place.world.size]:
        numbers = list(range(start, min(start + BATCH, len(labels))))
        with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device)):
            drawn = produce.draw(generator, tokenizer, labels[numbers].tolist(), numbers, drawing)
        images[numbers] = to_bytes(drawn.float()).cpu().int()
    return place.world.sum(images).to(torch.uint8)


def keep_grid(images: Tensor, labels: Tensor, judge: Judge, place: Place, name: str) -> None:
    """Some pictures of each class, a row each, in the run's folder."""
    if not place.world.main:
        return
    rows = []
    for label in range(len(judge.classes)):
        some = images[labels == label][:SHOWN].float() / 127.5 - 1
        blank = torch.ones(SHOWN - len(some), *images.shape[1:])
        rows.append(torch.cat((some, blank)))
    place.folder(name).mkdir(parents=True, exist_ok=True)
    to_picture(grid(rows)).save(place.folder(name) / "classes.png")


def draw(place: Place) -> None:
    """The table and the plot of the results in ``place.out``."""
    results = read_results(place)
    rows = results["rows"]
    plot(rows, place)
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    several = len({row["tokenizer"] for row in rows}) > 1
    header = [*(["tokenizer"] if several else []), "", *(heading for _, heading, _ in columns)]
    table = markdown_table(header, (cells(row, columns, several) for row in rows))
    network = results["generator"]
    shape = f"{network['depth']} blocks of width {network['hidden_size']}"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    words = f"--models {' '.join(dict.fromkeys(row['tokenizer'] for row in rows))}" if several else ""
    text = f"""# Study: {TITLE}, at scale `{place.scale}`

    flowmo study generate --scale {place.scale} --data PICTURES --held-out HELD_OUT {words}

A generator of {shape}, trained on the ids of PICTURES and their mirror images, the checkpoint that predicts the ids of
HELD_OUT best, {results["steps"]} steps a picture, one seed. Each row: {results["pictures"]} pictures, evenly over the
classes, against as many of PICTURES; a Fréchet distance of so few is too large, so compare within this table only
({rows[0]["feature_network"]}). The last step's temperature is {results["falling"]:g} times the first's. Class
recognised: by MobileNet V2 (ImageNet, torchvision's weights), among {", ".join(results["classes"])}; chance is
{1 / len(results["classes"]):.2f}.

{table}
![Fréchet distance and accuracy over temperature and guidance]({place.stem}.png)

{results["machine"]}, {versions}
"""
    write_content(place.out / f"{place.stem}.md", text)


def cells(row: Mapping[str, Any], columns: Sequence[tuple[str, str, int]], several: bool) -> list[str]:
    shown = []
    for key, _, places in columns:
        value = row.get(key)
        factor = 1000 if key == "kernel_distance" else 1
        shown.append("–" if value is None else f"{value * factor:.{places}f}")
    return [*([row["tokenizer"]] if several else []), row["label"], *shown]


def plot(rows: Sequence[Mapping[str, Any]], place: Place) -> None:
    """Both figures over temperature, a line a guidance, between floor and ceiling."""
    first = rows[0]["tokenizer"]
    mine = [row for row in rows if row["tokenizer"] == first]
    swept = [row for row in mine if row.get("swept")]
    figure, axes = subplots(1, 2, (9, 3.6))
    shown = {"frechet_distance": "Fréchet distance", "accuracy": "class recognised"}
    levels = {"floor": ("--", "reconstructions"), "ceiling": (":", "independent ids")}
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
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8)
    figure.savefig(place.out / f"{place.stem}.png", dpi=110)
