"""Training task of stage 2: tokens in, a masked-token generator out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from flowmo.config import Config
from flowmo.data import evenly_spread
from flowmo.data.sources.base import class_difference
from flowmo.data.tokens import NO_CLASS, TokenDataset, Vocabulary
from flowmo.distributed import World
from flowmo.evaluate.metrics.pairs import grid
from flowmo.generate.generator import Generator, build_generator, load_generator
from flowmo.generate.schedules import expected_masked, random_mask
from flowmo.images import to_pil
from flowmo.losses.noise import to_device
from flowmo.losses.stages import Loss
from flowmo.streams import Stream, seed_global, stream
from flowmo.tokenizer import FlowMo, load
from flowmo.train.task import Task, TrainingError, autocast, check_same_settings

SAMPLES = 16
IGNORED = -100
"""Target that PyTorch's cross-entropy ignores."""


class GeneratorNoise(NamedTuple):
    """Random numbers of a micro-batch: the mask of ids, bool b × n; which classes are kept, bool b."""

    mask: Tensor
    keep: Tensor

    @classmethod
    def of(
        cls,
        config: Config,
        ids: int,
        indices: Sequence[int],
        device: torch.device,
        seed: int | None = None,
        purpose: Stream = Stream.MASK,
    ) -> Self:
        """Draw the numbers of the images at ``indices``, from the seed (the run's by default) and the index alone."""
        seed, settings = config.trainer.seed if seed is None else seed, config.generator
        mask = torch.stack([random_mask(ids, stream(seed, purpose, index), settings.schedule) for index in indices])
        drop = torch.stack([torch.rand((), generator=stream(seed, Stream.LABEL_DROP, index)) for index in indices])
        return cls(to_device(mask, device), to_device(drop >= settings.label_drop, device))


class GeneratorStage(nn.Module):
    """Loss of a generator as a module, for DDP, FSDP2 and ``torch.compile`` to wrap."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.generator = generator
        self.networks = tuple(generator.networks.values())

    def forward(self, ids: Tensor, labels: Tensor, mask: Tensor) -> Loss:
        """Cross-entropy of masked ids (Chang et al. 2022); ``generator.visible_weight`` weights the visible ids.

        Sums are divided by the expected number of masked ids, not the drawn one, so that the mean over images is the
        same however a batch is split.

        Args:
            ids: int64 b × n.
            labels: int64 b, ``null_class`` where there is none.
            mask: bool b × n.
        """
        settings = self.generator.config.generator
        logits = self.generator.network(ids, mask, labels).flatten(0, 1).float()  # (b n) v
        logits = logits[:, : self.generator.vocabulary.vocab_size]  # a network has all values of an id's bits
        weight, masked = settings.visible_weight, len(ids) * expected_masked(ids.shape[1], settings.schedule)
        targets = torch.where(mask, ids, IGNORED).flatten()  # boolean indexing would sync the host
        summed = partial(F.cross_entropy, logits, label_smoothing=settings.label_smoothing, reduction="sum")
        total = summed(targets)
        if weight:
            total = total + weight * summed(torch.where(mask, IGNORED, ids).flatten())
        loss = total / (masked + weight * (ids.numel() - masked))
        with torch.no_grad():
            nll = F.cross_entropy(logits, targets, reduction="sum") / masked
            accuracy = (logits.argmax(dim=-1) == targets).float().sum() / masked
        return Loss(loss, None, None, {"loss": loss.detach(), "cross_entropy": nll, "accuracy": accuracy})


class GeneratorTask(Task):
    """Stage 2.

    Raises:
        DataError: the tokens are missing or damaged, or the held-out ones are another tokenizer's.
        TrainingError: ``generator.tokenizer`` did not make the tokens, or the held-out tokens have other classes.
    """

    source: TokenDataset

    def __init__(self, config: Config, world: World, report: Callable[[str], None]):
        super().__init__(config, world, report)
        self.source = TokenDataset(config.data.train)
        self.vocabulary = self.source.metadata.vocabulary
        self.held_out = TokenDataset(config.data.val, self.vocabulary.tokenizer) if config.data.val else None
        if self.held_out is not None:
            theirs, ours = self.held_out.metadata.vocabulary.shape, self.vocabulary.shape
            if theirs != ours:
                raise TrainingError(
                    f"{config.data.val} has {theirs}, {config.data.train} has {ours}. Tokenize both at one size."
                )
            difference = class_difference(self.held_out.classes, self.vocabulary.classes)
            if difference:
                raise TrainingError(
                    f"{config.data.val} has other classes than {config.data.train}: {difference}. Tokenize both from "
                    "sources with the same classes."
                )
        self.tokenizer = self._load_tokenizer() if world.main else None
        seed_global(config.trainer.seed, Stream.WEIGHTS)
        self.model = Generator(config, self.vocabulary).to(world.device)
        self.module = GeneratorStage(self.model)
        self.norm_controlled = {}
        report(f"tokens of {self.vocabulary.model}: {self.vocabulary.ids} ids of {self.vocabulary.id_bits} bits")

    def _load_tokenizer(self) -> FlowMo | None:
        name, vocabulary = self.config.generator.tokenizer, self.vocabulary
        if not name:
            return None
        tokenizer = load(name, device=str(self.world.device))
        if tokenizer.identity() != vocabulary.tokenizer:
            raise TrainingError(
                f"generator.tokenizer={name} is {tokenizer.identity()}, the tokens are of {vocabulary.tokenizer} "
                f"({vocabulary.model})."
            )
        return tokenizer

    def source_identity(self) -> str:
        return self.source.metadata.samples_identity()

    def forecast_arguments(self) -> tuple[Config, bool, Vocabulary]:
        return self.config, False, self.vocabulary

    def loss(self, module: nn.Module, microbatch: Tensor, first: int, statistics: None) -> Loss:
        indices = range(first, first + len(microbatch))
        noise = GeneratorNoise.of(self.config, self.vocabulary.ids, indices, microbatch.device)
        seed_global(self.config.trainer.seed, Stream.DROPOUT, first)
        with autocast(self.config, self.world.device):
            return module(microbatch[:, 1:], self._labels(microbatch[:, 0], noise.keep), noise.mask)

    def _labels(self, labels: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep & (labels != NO_CLASS), labels, self.model.null_class)

    # Evaluation

    def build_ema(self, weights: Mapping[str, Tensor]) -> Generator:
        return build_generator(self.config, self.vocabulary, weights).to(self.world.device)

    def evaluate(self, model: Generator) -> dict[str, float]:
        """Return the cross-entropy of masked held-out ids, if there are any, with the same mask each time."""
        if self.held_out is None:
            return {}
        device, batch_size = self.world.device, self.config.eval.batch_size
        chosen = evenly_spread(self.config.eval.images, len(self.held_out))
        total = count = 0.0
        for start in range(0, len(chosen), batch_size):
            indices = chosen[start : start + batch_size]
            rows = torch.stack([self.held_out.load(index, 0)[0] for index in indices]).to(device)
            noise = GeneratorNoise.of(self.config, self.vocabulary.ids, indices, device, 0, Stream.HELD_OUT)
            labels = self._labels(rows[:, 0], torch.ones_like(noise.keep))
            with torch.no_grad(), autocast(self.config, device):
                logits = model.network(rows[:, 1:], noise.mask, labels)[..., : self.vocabulary.vocab_size]
            targets = rows[:, 1:][noise.mask]
            total += float(F.cross_entropy(logits[noise.mask].float(), targets, reduction="sum"))
            count += len(targets)
        return {"cross_entropy": total / count}

    def sample(self, model: Generator) -> tuple[Image.Image | None, dict[str, float]]:
        """Sample classes spread over all, and decode them if ``generator.tokenizer`` is set."""
        metrics = self.evaluate(model)
        if self.tokenizer is None:
            return None, metrics
        classes = len(self.vocabulary.classes)
        labels = evenly_spread(min(SAMPLES, classes), classes) if classes else [-1] * SAMPLES
        with autocast(self.config, self.world.device):
            ids = model.sample(labels)
            size = (self.vocabulary.image_size,) * 2
            images = self.tokenizer.decode(ids, seed=list(range(len(ids))), size=size)
        return to_pil(grid([self.tokenizer.pixels.visible(images)])), metrics

    # Checkpoints

    def metadata(self) -> dict[str, Any]:
        return {"vocabulary": {**asdict(self.vocabulary), "classes": list(self.vocabulary.classes)}}

    def check(self, path: Path, metadata: Mapping[str, Any]) -> None:
        if metadata["stage"] != self.config.stage:
            raise TrainingError(f"{path} holds a tokenizer, not a generator.")
        tokenizer, classes = metadata["vocabulary"]["tokenizer"], metadata["vocabulary"]["classes"]
        if tokenizer != self.vocabulary.tokenizer:
            raise TrainingError(
                f"{path} was trained on ids of tokenizer {tokenizer}, the tokens are of {self.vocabulary.tokenizer}."
            )
        theirs = Vocabulary(**metadata["vocabulary"]).shape
        if theirs != self.vocabulary.shape:
            raise TrainingError(
                f"{path} was trained on {theirs}, {self.config.data.train} has {self.vocabulary.shape}."
            )
        difference = class_difference(self.vocabulary.classes, classes)
        if difference:
            raise TrainingError(f"{self.config.data.train} has other classes than {path} was trained on: {difference}.")
        before = Config.from_dict(metadata["config"]).generator_architecture()
        check_same_settings(before, self.config.generator_architecture(), path, "generator")

    def foreign_weights(self, path: Path) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Yield the weights of a generator's ``.safetensors`` file, once as ``model``, once as ``ema``."""
        if path.suffix != ".safetensors":
            raise TrainingError(f"{path} is not a training checkpoint.")
        generator = load_generator(path)
        config = generator.config
        self.check(
            path, {"stage": config.stage, "vocabulary": asdict(generator.vocabulary), "config": config.to_dict()}
        )
        for part in ("model", "ema"):
            yield part, generator.state_dict()
