"""Named random streams: every use of a seed draws from a generator of its own.

A hash of (seed, purpose, index) seeds each generator. Two streams share numbers only if their hashes collide: with
probability 2⁻³² on a CPU, whose generator reads 32 bits of its seed.

``flowmo.model.sampler.seeded_noise`` alone uses a seed directly, so that a seed decodes to the same image for ever.
"""

import hashlib
from enum import StrEnum

import torch


class Stream(StrEnum):
    """Purpose of a stream."""

    # index: position in the run. CODE_DROP … CROP_LEFT are drawn per image. BOTTLENECK (KL, LayerNorm, infill) and
    # DROPOUT seed a micro-batch by its first image, so there another split of the batch draws other numbers.
    ITEM = "item"
    TIMESTEP = "timestep"
    NOISE = "noise"
    CODE_DROP = "code drop"
    CHAIN_NOISE = "chain noise"
    CHAIN_TIMES = "chain times"
    CHAIN_DROP = "chain drop"
    JUMPS = "jumps"
    LPIPS_CROP = "cut"
    PREFIX = "prefix"
    CROP_TOP = "crop top"
    CROP_LEFT = "crop left"
    BOTTLENECK = "bottleneck"
    MASK = "hidden"
    LABEL_DROP = "label drop"
    DROPOUT = "dropout"

    # another index
    SAMPLE = ""  # image of a set; empty, because published samples used this seed
    GENERATED = "picture"  # image of a generated set; the value keeps the seeds of earlier samples
    ORDER = "epoch"  # epoch
    TOKENIZED = "tokenized"  # image of the source, crop
    SUBSTITUTE = "substitute"  # attempt
    CROP_SIZE = "crop size"  # batch
    HELD_OUT = "held out"  # index in the held-out source

    # no index
    IDS = "ids"
    WEIGHTS = "weights"
    CROP = "crop"
    CODEBOOK = "codebook"  # the step is the seed
    CONTEXT_MODEL = "context model"
    SET_ORDER = "score order"
    BASIS = "basis"
    PROBES = "probes"
    STUDY = "study"
    BENCHMARK = "benchmark"


def stream_seed(seed: int, purpose: Stream, *index: int) -> int:
    """Return the seed of a stream, from 0 to 2⁶³ − 1. An empty purpose adds nothing to the hash."""
    key = " ".join([*purpose.split(), *map(str, index)])
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "big") >> 1


def stream(seed: int, purpose: Stream, *index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator at the start of a stream."""
    return torch.Generator(device).manual_seed(stream_seed(seed, purpose, *index))


def seed_global(seed: int, purpose: Stream, *index: int) -> None:
    """Seed torch's global generators, for code that takes no generator, such as dropout."""
    torch.manual_seed(stream_seed(seed, purpose, *index))
