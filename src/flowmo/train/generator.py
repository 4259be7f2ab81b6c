"""Stage 2 as a task of the engine: tokens in, a generator out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from flowmo.checkpoint import files as checkpoint
from flowmo.checkpoint.files import GENERATOR
from flowmo.config import Config
from flowmo.data import evenly_spread
from flowmo.data.sources.base import class_difference
from flowmo.data.tokens import NO_CLASS, Tokens
from flowmo.distributed import World
from flowmo.evaluate.metrics.pairs import grid
from flowmo.generate.generator import Generator, build_generator, cross_entropy
from flowmo.generate.schedules import MEAN_HIDDEN_SHARE, hide
from flowmo.images import to_pil
from flowmo.losses.noise import to_device
from flowmo.losses.stages import Loss
from flowmo.streams import Stream, seed_global, stream
from flowmo.tokenizer import FlowMo
from flowmo.train.cost import Cost, generator_cost
from flowmo.train.schedule import Schedule
from flowmo.train.task import TrainingError, autocast, changed_settings

SAMPLES = 16
IGNORED = -100
"""Target that PyTorch's cross-entropy ignores."""


class Hidden(NamedTuple):
    """Random numbers of some pictures: which ids are hidden, bool b n, and bool b, False where the class is dropped."""

    hidden: Tensor
    keep: Tensor

    @classmethod
    def of(
        cls,
        config: Config,
        ids: int,
        places: Sequence[int],
        device: torch.device,
        seed: int | None = None,
        purpose: Stream = Stream.HIDDEN,
    ) -> Hidden:
        """Of the pictures at ``places`` of the run: a function of the seed, by default the run's, and the place."""
        seed = config.trainer.seed if seed is None else seed
        rows = []
        for place in places:
            keep = torch.rand((), generator=stream(seed, Stream.LABEL_DROP, place)) >= config.generator.label_drop
            rows.append((hide(ids, stream(seed, purpose, place), config.generator.schedule), keep))
        hidden, keep = (to_device(torch.stack(column), device) for column in zip(*rows, strict=True))
        return cls(hidden, keep)


class GeneratorStage(nn.Module):
    """Guesses the hidden ids of pictures, as a module: what DDP, FSDP2 and ``torch.compile`` wrap."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.generator = generator
        self.networks = tuple(generator.networks.values())

    def forward(self, ids: Tensor, labels: Tensor, hidden: Tensor) -> Loss:
        """Cross-entropy over hidden ids (Chang et al. 2022), and with ``generator.visible_weight`` over the others.

        The loss is divided by the mean sum of those weights, and what is logged by how many ids are hidden on average,
        not by those here: so they are means over images, and the same however a batch is cut over processes and passes.

        Args:
            ids: int64 b n.
            labels: int64 b, ``null_class`` where there is none.
        """
        settings = self.generator.config.generator
        logits = self.generator.network(ids, hidden, labels).flatten(0, 1).float()  # (b n) v
        share, weight = MEAN_HIDDEN_SHARE[settings.schedule], settings.visible_weight
        # Other ids are ignored, not left out: a mask would make the host wait for their number.
        targets = torch.where(hidden, ids, IGNORED).flatten()
        summed = partial(F.cross_entropy, logits, label_smoothing=settings.label_smoothing, reduction="sum")
        total = summed(targets)
        if weight:
            total = total + weight * summed(torch.where(hidden, IGNORED, ids).flatten())
        loss, expected = total / (ids.numel() * (share + weight * (1 - share))), ids.numel() * share
        with torch.no_grad():
            sums = {
                "cross_entropy": F.cross_entropy(logits, targets, reduction="sum"),
                "accuracy": (logits.argmax(dim=-1) == targets).float().sum(),
            }
        return Loss(loss, {"loss": loss.detach(), **{name: value / expected for name, value in sums.items()}})


class GeneratorTask:
    """A ``flowmo.train.task.Task``: stage 2.

    Raises:
        DataError: the tokens are not there, damaged, or the held-out ones are another tokenizer's.
        TrainingError: ``generator.tokenizer`` is not the one that made the tokens, or the held-out tokens have other
            classes.
    """

    stage = GENERATOR

    def __init__(self, config: Config, world: World, report: Callable[[str], None]):
        self.config, self.world = config, world
        self.source = Tokens(config.data.train)
        self.vocabulary = self.source.metadata.vocabulary
        self.held_out = Tokens(config.data.val, self.vocabulary.tokenizer) if config.data.val else None
        if self.held_out is not None:
            difference = class_difference(self.held_out.classes, self.vocabulary.classes)
            if difference:
                raise TrainingError(
                    f"{config.data.val} has other classes than {config.data.train}: {difference}; tokenize both from "
                    "sources with the same classes"
                )
        self.tokenizer = self._tokenizer() if world.main else None
        seed_global(config.trainer.seed, Stream.WEIGHTS)
        self.model = Generator(config, self.vocabulary).to(world.device)
        self.module = GeneratorStage(self.model)
        self.norm_controlled: dict[str, nn.Module] = {}
        report(f"tokens of {self.vocabulary.model}: {self.vocabulary.ids} ids of {self.vocabulary.id_bits} bits")

    def _tokenizer(self) -> FlowMo | None:
        name = self.config.generator.tokenizer
        if not name:
            return None
        tokenizer = checkpoint.load(name, device=str(self.world.device))
        if tokenizer.identity() != self.vocabulary.tokenizer:
            raise TrainingError(
                f"generator.tokenizer={name} is {tokenizer.identity()}, the tokens are of {self.vocabulary.tokenizer} "
                f"({self.vocabulary.model})"
            )
        return tokenizer

    def cost(self, fused: bool = True) -> Cost:
        return generator_cost(self.config, self.vocabulary, fused)

    # Steps

    def advance(self, images: int, times: Schedule) -> bool:
        return False

    def share(self, chunks: Sequence[Tensor], first: int) -> None:
        return None

    def loss(self, module: nn.Module, chunk: Tensor, place: int, shared: None) -> Loss:
        draws = Hidden.of(self.config, self.vocabulary.ids, range(place, place + len(chunk)), chunk.device)
        seed_global(self.config.trainer.seed, Stream.DROPOUT, place)
        with autocast(self.config, self.world.device):
            return module(chunk[:, 1:], self._labels(chunk[:, 0], draws.keep), draws.hidden)

    def _labels(self, labels: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep & (labels != NO_CLASS), labels, self.model.null_class)

    def stepped(self, step: int, finite: Tensor) -> None:
        pass

    # What it tells

    def statistics(self) -> dict[str, float]:
        return {}

    def averaged(self, weights: Mapping[str, Tensor]) -> Generator:
        return build_generator(self.config, self.vocabulary, weights).to(self.world.device)

    def judge(self, model: Generator) -> dict[str, float]:
        """Cross-entropy of the hidden ids of held-out pictures, hidden alike each time."""
        held_out = self.held_out
        if held_out is None:
            raise TrainingError("no held-out tokens to judge by; write data.val=TOKENS")
        chosen = evenly_spread(self.config.eval.pictures, len(held_out))
        total = count = 0.0
        for start in range(0, len(chosen), self.config.eval.batch_size):
            places = chosen[start : start + self.config.eval.batch_size]
            rows = torch.stack([held_out.load(index, 0)[0] for index in places]).to(self.world.device)
            draws = Hidden.of(self.config, self.vocabulary.ids, places, self.world.device, 0, Stream.HELD_OUT)
            labels = self._labels(rows[:, 0], torch.ones_like(draws.keep))
            with torch.no_grad(), autocast(self.config, self.world.device):
                logits = model.network(rows[:, 1:], draws.hidden, labels)
            hidden = int(draws.hidden.sum())
            total += float(cross_entropy(logits, rows[:, 1:], draws.hidden)) * hidden
            count += hidden
        return {"cross_entropy": total / count}

    def show(self, model: Generator) -> tuple[Image.Image | None, dict[str, float]]:
        """Samples of classes that are spread over all, decoded where ``generator.tokenizer`` is named."""
        figures = self.judge(model) if self.held_out is not None else {}
        if self.tokenizer is None:
            return None, figures
        count = min(SAMPLES, max(len(self.vocabulary.classes), 1))
        labels = evenly_spread(count, len(self.vocabulary.classes)) if self.vocabulary.classes else [-1] * SAMPLES
        with autocast(self.config, self.world.device):
            ids = model.sample(labels)
            pictures = self.tokenizer.decode(ids, seed=list(range(len(ids))))
        return to_pil(grid([pictures])), figures

    # Checkpoints

    def facts(self) -> dict[str, Any]:
        return {"vocabulary": {**asdict(self.vocabulary), "classes": list(self.vocabulary.classes)}}

    def check(self, path: Path, facts: Mapping[str, Any]) -> None:
        if facts["stage"] != self.stage:
            raise TrainingError(f"{path} holds a tokenizer, not a generator")
        there = facts["vocabulary"]["tokenizer"]
        if there != self.vocabulary.tokenizer:
            raise TrainingError(
                f"{path} has learnt ids of tokenizer {there}, the tokens are of {self.vocabulary.tokenizer}"
            )
        difference = class_difference(self.vocabulary.classes, facts["vocabulary"]["classes"])
        if difference:
            raise TrainingError(f"{self.config.data.train} has other classes than {path} has learnt: {difference}")
        before = Config.from_dict(facts["config"]).generator_architecture()
        changed_settings(before, self.config.generator_architecture(), path, "generator")

    def foreign_weights(self, path: Path) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        raise TrainingError(f"{path}: not a training checkpoint of a generator")
