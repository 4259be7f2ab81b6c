"""A small GPT on a tokenizer's ids: an autoregressive generator beside MaskGIT, in one file.

    flowmo tokenize IMAGES --output tokens --flip
    python examples/gpt.py train tokens gpt.pt
    python examples/gpt.py sample gpt.pt samples.png --classes "golf ball" church

An image is a sequence: its class, then its ids, token after token and sub-token after sub-token. The network predicts
each id from all elements before it (van den Oord et al. 2016, Esser et al. 2021). A tenth of the training images hide
their class, for classifier-free guidance. An interrupted ``train`` resumes with the same command.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

import flowmo
from flowmo.checkpoint.files import write_whole
from flowmo.cli.options import number
from flowmo.cli.output import status_of
from flowmo.codec.context import BitCoder
from flowmo.codec.generator import code_ids
from flowmo.data import TokenDataset, epoch_order
from flowmo.data.bits import Bits, token_bits
from flowmo.data.tokens import Vocabulary
from flowmo.evaluate.metrics.pairs import grid
from flowmo.generate.classes import find_class
from flowmo.images import to_pil
from flowmo.precision import multiplies_bfloat16
from flowmo.streams import Stream, seed_global, stream
from flowmo.tokenizer import identity_of
from flowmo.train.muon import Muon

CLASS_DROP, WARMUP, COOLDOWN, SAVE_EVERY = 0.1, 50, 0.4, 50
RUN = {"depth": 4, "width": 256, "steps": 800, "batch_size": 16, "lr": 4e-3, "muon_lr": 0.02, "seed": 0}
SAMPLING = {"count": 8, "guidance": 1.5, "temperature": 1.0, "top_k": 0, "seed": 0, "model": ""}
Cache = list[Tensor]
"""Keys and values of earlier positions, one tensor per block."""


class Block(nn.Module):
    """Causal attention with rotary positions (Su et al. 2021), then an MLP, both residual."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(width // 64, 1)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        for last in (self.proj, self.mlp_out):
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None, index: int) -> Tensor:
        q, k, v = self.qkv(norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # b heads n channels
        q, k = rotate(norm(q), positions).to(v.dtype), rotate(norm(k), positions).to(v.dtype)
        mask = None
        if cache is not None:
            earlier, here = slice(index, index + 1), torch.stack((k, v))
            cache[earlier] = [torch.cat((*cache[earlier], here), dim=-2)]
            k, v = cache[index]
            mask = positions[:, None] >= torch.arange(k.shape[2], device=x.device)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.relu(self.mlp_in(norm(x))).square())


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate channel pairs of b h n d, each by its own frequency times the position."""
    frequencies = 10000.0 ** -torch.linspace(0, 1, x.shape[-1] // 2, dtype=torch.float64, device=x.device)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class GPT(nn.Module):
    """Logits of ids. Its alphabet holds the ids of each sub-token, the classes, and no class (label ``no_class``)."""

    def __init__(self, vocabulary: Vocabulary, depth: int = 4, width: int = 256):
        super().__init__()
        self.vocabulary, self.no_class = vocabulary, len(vocabulary.classes)
        self.first_class = vocabulary.sub_tokens * vocabulary.vocab_size
        self.embedding = nn.Embedding(self.first_class + self.no_class + 1, width)
        self.position = nn.Embedding(vocabulary.ids, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.readout = nn.Parameter(torch.zeros(vocabulary.sub_tokens, width, vocabulary.vocab_size))
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.1)

    def sequence(self, labels: Tensor, ids: Tensor) -> Tensor:
        """Labels b and the first n ids of each image, b n -> the input of ``forward``, b × (1 + n)."""
        sub_tokens = torch.arange(ids.shape[1], device=ids.device) % self.vocabulary.sub_tokens
        return torch.cat((self.first_class + labels[:, None], ids + sub_tokens * self.vocabulary.vocab_size), dim=1)

    def forward(self, sequence: Tensor, cache: Cache | None = None) -> Tensor:
        """Predict the id behind each element: int64 b n -> logits b × n × vocab_size.

        A call appends to ``cache``, which is empty at first. The next call then takes only the elements that follow.
        """
        start = cache[0].shape[-2] if cache else 0
        positions = torch.arange(start, start + sequence.shape[1], device=sequence.device)
        x = norm(self.embedding(sequence) + self.position(positions))
        for index, block in enumerate(self.blocks):
            x = block(x, positions, cache, index)
        x, logits = norm(x), x.new_empty(*x.shape[:2], self.readout.shape[-1])
        for sub_token, matrix in enumerate(self.readout):
            here = positions % len(self.readout) == sub_token
            logits[:, here] = (x[:, here] @ matrix).to(logits.dtype)
        return logits

    def log_prob(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Natural logarithm of the probability of each id: ids b × tokens × sub-tokens, labels b -> b × all ids."""
        flat = ids.flatten(1)
        logits = self(self.sequence(labels, flat[:, :-1])).float()
        return -F.cross_entropy(logits.transpose(1, 2), flat, reduction="none")

    @torch.no_grad()
    def sample(
        self, labels: Tensor, generator: torch.Generator, guidance: float = 1, temperature: float = 1, top_k: int = 0
    ) -> Tensor:
        """Draw ids, int64 b × tokens × sub-tokens, of images of the classes ``labels``, int64 b.

        Logits are null + ``guidance`` · (class − null); 1 is no guidance. ``top_k`` 0 draws among all ids.
        """
        cache: Cache = []
        prompts = torch.cat((labels, torch.full_like(labels, self.no_class)))
        ids = labels.new_empty(len(labels), 0)
        for _ in range(self.vocabulary.ids):
            given, free = self(self.sequence(prompts, ids.repeat(2, 1))[:, -1:], cache)[:, 0].float().chunk(2)
            logits = free + guidance * (given - free)
            least = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1])).values[:, -1:]
            logits[logits < least] = -torch.inf
            drawn = torch.multinomial((logits / max(temperature, 1e-4)).softmax(dim=-1), 1, generator=generator)
            ids = torch.cat((ids, drawn), dim=1)
        return ids.unflatten(1, (self.vocabulary.tokens, self.vocabulary.sub_tokens))


class GPTCoder:
    """A GPT without a class as the context model of ``.flowmo`` files, in double precision so that both ends agree."""

    def __init__(self, model: GPT):
        self.model, v = copy.deepcopy(model).double().cpu(), model.vocabulary
        self.tokenizer, self.shape = v.tokenizer, (v.tokens, v.sub_tokens * v.id_bits)
        self.identity = bytes.fromhex(identity_of(asdict(v), model.state_dict()))

    @torch.no_grad()
    def run(self, images: int, code: BitCoder) -> Bits:
        v, cache = self.model.vocabulary, Cache()
        labels, ids = torch.full((images,), self.model.no_class), torch.empty(images, 0, dtype=torch.int64)
        for position in range(v.ids):
            logits = self.model(self.model.sequence(labels, ids)[:, -1:], cache)[:, 0]
            ids = torch.cat((ids, code_ids(code, logits, *divmod(position, v.sub_tokens))[:, None]), dim=1)
        return token_bits(ids.unflatten(1, (v.tokens, v.sub_tokens)).numpy(), v.id_bits)


def read_tokens(path: Path, tokenizer: str | None = None) -> tuple[Tensor, Tensor, Vocabulary]:
    """Read ids b × tokens × sub-tokens and labels b of a folder of ``flowmo tokenize``."""
    tokens = TokenDataset(path, tokenizer)
    ids, labels = default_collate([*tokens])
    return ids, labels.where(labels >= 0, len(tokens.classes)), tokens.metadata.vocabulary


def train(a: argparse.Namespace) -> None:
    """Train on a folder of tokens, or resume. A batch is a function of the seed and the step."""
    ids, labels, vocabulary = read_tokens(a.tokens)
    run = asdict(vocabulary) | {name: getattr(a, name) for name in RUN if name != "steps"}
    seed_global(a.seed, Stream.WEIGHTS)
    model, done = GPT(vocabulary, a.depth, a.width).to(a.device), 0
    tables = [model.embedding.weight, model.position.weight, model.readout]
    muon = Muon(model.blocks.parameters(), a.muon_lr, weight_decay=0.1)
    adam = torch.optim.AdamW(tables, betas=(0.9, 0.95))
    parts = model, muon, adam
    if a.gpt.exists():
        content = torch.load(a.gpt, weights_only=True, map_location=a.device)
        if content["run"] != run:
            raise SystemExit(f"{a.gpt} is of a run with other tokens or settings. Remove it, or name another file.")
        done = content["step"]
        for part, state in zip(parts, content["states"], strict=True):
            part.load_state_dict(state)
    epochs = range(math.ceil(a.steps * a.batch_size / len(ids)))
    order = torch.tensor([epoch_order(len(ids), a.seed, epoch) for epoch in epochs]).flatten()
    for step in range(done, a.steps):
        share = min((step + 1) / WARMUP, 1, (a.steps - step) / (COOLDOWN * a.steps))
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = share * a.muon_lr, share * a.lr
        batch = order[step * a.batch_size : (step + 1) * a.batch_size]
        dropped = torch.rand(len(batch), generator=stream(a.seed, Stream.LABEL_DROP, step)) < CLASS_DROP
        shown = labels[batch].masked_fill(dropped, model.no_class)
        with torch.autocast(a.device, torch.bfloat16, enabled=multiplies_bfloat16(torch.device(a.device))):
            loss = -model.log_prob(ids[batch].to(a.device), shown.to(a.device)).mean()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == a.steps:
            content = {"run": run, "step": step + 1, "states": [part.state_dict() for part in parts]}
            write_whole(a.gpt, partial(torch.save, content))
            print(f"step {step + 1}: {loss.item() / math.log(2):.3f} bits per id", flush=True)


def load_gpt(path: Path, device: str = "cpu") -> GPT:
    content = torch.load(path, weights_only=True, map_location=device)
    run = content["run"]
    vocabulary = Vocabulary(**{name: run[name] for name in Vocabulary.__dataclass_fields__})
    model = GPT(vocabulary, run["depth"], run["width"]).to(device)
    model.load_state_dict(content["states"][0])
    return model.eval()


def sample(a: argparse.Namespace) -> None:
    """Draw images of classes."""
    model = load_gpt(a.gpt, a.device)
    tokenizer = flowmo.load(a.model or model.vocabulary.model, device=a.device)
    if tokenizer.identity() != model.vocabulary.tokenizer:
        raise SystemExit(f"{a.gpt} is for the ids of {model.vocabulary.model}. Name that tokenizer with --model.")
    labels = torch.tensor(
        [find_class(name, model.vocabulary.classes) for name in a.classes or [*range(model.no_class)] or [-1]]
    )
    labels = labels.where(labels >= 0, model.no_class).repeat_interleave(a.count).to(a.device)
    ids = model.sample(labels, torch.Generator(a.device).manual_seed(a.seed), a.guidance, a.temperature, a.top_k)
    images = tokenizer.decode(ids, seed=list(range(len(ids)))).cpu()
    to_pil(grid(images.split(a.count))).save(a.out)


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    commands = parser.add_subparsers(required=True)
    for run, paths, options in ((train, ("tokens", "gpt"), RUN), (sample, ("gpt", "out"), SAMPLING)):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run)
        for name in paths:
            command.add_argument(name, type=Path)
        for name, value in options.items():
            kind = number(int, int(value > 0)) if isinstance(value, int) else type(value)
            command.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    command.add_argument("--classes", nargs="+", metavar="NAME", help="a row of images each; all by default")
    arguments = parser.parse_args()
    return status_of("gpt.py", lambda: arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
