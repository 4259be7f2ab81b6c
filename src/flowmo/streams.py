"""Random streams: every use of a seed has a purpose, and each purpose draws from a stream of its own.

A stream is named by seed, purpose and index; a hash of the name seeds its generator. Two uses with one seed would
otherwise draw the same numbers, such as timesteps that follow the noise. Streams of different names coincide by chance
only, for 1 pair in 2³² on a CPU, whose generator reads 32 bits of its seed.

``flowmo.model.sampler.seeded_noise`` alone takes a seed as it is: what a seed decodes to must not change.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

import torch


class Stream(StrEnum):
    """What a stream is for; the comment names its index."""

    SAMPLE = ""  # image of a set; no name in the key, so that published samples keep their seeds
    GENERATED = "picture"  # image of a generated set
    IDS = "ids"
    EDIT = "edit"
    WEIGHTS = "weights"
    ORDER = "epoch"  # epoch
    ITEM = "item"  # position in the run
    TOKENIZED = "tokenized"  # image of the source, crop
    CROP = "crop"
    SUBSTITUTE = "substitute"  # attempt
    TIMESTEP = "timestep"  # this and all below: position in the run
    NOISE = "noise"
    CODE_DROP = "code drop"
    CHAIN_NOISE = "chain noise"
    CHAIN_TIMES = "chain times"
    CHAIN_DROP = "chain drop"
    JUMPS = "jumps"
    CUT = "cut"
    PREFIX = "prefix"
    CROP_SIZE = "crop size"  # batch
    CROP_TOP = "crop top"
    CROP_LEFT = "crop left"
    BOTTLENECK = "bottleneck"
    HIDDEN = "hidden"
    LABEL_DROP = "label drop"
    DROPOUT = "dropout"
    HELD_OUT = "held out"  # index in the held-out source
    CODEBOOK = "codebook"  # step
    CONTEXT_MODEL = "context model"
    REVEAL_ORDER = "reveal order"
    SCORE_ORDER = "score order"
    BASIS = "basis"
    PROBES = "probes"
    STUDY = "study"
    BENCHMARK = "benchmark"


def stream_seed(seed: int, purpose: Stream, *index: int) -> int:
    """Seed of a stream, from 0 to 2⁶³ − 1."""
    key = " ".join([*purpose.split(), *map(str, index)])
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "big") >> 1


def stream(seed: int, purpose: Stream, *index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator at the start of a stream."""
    return torch.Generator(device).manual_seed(stream_seed(seed, purpose, *index))


def seed_global(seed: int, purpose: Stream, *index: int) -> None:
    """Start torch's global generators at a stream, for code that takes no generator, such as dropout."""
    torch.manual_seed(stream_seed(seed, purpose, *index))
