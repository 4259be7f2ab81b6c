"""What studies of generators share: their tokens, what is drawn from them, and who judges it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flowmo.config import Config
from flowmo.data import Source, evenly_spread, open_source
from flowmo.data.sources.base import class_difference, require_labels
from flowmo.data.tokens import Tokens
from flowmo.errors import FlowMoError
from flowmo.evaluate.generation import GenerationSummary, SetFeatures, extract_features
from flowmo.evaluate.metrics.pairs import grid
from flowmo.evaluate.reconstruction import Evaluators, print_unreadable, readable_crops
from flowmo.generate.generator import Generator, load_generator
from flowmo.generate.samples import SampleSettings, image_seeds
from flowmo.generate.tokenize import tokenize
from flowmo.images import to_bytes, to_pil
from flowmo.model.quantizers import Quantizer
from flowmo.streams import Stream, stream
from flowmo.tokenizer import Codes
from flowmo.train.state import read_metadata
from flowmo.train.task import multiplies_bfloat16
from reproduce.classifier import Classifier
from reproduce.page import Column
from reproduce.study import Place, StudyError, once, train

COLUMNS = (
    Column("frechet_distance", "Fréchet distance ↓", 1),
    Column("kernel_distance", "kernel distance × 1000 ↓", 1, 1000),
    Column("precision", "precision ↑", 3),
    Column("recall", "recall ↑", 3),
    Column("accuracy", "class recognised ↑", 3),
)
BATCH = 16
SHOWN = 8


class Tokenizer(Protocol):
    """The part of ``FlowMo`` that stage 2 needs. Other tokenizers implement it for comparison."""

    config: Config
    quantizer: Quantizer

    @property
    def code_length(self) -> int: ...

    def identity(self) -> str: ...

    def encode(self, images: Tensor) -> Codes: ...

    def decode(self, codes: Codes | Tensor, *, seed: int | Sequence[int] = 0) -> Tensor: ...


class Drawn(NamedTuple):
    """Pictures uint8 b 3 h w and the classes that they are of, or were asked for, int64 b."""

    images: Tensor
    labels: Tensor


class InMemory:
    """Pictures as ``flowmo.evaluate.generation.extract_features`` takes them."""

    def __init__(self, name: str, images: Tensor):
        self.name, self.images = name, images

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[Tensor]:
        return iter(self.images.split(size))


class Judge:
    """Compares pictures with those that generators were trained on, and asks a classifier for their class.

    Args:
        count: pictures of each set that is compared.
        side: theirs, in pixels.

    Raises:
        StudyError: no network of features, or pictures without classes.
    """

    def __init__(self, place: Place, judges: Evaluators, count: int, side: int):
        if judges.features is None:
            raise StudyError("the study needs a feature network; see the README on FLOWMO_WEIGHTS")
        source = open_source(place.train)
        if len(source.classes) < 2:
            raise StudyError(f"{place.train}: has no classes; give a folder with one folder a class")
        require_labels(source)
        self.network, self.world, self.count = judges.features, place.world, count
        self.classes = source.classes
        self.classifier = find_classifier(source.classes, place)
        self.originals, self.places = read(source, evenly_spread(min(count, len(source)), len(source)), side)
        other = open_source(place.held_out)
        difference = class_difference(other.classes, source.classes)
        if difference:
            raise StudyError(f"{place.held_out} has other classes than {place.train}: {difference}")
        require_labels(other)
        self.others, _ = read(other, evenly_spread(min(count, len(other)), len(other)), side)
        self._reference: SetFeatures | None = None

    def __call__(self, name: str, drawn: Drawn) -> dict[str, Any]:
        """Figures of some pictures."""
        if self._reference is None:
            self._reference = extract_features(
                InMemory("training pictures", self.originals.images), self.network, world=self.world
            )
        seen = extract_features(InMemory(name, drawn.images), self.network, world=self.world)
        found = GenerationSummary.of(seen, self._reference, self.network, (name, "training pictures")).as_dict()
        return {**found, "accuracy": self._accuracy(drawn)}

    def _accuracy(self, drawn: Drawn) -> float | None:
        if self.classifier is None:
            return None
        found = torch.cat([self.classifier(to_float(chunk)) for chunk in drawn.images.split(BATCH)])
        return float((found == drawn.labels).double().mean())

    def evenly(self) -> Tensor:
        """Classes of ``count`` pictures, as many of each."""
        return torch.tensor([i * len(self.classes) // self.count for i in range(self.count)])


def find_classifier(classes: Sequence[str], place: Place) -> Classifier | None:
    try:
        return Classifier(classes)
    except (FlowMoError, ValueError, OSError) as error:
        place.report(f"no classifier: {error}")
        return None


def read(source: Source, indices: Sequence[int], side: int) -> tuple[Drawn, list[int]]:
    """Central squares of a source's images, of those that can be read; and the indices of these."""
    images, kept = [], []
    for start in range(0, len(indices), BATCH):
        chunk = indices[start : start + BATCH]
        crops, unreadable = readable_crops(source, chunk, side, enlarge=True)
        images.append(to_bytes(crops))
        kept += [index for index in chunk if index not in unreadable]
        for message in unreadable.values():
            print_unreadable(message)
    return Drawn(torch.cat(images), torch.tensor([source.label(index) for index in kept])), kept


def to_float(images: Tensor) -> Tensor:
    """uint8 to [−1, 1]."""
    return images.float() / 127.5 - 1


def judged(run: str, label: str, judge: Judge, place: Place, make: Callable[[], Drawn], **facts: Any) -> dict[str, Any]:
    """A row of the table, made once; its first pictures of each class are kept in the run's folder."""

    def measure() -> dict[str, Any]:
        drawn = make()
        keep_grid(drawn, judge, place, run)
        return {"label": label, **facts, **judge(label, drawn)}

    return once(run, place, measure)


def keep_grid(drawn: Drawn, judge: Judge, place: Place, run: str) -> None:
    """Some pictures of each class, a row each."""
    if not place.world.main:
        return
    rows = []
    for label in range(len(judge.classes)):
        some = to_float(drawn.images[drawn.labels == label][:SHOWN])
        blank = torch.ones(SHOWN - len(some), *drawn.images.shape[1:])
        rows.append(torch.cat((some, blank)))
    place.folder(run).mkdir(parents=True, exist_ok=True)
    to_pil(grid(rows)).save(place.folder(run) / "classes.png")


# What generators learn


def make_tokens(tokenizer: Tokenizer, name: str, place: Place) -> Place:
    """The study's place with ids for pictures: those of the training pictures and their mirror images, and held out."""

    def make(part: str, pictures: str) -> str:
        folder, source = place.folder(f"{name}-tokens") / part, open_source(pictures)
        about = Path(pictures).name
        tokenize(tokenizer, source, folder, name=about, model=name, flip=part == "train", world=place.world)
        return str(folder)

    return replace(place, train=make("train", place.train), held_out=make("held_out", place.held_out))


def train_generator(config: Config, run: str, tokens: Place) -> tuple[Generator, float]:
    """The checkpoint that predicts hidden ids of held-out pictures best, and its nats for each."""
    judging = (f"data.val={tokens.held_out}", "trainer.best_metric=cross_entropy")
    last = train(config.override(*judging), run, tokens).checkpoint
    facts = read_metadata(last)
    best = last.with_name(f"{facts['best_step']:08d}{last.suffix}")
    return load_generator(best, device=str(tokens.world.device)), facts["best_value"]


# What is drawn


def reconstructions(tokenizer: Tokenizer, originals: Drawn, places: Sequence[int]) -> Drawn:
    """What the tokenizer makes of pictures: no generator of its ids can be expected to do better."""
    images = []
    for start in range(0, len(places), BATCH):
        codes = tokenizer.encode(to_float(originals.images[start : start + BATCH]))
        images.append(to_bytes(tokenizer.decode(codes, seed=places[start : start + BATCH]).cpu()))
    return Drawn(torch.cat(images), originals.labels)


def independent(tokenizer: Tokenizer, tokens: Tokens, labels: Tensor) -> Drawn:
    """Every id drawn alone, as often as the tokens have it at its place."""
    every = torch.stack([tokens.ids(index) for index in range(len(tokens))])
    picks = torch.randint(len(every), (len(labels), *every.shape[1:]), generator=stream(0, Stream.STUDY))
    images = []
    for i, ids in enumerate(every.gather(0, picks).split(BATCH)):
        images.append(to_bytes(tokenizer.decode(ids, seed=list(range(i * BATCH, i * BATCH + len(ids)))).cpu()))
    return Drawn(torch.cat(images), labels)


def generated(
    generator: Generator, tokenizer: Tokenizer, labels: Tensor, drawing: SampleSettings, place: Place
) -> Drawn:
    """The same on any number of processes, which share the work."""
    side, device = tokenizer.config.data.image_size, place.world.device
    images = torch.zeros(len(labels), 3, side, side, dtype=torch.int32)
    for start in range(0, len(labels), BATCH)[place.world.rank :: place.world.size]:
        numbers = range(start, min(start + BATCH, len(labels)))
        seeds = image_seeds(drawing.seed, numbers)
        with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device)):
            ids = generator.sample(labels[numbers.start : numbers.stop], seeds, **drawing.sampling())
            made = tokenizer.decode(ids, seed=seeds)
        images[numbers.start : numbers.stop] = to_bytes(made.float()).cpu().int()
    return Drawn(place.world.sum(images).to(torch.uint8), labels)
