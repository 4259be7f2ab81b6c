"""Shared by the recipes of generators: their tokens, their training, sampling, and the evaluation of what they draw."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowmo.config import Config
from flowmo.data import Source, evenly_spread, open_source
from flowmo.data.sources.base import class_difference, require_labels
from flowmo.data.tokens import TokenDataset
from flowmo.errors import FlowMoError
from flowmo.evaluate.generation import GenerationSummary, SetFeatures, extract_features
from flowmo.evaluate.metrics.pairs import grid
from flowmo.evaluate.reconstruction import print_unreadable, read_crops
from flowmo.generate.classes import class_titles
from flowmo.generate.generator import Generator, load_generator
from flowmo.generate.samples import image_seeds
from flowmo.generate.tokenize import tokenize
from flowmo.images import to_bytes, to_pil
from flowmo.precision import multiplies_bfloat16
from flowmo.streams import Stream, stream
from flowmo.tokenizer import FlowMo
from flowmo.train.state import read_metadata
from reproduce import StudyError
from reproduce.classifier import Classifier
from reproduce.convolutional import ConvolutionalTokenizer
from reproduce.page import Column
from reproduce.runner import Study

COLUMNS = (
    Column("frechet_distance", "Fréchet distance ↓", 1),
    Column("kernel_distance", "kernel distance × 1000 ↓", 1, 1000),
    Column("precision", "precision ↑", 3),
    Column("recall", "recall ↑", 3),
    Column("accuracy", "class recognised ↑", 3),
)
Tokenizer = FlowMo | ConvolutionalTokenizer
BATCH = 16
SHOWN_PER_CLASS, SHOWN_CLASSES = 8, 10
FREQUENCIES = 50_000
"""Most images whose ids give the frequencies."""


class LabelledImages(NamedTuple):
    """Images (uint8 b 3 h w) and their classes, or the classes that were asked for (int64 b)."""

    images: Tensor
    labels: Tensor


class InMemory:
    """Images as an ``ImageSet`` of ``flowmo.evaluate.generation``."""

    def __init__(self, name: str, images: Tensor):
        self.name, self.images = name, images

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, Tensor]]:
        return itertools.islice(enumerate(self.images.split(size)), rank, None, ranks)


class GenerationEvaluator:
    """Compares images with the training images of generators, and asks a classifier for their class.

    Attributes:
        originals, others: ``count`` training and held-out images, central squares of ``side`` pixels.
        indices: of the originals in their source.

    Raises:
        StudyError: there is no feature network, or the images have no classes.
    """

    def __init__(self, study: Study, count: int, side: int):
        if study.evaluators.features is None:
            raise StudyError("The study needs a feature network. See LPIPS and rFID in docs/evaluation.md.")
        source, other = open_source(study.data), open_source(study.held_out)
        if len(source.classes) < 2:
            raise StudyError(f"{study.data} has no classes. Give a folder with one folder a class.")
        difference = class_difference(other.classes, source.classes)
        if difference:
            raise StudyError(f"{study.held_out} has other classes than {study.data}: {difference}.")
        require_labels(source)
        require_labels(other)
        self.study, self.network, self.count = study, study.evaluators.features, count
        self.classes = source.classes
        self.classifier = find_classifier(source.classes, study)
        self.originals, self.indices = read_images(source, count, side)
        self.others, _ = read_images(other, count, side)

    def metadata(self, generator: Config) -> dict[str, Any]:
        """Metadata that the pages of generators need."""
        network = generator.to_dict()["generator"]
        return {"pictures": self.count, "classes": [*class_titles(self.classes)], "generator": network}

    @cached_property
    def reference(self) -> SetFeatures:
        return self.features("training images", self.originals.images)

    def features(self, name: str, images: Tensor) -> SetFeatures:
        world = self.study.world
        return extract_features(InMemory(name, images), self.network, device=world.device, world=world)

    def once(self, run: str, label: str, make: Callable[[], LabelledImages], **about: Any) -> dict[str, Any]:
        """A row of the table, computed once. Saves the first images of each class in the run's folder."""

        def measure() -> dict[str, Any]:
            drawn = make()
            self.save_grid(drawn, run)
            return {"label": label, **about, **self.measure(label, drawn)}

        return self.study.once(run, measure)

    def measure(self, name: str, drawn: LabelledImages) -> dict[str, Any]:
        world, names = self.study.world, (name, "training images")
        sets = self.features(name, drawn.images), self.reference
        metrics = world.broadcast(GenerationSummary.of(*sets, self.network, names).as_dict() if world.main else {})
        metrics["pictures"] = metrics.pop("images")  # "images" of a row are those of training
        accuracy = None
        if self.classifier is not None:
            predicted = torch.cat([self.classifier(to_float(chunk)) for chunk in drawn.images.split(BATCH)])
            accuracy = float((predicted == drawn.labels).double().mean())
        return {**metrics, "accuracy": accuracy}

    def balanced_labels(self) -> Tensor:
        """Classes of ``count`` images, equally many of each."""
        return torch.tensor([i * len(self.classes) // self.count for i in range(self.count)])

    def save_grid(self, drawn: LabelledImages, run: str) -> None:
        """Save ``classes.png``, one row of images for each of ten classes at most."""
        if not self.study.world.main:
            return
        rows = []
        for label in evenly_spread(min(SHOWN_CLASSES, len(self.classes)), len(self.classes)):
            some = to_float(drawn.images[drawn.labels == label][:SHOWN_PER_CLASS])
            blank = torch.ones(SHOWN_PER_CLASS - len(some), *drawn.images.shape[1:])
            rows.append(torch.cat((some, blank)))
        self.study.folder(run).mkdir(parents=True, exist_ok=True)
        to_pil(grid(rows)).save(self.study.folder(run) / "classes.png")


def page_note(results: Mapping[str, Any]) -> str:
    """Sentences on the evaluation that the pages of generators share."""
    classes = results["classes"]
    return f"""\
Each row: {results["pictures"]} images, evenly over the classes, against as many of IMAGES. A Fréchet distance of so few
is too large: compare it within this page only ({results["rows"][0]["feature_network"]}). Class recognised: by MobileNet
V2 (ImageNet, torchvision's weights), among {", ".join(classes)}; chance is {1 / len(classes):.2f}."""


def find_classifier(classes: Sequence[str], study: Study) -> Classifier | None:
    try:
        return Classifier(classes)
    except (FlowMoError, ValueError, OSError) as error:
        study.report(f"No classifier: {error}")
        return None


def read_images(source: Source, count: int, side: int) -> tuple[LabelledImages, list[int]]:
    """Central squares of at most ``count`` evenly spread images, without unreadable ones, and their indices."""
    indices = evenly_spread(min(count, len(source)), len(source))
    images, kept = [], []
    for start in range(0, len(indices), BATCH):
        chunk = indices[start : start + BATCH]
        crops = read_crops(source, chunk, side, enlarge=True, unreadable=(unreadable := {}))
        images.append(to_bytes(crops))
        kept += [index for index in chunk if index not in unreadable]
        for message in unreadable.values():
            print_unreadable(message)
    return LabelledImages(torch.cat(images), torch.tensor([source.label(index) for index in kept])), kept


def to_float(images: Tensor) -> Tensor:
    """uint8 to [−1, 1]."""
    return images.float() / 127.5 - 1


# Tokens and training


def make_tokens(tokenizer: Tokenizer, name: str, study: Study) -> Study:
    """Tokenize the training images, with their mirror images, and the held-out images. Returns a study of tokens."""

    def make(part: str, images: str) -> str:
        folder = study.folder(f"{name}-tokens") / part
        source, flip = open_source(images), part == "train"
        tokenize(tokenizer, source, folder, name=Path(images).name, model=name, flip=flip, world=study.world)
        return str(folder)

    return replace(study, data=make("train", study.data), held_out=make("held_out", study.held_out))


def train_generator(config: Config, run: str, tokens: Study) -> tuple[Generator, float]:
    """Train a generator. Returns the checkpoint with the best held-out cross-entropy, and its nats per masked id."""
    best = (f"data.val={tokens.held_out}", "trainer.best_metric=cross_entropy")
    last = tokens.train(config.override(*best), run).checkpoint
    metadata = read_metadata(last)
    path = last.with_name(f"{metadata['best_step']:08d}{last.suffix}")
    return load_generator(path, device=str(tokens.world.device)), metadata["best_value"]


# Images to evaluate


def decode(tokenizer: Tokenizer, ids: Tensor, seeds: Sequence[int]) -> Tensor:
    """Decode ids in batches to uint8 images."""
    chunks = range(0, len(ids), BATCH)
    images = [tokenizer.decode(ids[i : i + BATCH], seed=list(seeds[i : i + BATCH])).cpu() for i in chunks]
    return torch.cat([to_bytes(image) for image in images])


def reconstructions(tokenizer: Tokenizer, evaluator: GenerationEvaluator) -> LabelledImages:
    """The tokenizer's reconstructions of the originals: no generator of its ids is expected to be better."""
    originals, labels = evaluator.originals
    ids = torch.cat([tokenizer.encode(to_float(chunk)).ids for chunk in originals.split(BATCH)])
    return LabelledImages(decode(tokenizer, ids, evaluator.indices), labels)


def independent_ids(tokenizer: Tokenizer, tokens: TokenDataset, labels: Tensor) -> LabelledImages:
    """Images of ids that are drawn independently, each from its frequency at its position."""
    some = evenly_spread(min(FREQUENCIES, len(tokens)), len(tokens))
    every = torch.stack([tokens.ids(index) for index in some])
    picks = torch.randint(len(every), (len(labels), *every.shape[1:]), generator=stream(0, Stream.STUDY))
    return LabelledImages(decode(tokenizer, every.gather(0, picks), range(len(labels))), labels)


def generated(
    generator: Generator, tokenizer: Tokenizer, labels: Tensor, study: Study, seed: int = 0, **sampling: Any
) -> LabelledImages:
    """Images that a generator draws, by keyword arguments of ``Generator.sample``.

    Ranks share the work. The result does not depend on their number.
    """
    side, device = tokenizer.config.data.image_size, study.world.device
    images = torch.zeros(len(labels), 3, side, side, dtype=torch.int32)
    for start in range(0, len(labels), BATCH)[study.world.rank :: study.world.size]:
        numbers = range(start, min(start + BATCH, len(labels)))
        seeds = image_seeds(seed, numbers)
        with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device)):
            ids = generator.sample(labels[numbers.start : numbers.stop], seeds, **sampling)
        made = tokenizer.decode(ids, seed=seeds)  # as the reconstructions that it is compared with
        images[numbers.start : numbers.stop] = to_bytes(made.float()).cpu().int()
    return LabelledImages(study.world.sum(images).to(torch.uint8), labels)
