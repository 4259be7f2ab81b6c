"""A small GPT on a tokenizer's ids: the autoregressive generator beside MaskGiT, in one file.

    flowmo tokenize IMAGES --out tokens --flip
    python examples/gpt.py train tokens --out gpt.pt --minutes 15
    python examples/gpt.py sample gpt.pt --label "golf ball" --count 8 --out samples.png
    python examples/gpt.py bits gpt.pt HELD_OUT_TOKENS

The ids of an image are read in order, token after token and sub-token after sub-token, behind a class token. Each id is
predicted from the ones before it (van den Oord et al. 2016, Esser et al. 2021). Positions are rotary (Su et al. 2021).
Classifier-free guidance mixes the logits of the class with those of no class, which training shows for a tenth of the
images. Sampling keeps keys and values of earlier positions, so that a position costs one pass over one id.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flowmo
from flowmo.data.tokens import Tokens
from flowmo.evaluate.metrics.pairs import grid
from flowmo.generate.classes import find_class
from flowmo.images import to_pil

NO_CLASS_SHARE = 0.1


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the network and the ids that it predicts."""

    tokens: int
    sub_tokens: int
    id_count: int
    classes: tuple[str, ...]
    tokenizer: str
    model: str
    depth: int = 6
    width: int = 256
    heads: int = 4

    @property
    def length(self) -> int:
        """Ids per image."""
        return self.tokens * self.sub_tokens


class Attention(nn.Module):
    """Causal attention with rotary positions and a cache."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, cache: list[Tensor] | None) -> Tensor:
        """x: b n d, rotation: complex n d/2/heads. A cache holds keys and values of all earlier positions."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # b h n d
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            if cache:
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
            cache[:] = [k, v]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate channel pairs of b h n d by one angle per position and pair."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention = Attention(config)
        self.mlp_in = nn.Linear(config.width, 4 * config.width, bias=False)
        self.mlp_out = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, cache: list[Tensor] | None) -> Tensor:
        x = x + self.attention(norm(x), rotation, cache)
        return x + self.mlp_out(F.gelu(self.mlp_in(norm(x))))


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


class GPT(nn.Module):
    """Logits of every id given the class and the ids before it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Embedding(len(config.classes) + 1, config.width)  # the last is no class
        self.embedding = nn.Embedding(config.sub_tokens * config.id_count, config.width)
        self.sub_token = nn.Parameter(torch.zeros(config.sub_tokens, config.width))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.heads = nn.Parameter(torch.zeros(config.sub_tokens, config.width, config.id_count))
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.attention.proj.weight)
            nn.init.zeros_(block.mlp_out.weight)
        half = config.width // config.heads // 2
        angles = torch.outer(torch.arange(config.length), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, ids: Tensor, labels: Tensor, caches: list[list[Tensor]] | None = None) -> Tensor:
        """Predict the id at each position.

        Args:
            ids: int64 b × n, the ids before the last position predicted; n is from 0 to ``length`` − 1.
            labels: int64 b; ``len(classes)`` is no class.
            caches: one list per block from an earlier call. The call then predicts the last position alone.

        Returns:
            Logits b × (n + 1) × id_count, or b × 1 × id_count with caches that are filled.
        """
        config = self.config
        position = torch.arange(ids.shape[1] + 1, device=ids.device)  # of the id that is predicted
        kind = position % config.sub_tokens
        x = torch.cat((self.class_embedding(labels)[:, None], self.embedding(ids + kind[:-1] * config.id_count)), dim=1)
        x = x + self.sub_token[kind]
        if caches is not None and caches[0]:
            x, position, kind = x[:, -1:], position[-1:], kind[-1:]
        for number, block in enumerate(self.blocks):
            x = block(x, self.rotation[position], None if caches is None else caches[number])
        return torch.einsum("bnd,ndv->bnv", norm(x), self.heads[kind])

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: torch.Generator, guidance: float, temperature: float) -> Tensor:
        """Draw ids b × tokens × sub-tokens."""
        count, none = len(labels), torch.full_like(labels, len(self.config.classes))
        both = torch.cat((labels, none)) if guidance != 1 else labels
        ids, caches = labels.new_empty(count, 0), [[] for _ in self.blocks]
        for _ in range(self.config.length):
            logits = self(ids.repeat(len(both) // count, 1), both, caches)[:, -1].float()
            if guidance != 1:
                logits = logits[count:] + guidance * (logits[:count] - logits[count:])
            drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            ids = torch.cat((ids, drawn), dim=1)
        return ids.unflatten(1, (self.config.tokens, self.config.sub_tokens))


def batches(tokens: Tokens, size: int, generator: torch.Generator):
    """Yield shuffled (ids b × length, labels b) without end."""
    while True:
        for chunk in torch.randperm(len(tokens), generator=generator).split(size):
            if len(chunk) == size:
                yield read(tokens, chunk.tolist())


def read(tokens: Tokens, indices: list[int]) -> tuple[Tensor, Tensor]:
    labels = [tokens.label(index) for index in indices]
    none = len(tokens.metadata.classes)
    return torch.stack([tokens.ids(index).flatten() for index in indices]), torch.tensor(
        [none if label is None else label for label in labels]
    )


def loss_of(model: GPT, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of an id, in nats."""
    return F.cross_entropy(model(ids[:, :-1], labels).flatten(0, 1).float(), ids.flatten())


def train(arguments: argparse.Namespace) -> None:
    tokens = Tokens(arguments.tokens)
    about = tokens.metadata
    config = GPTConfig(
        *(about.tokens, about.sub_tokens, about.vocab_size, tuple(about.classes), about.tokenizer, about.model),
        *(arguments.depth, arguments.width, arguments.width // 64),
    )
    torch.manual_seed(arguments.seed)
    model, generator = GPT(config).to(arguments.device), torch.Generator().manual_seed(arguments.seed)
    optimizer = torch.optim.AdamW(model.parameters(), arguments.lr, (0.9, 0.95), weight_decay=0.05)
    start = time.monotonic()
    for step, (ids, labels) in enumerate(batches(tokens, arguments.batch_size, generator)):
        share = (time.monotonic() - start) / (60 * arguments.minutes)
        if share >= 1:
            break
        for group in optimizer.param_groups:  # warm-up, then a cosine over the time that is given
            group["lr"] = arguments.lr * min((step + 1) / 50, 1) * (0.5 + 0.5 * math.cos(math.pi * share))
        labels[torch.rand(len(labels), generator=generator) < NO_CLASS_SHARE] = len(config.classes)
        with torch.autocast(arguments.device, torch.bfloat16):
            loss = loss_of(model, ids.to(arguments.device), labels.to(arguments.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}  {share:.0%}  {loss.item() / math.log(2):.3f} bits per id", flush=True)
    torch.save({"config": asdict(config), "model": model.state_dict()}, arguments.out)


def load_gpt(path: Path, device: str) -> GPT:
    content = torch.load(path, weights_only=True, map_location=device)
    model = GPT(GPTConfig(**content["config"])).to(device)
    model.load_state_dict(content["model"])
    return model.eval()


def sample(arguments: argparse.Namespace) -> None:
    model, tokenizer = load_gpt(arguments.gpt, arguments.device), flowmo.load(arguments.model, device=arguments.device)
    if tokenizer.identity() != model.config.tokenizer:
        raise SystemExit(f"{arguments.gpt} is for the ids of another tokenizer, {model.config.model}.")
    label = find_class(arguments.label, model.config.classes)
    labels = torch.full((arguments.count,), label, device=arguments.device)
    generator = torch.Generator(arguments.device).manual_seed(arguments.seed)
    ids = model.sample(labels, generator, arguments.guidance, arguments.temperature)
    to_pil(grid([tokenizer.decode(ids, seed=arguments.seed).cpu()])).save(arguments.out)


@torch.no_grad()
def bits(arguments: argparse.Namespace) -> None:
    """Print the mean number of bits that an ideal coder takes per id and per image."""
    model, tokens = load_gpt(arguments.gpt, arguments.device), Tokens(arguments.tokens, None)
    total, count = 0.0, min(len(tokens), arguments.limit)
    for chunk in torch.arange(count).split(arguments.batch_size):
        ids, labels = read(tokens, chunk.tolist())
        none = torch.full_like(labels, len(model.config.classes)) if arguments.no_class else labels
        total += loss_of(model, ids.to(arguments.device), none.to(arguments.device)).item() * len(chunk)
    per_id = total / count / math.log(2)
    print(f"{per_id:.3f} bits per id, {per_id * model.config.length / 8:.1f} bytes per image, {count} images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("train")
    sub.set_defaults(run=train)
    sub.add_argument("tokens", type=Path)
    sub.add_argument("--out", type=Path, default=Path("gpt.pt"))
    sub.add_argument("--minutes", type=float, default=15)
    sub.add_argument("--depth", type=int, default=6)
    sub.add_argument("--width", type=int, default=256)
    sub.add_argument("--lr", type=float, default=1e-3)
    sub = commands.add_parser("sample")
    sub.set_defaults(run=sample)
    sub.add_argument("gpt", type=Path)
    sub.add_argument("--model", default="nano")
    sub.add_argument("--label", required=True)
    sub.add_argument("--count", type=int, default=8)
    sub.add_argument("--guidance", type=float, default=2.0)
    sub.add_argument("--temperature", type=float, default=1.0)
    sub.add_argument("--out", type=Path, default=Path("samples.png"))
    sub = commands.add_parser("bits")
    sub.set_defaults(run=bits)
    sub.add_argument("gpt", type=Path)
    sub.add_argument("tokens", type=Path)
    sub.add_argument("--limit", type=int, default=1000)
    sub.add_argument("--no-class", action="store_true", help="as a decoder that does not know the class would")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
