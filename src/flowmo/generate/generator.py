"""A trained MaskGIT: samples a tokenizer's ids given a class (stage 2), and computes the likelihood of ids."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmo.checkpoint import CheckpointError, files
from flowmo.checkpoint.run_folder import best_checkpoint, is_sharded
from flowmo.config import Config, GeneratorConfig
from flowmo.data.tokens import Vocabulary
from flowmo.errors import one_line
from flowmo.generate.classes import GenerationError, class_titles, find_class
from flowmo.generate.network import build_network
from flowmo.generate.schedules import halton_order, masked_counts
from flowmo.model.inference import InferenceModel
from flowmo.precision import computing
from flowmo.streams import Stream, stream
from flowmo.tokenizer import identity_of

OVERRIDES = {
    *("steps", "guidance", "guided_from", "schedule", "drawing", "order"),
    *("temperature", "last_temperature", "choice_temperature"),
}
"""Settings that ``Generator.sample`` takes."""


class Generator(InferenceModel):
    """Samples the ids of images of a class, in a few parallel steps (Chang et al. 2022).

    Its weights are random; ``load_generator`` loads trained ones.

    Args:
        config: the ``generator`` section is used.
        vocabulary: the tokenizer's vocabulary. Only that tokenizer can decode the sampled ids.
    """

    default_chunk_sizes = (4, 64)

    def __init__(self, config: Config, vocabulary: Vocabulary):
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.null_class = len(vocabulary.classes)
        self.network = build_network(config.generator, vocabulary.id_bits, vocabulary.ids, self.null_class)

    def identity(self) -> str:
        """16 hex digits that identify the weights, the architecture and the tokenizer."""
        architecture = self.config.generator_architecture()
        if architecture["network"] == "maskgit":  # absent from the first identities
            del architecture["network"]
        vocabulary = {name: value for name, value in asdict(self.vocabulary).items() if value is not None}
        return identity_of({**architecture, **vocabulary}, self.state_dict())

    def label(self, name: str | int) -> int:
        """Return the index of a class by name, WordNet id or index; see ``flowmo.generate.classes.find_class``."""
        return find_class(name, self.vocabulary.classes)

    def class_name(self, label: int) -> str:
        """Return a display name that no other class shares. −1 and ``null_class`` are no class."""
        return "no class" if label in (-1, self.null_class) else class_titles(self.vocabulary.classes)[label]

    def guidance_in_words(self, guidance: float | None = None) -> str:
        """Describe a guidance scale, by default the generator's own, with its convention."""
        settings = self.config.generator
        origin, neutral = settings.guided_from, 0 if settings.guided_from == "class" else 1
        scale = settings.guidance if guidance is None else guidance
        return f"guidance {scale:g}: {origin} + g · (class − null), none at {neutral}"

    # Sampling

    @torch.no_grad()
    def sample(
        self,
        labels: Sequence[int] | Tensor,
        seeds: Sequence[int] | int = 0,
        *,
        ids: Tensor | None = None,
        keep: Tensor | None = None,
        progress: Callable[[int, int], None] | None = None,
        **overrides: Any,
    ) -> Tensor:
        """Sample the ids of one image per label. An image depends only on its label and its seed.

        Args:
            labels: class indices; −1 or ``null_class`` for no class.
            seeds: one per image, or the first of consecutive seeds.
            ids: int64 b × tokens × sub-tokens to start from; requires ``keep``.
            keep: bool of the same shape, or tokens × sub-tokens for all images; these ids stay, the others are sampled.
            progress: called with (steps done, total steps).
            overrides: ``steps``, ``guidance`` in the convention of ``guided_from``, ``temperature``,
                ``last_temperature``, ``choice_temperature``, ``order``, ``schedule`` and ``drawing``; see
                ``flowmo info --settings``. ``None`` and absent ones are the generator's own.

        Returns:
            int64 b × tokens × sub-tokens, as ``FlowMo.decode`` takes them.

        Raises:
            GenerationError: a label or an id is out of range.
            ConfigError: a setting is.
        """
        unknown = overrides.keys() - OVERRIDES
        if unknown:
            raise GenerationError(f"Sampling has no setting {min(unknown)!r}. It takes {', '.join(sorted(OVERRIDES))}.")
        overrides["sample_steps"] = overrides.pop("steps", None)
        given = {f"generator.{name}": value for name, value in overrides.items() if value is not None}
        settings = self.config.updated(given).generator
        labels = self._labels(labels)
        first: Any = seeds
        seeds = list(first) if np.ndim(first) else [int(first) + i for i in range(len(labels))]
        if len(seeds) != len(labels):
            raise GenerationError(
                f"There are {len(seeds)} seeds for {len(labels)} images. Give one each, or the first."
            )
        start, masks = self._initial_ids_and_mask(len(labels), ids, keep)
        rows, chunks = [], list(self.chunks(len(labels)))
        for i, chunk in enumerate(chunks):
            generators = [stream(seeds[k], Stream.IDS) for k in chunk]
            x, mask = start[chunk].to(self.device), masks[chunk].to(self.device)
            for step, after in enumerate(self._steps(x, mask, labels[chunk], generators, settings)):
                x = after
                if progress:
                    progress(i * settings.sample_steps + step + 1, len(chunks) * settings.sample_steps)
            rows.append(x.cpu())
        return torch.cat(rows)[: len(labels)].unflatten(1, (self.vocabulary.tokens, self.vocabulary.sub_tokens))

    def _steps(
        self, ids: Tensor, mask: Tensor, labels: Tensor, generators: Sequence[torch.Generator], s: GeneratorConfig
    ) -> Iterator[Tensor]:
        """Sample every masked id and unmask the best, step by step. Yields the ids after each step, b × n."""
        counts = [masked_counts(max(int(n), 1), s.sample_steps, s.schedule) for n in mask.sum(dim=1)]
        ranks = None if s.order == "confidence" else self._ranks(s.order, generators).to(self.device, torch.float32)
        scale = s.guidance + (s.guided_from == "class")  # class + g (class - null) = null + (g + 1) (class - null)
        for step, left in enumerate(zip(*counts, strict=True)):
            if step and not any(count[step - 1] for count in counts):  # all ids are set
                yield ids
                continue
            # TiTok starts its temperature schedule at 1/n, not 0
            share = (step + 1) / s.sample_steps if s.drawing == "gumbel" else step / max(s.sample_steps - 1, 1)
            temperature = s.temperature + (s.last_temperature - s.temperature) * share
            noise = s.choice_temperature * (1 - share)
            logits = self.guided_logits(ids, mask, labels, scale) / temperature
            uniform = torch.stack([torch.rand(2, ids.shape[1], generator=g) for g in generators]).to(self.device)
            if s.drawing == "gumbel":
                per_id = torch.stack([torch.rand(logits.shape[1:], generator=g) for g in generators]).to(self.device)
                sampled = (logits + noise * gumbel(per_id)).argmax(dim=-1)
                confidence = logits.gather(-1, sampled[..., None])[..., 0]
            else:
                sampled, confidence = draw(logits.softmax(dim=-1), uniform[:, 0])
            score = confidence + noise * gumbel(uniform[:, 1]) if ranks is None else -ranks
            rank = score.masked_fill(~mask, torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            unmask = mask & (rank < ids.shape[1] - torch.tensor(left, device=self.device)[:, None])
            ids, mask = torch.where(unmask, sampled, ids), mask & ~unmask
            yield ids

    def guided_logits(self, ids: Tensor, mask: Tensor, labels: Tensor, guidance: float = 1.0) -> Tensor:
        """Logits b × n × v in float32: null + guidance · (class − null).

        Guidance 1, and a generator without classes, need no null pass.

        The network has a logit for every id of ``id_bits`` bits; the logits of ids beyond the vocabulary are −∞.
        """
        labels = labels.to(self.device)
        with computing(self.precision, self.device):
            if guidance == 1 or not self.null_class:
                logits = self.network(ids, mask, labels).float()
            else:
                null = torch.full_like(labels, self.null_class)
                both = self.network(ids.repeat(2, 1), mask.repeat(2, 1), torch.cat((labels, null))).float()
                conditional, unconditional = both.chunk(2)
                logits = unconditional + guidance * (conditional - unconditional)
        logits[..., self.vocabulary.vocab_size :] = -torch.inf
        return logits

    # Likelihood

    @torch.no_grad()
    def log_prob(self, ids: Tensor, labels: Sequence[int] | Tensor | None = None, steps: int | None = None) -> Tensor:
        """Natural logarithm of the probability of each image's ids: float64 b.

        A masked model has no unique likelihood. This one unmasks the ids in the Halton order in ``steps`` steps. The
        ids of a step are independent, as in a codec. It is normalised.

        Args:
            ids: int64 b × tokens × sub-tokens.
            labels: class indices; no class by default.
            steps: more are slower and predict better; the generator's own by default.

        Raises:
            GenerationError: ids or labels out of range.
            ConfigError: a number of steps that ``sample`` does not take, either.
        """
        given = {} if steps is None else {"generator.sample_steps": steps}
        steps = self.config.updated(given).generator.sample_steps
        classes = self._labels(labels if labels is not None else [-1] * len(ids))
        flat = self._flat(ids)
        if len(flat) != len(classes):
            raise GenerationError(f"There are {len(classes)} labels for {len(flat)} images.")
        totals = []
        for chunk in self.chunks(len(classes)):
            x, total = flat[chunk].to(self.device), torch.zeros(len(chunk), dtype=torch.float64)
            for masked, unmasked in self.unmasking_plan(steps):
                mask = masked.to(self.device).expand(len(chunk), -1)
                logits = self.guided_logits(x.masked_fill(mask, 0), mask, classes[chunk])
                log_p = logits[:, unmasked].log_softmax(dim=-1).gather(-1, x[:, unmasked, None])[..., 0]
                total += log_p.double().sum(dim=1).cpu()
            totals.append(total)
        return torch.cat(totals)[: len(classes)]

    def unmasking_plan(self, steps: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each step of the Halton order the mask before it, bool n, and the positions that it unmasks."""
        settings, n = self.config.generator, self.vocabulary.ids
        positions = halton_order(self.vocabulary.tokens, self.vocabulary.sub_tokens)
        counts = [n, *masked_counts(n, settings.sample_steps if steps is None else steps, settings.schedule)]
        for before, after in itertools.pairwise(counts):
            if before > after:
                mask = torch.zeros(n, dtype=torch.bool)
                mask[positions[n - before :]] = True
                yield mask, positions[n - before : n - after]

    # Shared by sampling and likelihood

    def _ranks(self, order: str, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the rank of each position in a fixed order, ``halton`` or ``random``: int64 b × n."""
        if order == "random":
            return torch.stack([torch.randperm(self.vocabulary.ids, generator=g) for g in generators])
        ranks = halton_order(self.vocabulary.tokens, self.vocabulary.sub_tokens).argsort()
        return ranks.expand(len(generators), -1)

    def _labels(self, labels: Sequence[int] | Tensor) -> Tensor:
        labels = torch.as_tensor(labels, dtype=torch.int64).flatten()
        labels = torch.where(labels == -1, self.null_class, labels)
        if not len(labels) or labels.min() < 0 or labels.max() > self.null_class:
            known = f"Labels run from 0 to {self.null_class - 1}; −1 is no class."
            if not self.null_class:
                known = "This generator has no classes, so the only label is −1."
            raise GenerationError(f"Give at least one label. {known}")
        return labels

    def _flat(self, ids: Tensor) -> Tensor:
        v = self.vocabulary
        fits = ids.shape[1:] == (v.tokens, v.sub_tokens) and not ids.is_floating_point()
        if not fits or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < v.vocab_size):
            raise GenerationError(f"Give integers b × {v.tokens} × {v.sub_tokens} from 0 to {v.vocab_size - 1} as ids.")
        return ids.flatten(1).long()

    def _initial_ids_and_mask(self, count: int, ids: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        if ids is None and keep is None:
            shape = (count, self.vocabulary.ids)
            return torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)
        if ids is None or keep is None or len(ids) != count or keep.shape not in (ids.shape, ids.shape[1:]):
            raise GenerationError(f"Give ids of {count} images together with keep, a bool mask of their shape.")
        return self._flat(ids).cpu(), ~keep.bool().expand(ids.shape).flatten(1).cpu()


def draw(p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw ids from probabilities p, b × n × v, by uniform numbers b × n. Returns ids and their log-probabilities."""
    sums = p.cumsum(dim=-1)
    # the last sum may differ from 1 by rounding
    ids = torch.searchsorted(sums, (uniform * sums[..., -1])[..., None], right=True).clamp(max=p.shape[-1] - 1)
    return ids[..., 0], p.gather(-1, ids)[..., 0].clamp(min=1e-20).log()


def gumbel(uniform: Tensor) -> Tensor:
    """Turn uniform numbers in [0, 1) into Gumbel noise."""
    return -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))


# Files


def save_generator(generator: Generator, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write weights, settings and vocabulary as one ``.safetensors`` file."""
    vocabulary = json.dumps(asdict(generator.vocabulary))
    files.write_safetensors(
        path, generator.config, generator.state_dict(), dtype, format=files.GENERATOR_FORMAT, vocabulary=vocabulary
    )


def load_generator(
    path: str | Path, *overrides: str, device: str | torch.device = "cpu", ema: bool = True
) -> Generator:
    """Load a trained generator for sampling.

    Args:
        path: a ``.safetensors`` file of ``save_generator``, a training checkpoint (``.pth`` or a sharded folder), or a
            run's folder.
        overrides: ``generator.…`` settings to change, such as sampling settings.
        ema: take the EMA weights of a training checkpoint, not the last ones.

    Raises:
        CheckpointError: the file is missing, damaged or holds no generator.
        ConfigError: an override is invalid.
    """
    path = Path(path)
    if path.is_dir() and not is_sharded(path):
        path = best_checkpoint(path) or path
    if not path.is_file() and not is_sharded(path):
        raise CheckpointError(f"{path}: There is no such generator.")
    metadata, state = files.read_content(path, ema)
    if "vocabulary" not in metadata:
        raise CheckpointError(f"{path}: The file holds no generator.")
    try:
        given = metadata["vocabulary"]
        vocabulary = Vocabulary(**{**given, "classes": tuple(given["classes"])})
        config = Config.from_dict(metadata["config"])
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: The file is damaged or no generator ({one_line(error)}).") from None
    return build_generator(config.override(*overrides), vocabulary, state, path).to(device)


def build_generator(
    config: Config, vocabulary: Vocabulary, state: Mapping[str, Tensor], name: str | Path = "checkpoint"
) -> Generator:
    """Build a generator with the weights ``state``, in float32 and evaluation mode. Raises ``CheckpointError``."""
    return files.instantiate(lambda: Generator(config, vocabulary), config.generator.depth, state, name)
