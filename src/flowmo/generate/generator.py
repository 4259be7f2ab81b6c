"""A trained MaskGiT: classes in, a tokenizer's ids out (stage 2), and how likely given ids are."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.checkpoint.distributed import is_sharded
from flowmo.checkpoint.eight_bit import expand, stored
from flowmo.checkpoint.files import GENERATOR as STAGE
from flowmo.checkpoint.files import CheckpointError, finite, on_meta, read_pth, read_shards, write_whole
from flowmo.config import Config, ConfigError
from flowmo.data.tokens import Vocabulary
from flowmo.generate.classes import GenerationError, class_titles, find_class
from flowmo.generate.network import build_network
from flowmo.generate.schedules import halton_order, hidden_counts
from flowmo.model.cpu_prepack import Packable
from flowmo.precision import computing
from flowmo.streams import Stream, stream
from flowmo.tokenizer import identity_of

FORMAT = "flowmo-generator-1"
MAX_ID_BITS = 32


class Generator(Packable):
    """Draws ids of pictures of a class, all at once in a few steps (Chang et al. 2022).

    Fresh weights are random; ``load_generator`` gives trained ones.

    Args:
        config: its ``generator`` section.
        vocabulary: of the tokenizer whose ids it draws; decode them with no other.
    """

    def __init__(self, config: Config, vocabulary: Vocabulary):
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        classes = len(vocabulary.classes)
        self.network = build_network(config.generator, vocabulary.id_bits, vocabulary.ids, classes)
        self.null_class = classes
        self.chunk_size: int | None = None

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Those made of blocks, by name."""
        return {"network": self.network}

    def identity(self) -> str:
        """16 hex digits that name these weights, this architecture and the tokenizer whose ids they draw."""
        architecture = self.config.generator_architecture()
        if architecture["network"] == "maskgit":  # the only one when identities began
            del architecture["network"]
        vocabulary = {name: value for name, value in asdict(self.vocabulary).items() if value is not None}
        return identity_of({**architecture, **vocabulary}, self)

    def label(self, name: str | int) -> int:
        """The index of a class by its name, its WordNet id or its index, see ``flowmo.generate.classes.find_class``.

        Text of digits is a class's name if there is one, else an index; an int is always an index.

        Raises:
            GenerationError: no such class, or a name of several.
        """
        return find_class(name, self.vocabulary.classes)

    def class_name(self, label: int) -> str:
        """What people call a class, so that no other is called the same."""
        return "no class" if label == -1 else class_titles(self.vocabulary.classes)[label]

    def guidance_in_words(self, guidance: float | None = None) -> str:
        """A guidance with the convention that its number follows; the generator's own where ``None``."""
        own = self.config.generator
        start, none = (own.guided_from, 0) if own.guided_from == "class" else (own.guided_from, 1)
        return (
            f"guidance {own.guidance if guidance is None else guidance:g}: {start} + g · (class − null), none at {none}"
        )

    # Sampling

    @torch.no_grad()
    def sample(
        self,
        labels: Sequence[int] | Tensor,
        seeds: Sequence[int] | int = 0,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        last_temperature: float | None = None,
        choice_temperature: float | None = None,
        order: str | None = None,
        ids: Tensor | None = None,
        keep: Tensor | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Ids of one picture a label; a picture's are a function of its label and its seed alone.

        Args:
            labels: numbers of classes; −1 or ``null_class`` for none.
            seeds: one a picture, or a first one that is counted up.
            guidance: in the convention of ``generator.guided_from``.
            steps, temperature, last_temperature, choice_temperature, order: see ``flowmo info --settings``;
                the generator's own where ``None``.
            ids: int64 b × tokens × sub-tokens to start from, together with ``keep``.
            keep: bool of the same shape, or tokens × sub-tokens for all; these ids stay, the others are drawn anew.
            progress: called with (steps done, steps in all).

        Returns:
            int64 b × tokens × sub-tokens, as ``FlowMo.decode`` takes them.

        Raises:
            GenerationError: a label, ids, or a number out of range.
        """
        own = self.config.generator
        steps = own.sample_steps if steps is None else steps
        guidance = own.guidance if guidance is None else guidance
        scale = guidance + (own.guided_from == "class")  # class + g (class - null) = null + (g + 1) (class - null)
        first = own.temperature if temperature is None else temperature
        last = own.last_temperature if last_temperature is None else last_temperature
        noise = own.choice_temperature if choice_temperature is None else choice_temperature
        order = own.order if order is None else order
        if steps < 1 or not first > 0 or not last > 0 or not noise >= 0:
            raise GenerationError("sampling needs at least 1 step and temperatures above 0")
        labels = self._labels(labels)
        numbers = list(seeds) if not isinstance(seeds, int) else [seeds + i for i in range(len(labels))]
        if len(numbers) != len(labels):
            raise GenerationError(
                f"{len(numbers)} seeds for {len(labels)} pictures; give one a picture, or a first one"
            )
        start, hidden = self._start(len(labels), ids, keep)
        rows, chunks = [], list(self._chunks(len(labels)))
        for i, chunk in enumerate(chunks):
            generators = [stream(numbers[k], Stream.IDS) for k in chunk]
            x, open_ = start[chunk].to(self.device), hidden[chunk].to(self.device)
            counts = [hidden_counts(max(int(n), 1), steps, own.schedule) for n in hidden[chunk].sum(dim=1)]
            ranks = None if order == "confidence" else self._ranks(order, generators)
            for step in range(steps):
                # TiTok's first step is already a step on the way from the first temperature to the last.
                share = (step + 1) / steps if own.drawing == "gumbel" else step / max(steps - 1, 1)
                x, open_ = self._step(
                    x, open_, labels[chunk], generators,
                    [row[step] for row in counts], scale, first + (last - first) * share, noise * (1 - share), ranks,
                )  # fmt: skip
                if progress:
                    progress(i * steps + step + 1, len(chunks) * steps)
            rows.append(x.cpu())
        return torch.cat(rows)[: len(labels)].unflatten(1, (self.vocabulary.tokens, self.vocabulary.sub_tokens))

    def _step(
        self,
        ids: Tensor,
        hidden: Tensor,
        labels: Tensor,
        generators: Sequence[torch.Generator],
        left: Sequence[int],
        guidance: float,
        temperature: float,
        noise: float,
        ranks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Draw every hidden id and keep the best; ``left[i]`` of picture i stay hidden. Returns ids and hidden."""
        logits = self.guided_logits(ids, hidden, labels, guidance) / temperature
        uniform = torch.stack([torch.rand(2, ids.shape[1], generator=g) for g in generators]).to(self.device)
        if self.config.generator.drawing == "gumbel":
            more = torch.stack([torch.rand(logits.shape[1:], generator=g) for g in generators]).to(self.device)
            drawn = (logits + noise * gumbel(more)).argmax(dim=-1)
            confidence = logits.gather(-1, drawn[..., None])[..., 0]
        else:
            shares = logits.softmax(dim=-1)
            sums = shares.cumsum(dim=-1)
            # Times the last sum, which rounding leaves beside 1, so that every draw finds an id.
            drawn = torch.searchsorted(sums, (uniform[:, 0] * sums[..., -1])[..., None], right=True)[..., 0]
            drawn = drawn.clamp(max=logits.shape[-1] - 1)
            confidence = shares.gather(-1, drawn[..., None])[..., 0].clamp(min=1e-20).log()
        score = confidence + noise * gumbel(uniform[:, 1]) if ranks is None else -ranks.to(self.device, torch.float32)
        place = score.masked_fill(~hidden, torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        visible = ids.shape[1] - torch.tensor(left, device=self.device)[:, None]
        reveal = hidden & (place < visible)
        return torch.where(reveal, drawn, ids), hidden & ~reveal

    def guided_logits(self, ids: Tensor, hidden: Tensor, labels: Tensor, guidance: float = 1.0) -> Tensor:
        """Logits b n v in float32; null + guidance · (of the class − null), without a null pass where it is 1.

        The network has a logit for each id of ``id_bits`` bits. Those that the tokenizer has not are −∞.
        """
        labels = labels.to(self.device)
        if guidance == 1:
            logits = self._logits(ids, hidden, labels)
        else:
            null = torch.full_like(labels, self.null_class)
            both = self._logits(ids.repeat(2, 1), hidden.repeat(2, 1), torch.cat((labels, null)))
            given, free = both.chunk(2)
            logits = free + guidance * (given - free)
        logits[..., self.vocabulary.vocab_size :] = -torch.inf
        return logits

    def _logits(self, ids: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        with computing(self.precision, self.device):
            return self.network(ids, hidden, labels).float()

    # Likelihood

    @torch.no_grad()
    def log_prob(
        self, ids: Tensor, labels: Sequence[int] | Tensor | None = None, steps: int | None = None, order: str = "halton"
    ) -> Tensor:
        """Natural logarithm of the probability of each picture's ids: float64 b.

        A masked model has no one likelihood: this is that of revealing the ids in a fixed order in ``steps`` steps,
        those of a step independently, which is how a codec can use it. The probabilities of all ids add up to 1.

        Args:
            ids: int64 b × tokens × sub-tokens.
            labels: numbers of classes; none where ``None``.
            steps: more take longer and predict better. Preset: 64.
            order: ``halton`` or ``random``, drawn once for all.

        Raises:
            GenerationError: ids or labels out of range, or another order.
        """
        classes = self._labels(labels if labels is not None else [-1] * len(ids))
        flat = self._flat(ids)
        if len(flat) != len(classes):
            raise GenerationError(f"{len(classes)} labels for {len(flat)} pictures")
        totals = []
        for chunk in self._chunks(len(classes)):
            x, total = flat[chunk].to(self.device), torch.zeros(len(chunk), dtype=torch.float64)
            for hidden, revealed in self.reveal_plan(steps, order):
                mask = hidden.to(self.device).expand(len(chunk), -1)
                logits = self.guided_logits(x.masked_fill(mask, 0), mask, classes[chunk])
                shares = logits[:, revealed].log_softmax(dim=-1).gather(-1, x[:, revealed, None])[..., 0]
                total += shares.double().sum(dim=1).cpu()
            totals.append(total)
        return torch.cat(totals)[: len(classes)]

    def reveal_plan(self, steps: int | None = None, order: str = "halton") -> Iterator[tuple[Tensor, Tensor]]:
        """For each step of a fixed order: what is hidden before it, bool n, and the places that it reveals, int64."""
        if order not in ("halton", "random"):
            raise GenerationError(f"order {order!r} is not fixed; use halton or random")
        own = self.config.generator
        n = self.vocabulary.ids
        places = self._ranks(order, [stream(0, Stream.REVEAL_ORDER)])[0].argsort()
        counts = [n, *hidden_counts(n, own.sample_steps if steps is None else steps, own.schedule)]
        for before, after in itertools.pairwise(counts):
            if before == after:
                continue
            hidden = torch.zeros(n, dtype=torch.bool)
            hidden[places[n - before :]] = True
            yield hidden, places[n - before : n - after]

    # What the methods above share

    def _ranks(self, order: str, generators: Sequence[torch.Generator]) -> Tensor:
        """When each place is revealed, int64 b n."""
        if order == "random":
            return torch.stack([torch.randperm(self.vocabulary.ids, generator=g) for g in generators])
        if order == "halton":
            ranks = halton_order(self.vocabulary.tokens, self.vocabulary.sub_tokens).argsort()
            return ranks.expand(len(generators), -1)
        raise GenerationError(f"unknown order {order!r}; use confidence, halton or random")

    def _labels(self, labels: Sequence[int] | Tensor) -> Tensor:
        labels = torch.as_tensor(labels, dtype=torch.int64).flatten()
        labels = torch.where(labels == -1, self.null_class, labels)
        if not len(labels) or labels.min() < 0 or labels.max() > self.null_class:
            raise GenerationError(f"labels run from 0 to {self.null_class - 1}, and −1 is none; give at least one")
        return labels

    def _flat(self, ids: Tensor) -> Tensor:
        v = self.vocabulary
        if ids.ndim != 3 or ids.shape[1:] != (v.tokens, v.sub_tokens) or ids.is_floating_point():
            raise GenerationError(f"ids have shape {tuple(ids.shape)}, not whole (batch, {v.tokens}, {v.sub_tokens})")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < v.vocab_size:
            raise GenerationError(
                f"ids run from {int(ids.min())} to {int(ids.max())}, not from 0 to {v.vocab_size - 1}"
            )
        return ids.flatten(1).long()

    def _start(self, count: int, ids: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids b n and which are hidden at first, bool b n."""
        n = self.vocabulary.ids
        if (ids is None) != (keep is None):
            raise GenerationError("give ids and keep together, or neither")
        if ids is None or keep is None:
            return torch.zeros(count, n, dtype=torch.int64), torch.ones(count, n, dtype=torch.bool)
        kept = keep.expand(ids.shape) if keep.shape == ids.shape[1:] else keep
        if len(ids) != count or kept.shape != ids.shape or kept.dtype != torch.bool:
            raise GenerationError(f"keep must be bool of the ids' shape, and there must be ids of {count} pictures")
        return self._flat(ids).cpu(), ~kept.flatten(1).cpu()

    def _chunks(self, count: int) -> Iterator[list[int]]:
        """Places in groups of one size, the last filled up by repeating, so that no batch changes a result."""
        size = self.chunk_size or (4 if self.device.type == "cpu" else 64)
        for start in range(0, count, size):
            yield [min(i, count - 1) for i in range(start, start + size)]


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise of uniform numbers in [0, 1)."""
    return -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))


# Files


def save_generator(generator: Generator, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write weights, settings and vocabulary as one ``.safetensors`` file."""
    if Path(path).suffix != ".safetensors":
        raise CheckpointError(f"{path}: generators are saved as .safetensors")
    state = stored(generator.state_dict(), dtype)
    # Machine paths of the training run are nobody else's business.
    config = generator.config.override("data.train=", "data.val=", "generator.tokenizer=")
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config.to_dict()),
        "vocabulary": json.dumps(asdict(generator.vocabulary)),
    }
    write_whole(path, lambda temporary: safetensors.torch.save_file(state, temporary, metadata))


def load_generator(
    path: str | Path, *overrides: str, device: str | torch.device = "cpu", ema: bool = True
) -> Generator:
    """A generator with trained weights, ready for sampling.

    Args:
        path: a ``.safetensors`` file of ``save_generator``, or a training checkpoint (``.pth``, or a sharded folder).
        overrides: ``generator.…`` settings to change, such as how it samples.
        ema: of a training checkpoint, the averaged weights rather than the last ones.

    Raises:
        CheckpointError: no such file, damaged, or no generator.
        ConfigError: an override that does not work.
    """
    path = Path(path)
    if not path.is_file() and not is_sharded(path):
        raise CheckpointError(f"{path}: no such generator")
    trained = path.suffix == ".pth" or path.is_dir()
    config, vocabulary, state = _read_checkpoint(path, ema) if trained else _read_safetensors(path)
    return build_generator(config.override(*overrides), vocabulary, state, path).to(device)


def _read_checkpoint(path: Path, ema: bool) -> tuple[Config, Vocabulary, Mapping[str, Tensor]]:
    state: Any  # whatever a file holds, until it is looked at
    if path.is_dir():
        facts, state = read_shards(path, ema)
    else:
        facts = read_pth(path)
        state = facts.get("ema" if ema else "model")
    if facts.get("stage") != STAGE:
        raise CheckpointError(f"{path}: holds no generator")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: a training checkpoint without weights")
    return *_parsed(path, facts.get("config", {}), facts.get("vocabulary", {})), state


def _read_safetensors(path: Path) -> tuple[Config, Vocabulary, Mapping[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: holds no generator")
            config, vocabulary = json.loads(metadata["config"]), json.loads(metadata["vocabulary"])
            state = expand({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except CheckpointError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({reason})") from None
    return *_parsed(path, config, vocabulary), state


def _parsed(path: Path, config: Mapping[str, Any], vocabulary: Mapping[str, Any]) -> tuple[Config, Vocabulary]:
    try:
        facts = Vocabulary(**{**vocabulary, "classes": tuple(vocabulary["classes"])})
        numbers = (facts.image_size, facts.tokens, facts.sub_tokens, facts.id_bits)
        if not all(isinstance(n, int) and n > 0 for n in numbers) or facts.id_bits > MAX_ID_BITS:
            raise TypeError("a vocabulary of no ids")
        if not all(isinstance(text, str) for text in (facts.tokenizer, facts.model, *facts.classes)):
            raise TypeError("names that are no text")
        return Config.from_dict(config), facts
    except (ConfigError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: holds settings that do not work: {reason}") from None


def build_generator(
    config: Config, vocabulary: Vocabulary, state: Mapping[str, Tensor], name: str | Path = "checkpoint"
) -> Generator:
    """A generator with the weights of ``state``, in float32 and evaluation mode. Raises ``CheckpointError``."""
    generator = on_meta(lambda: Generator(config, vocabulary), config.generator.depth, state, name)
    wanted = generator.state_dict()
    if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in wanted.items()}:
        raise CheckpointError(f"{name}: weights of another architecture")
    generator.load_state_dict(finite(state, name), assign=True)
    return generator.eval().requires_grad_(False)


def cross_entropy(logits: Tensor, ids: Tensor, hidden: Tensor) -> Tensor:
    """Mean over the hidden ids of all pictures, in nats: logits b n v, ids b n, hidden bool b n."""
    return F.cross_entropy(logits[hidden].float(), ids[hidden])
