"""Probabilities of a picture's bits by a stage-2 generator, for the range coder.

The generator reveals the ids in its fixed order, some at a time, and each bit of an id is coded from the highest with
its share of what is left of the generator's distribution. Unlike a ``ContextModel`` it computes in floating point, and
two machines may differ in the last digits. It does so in double precision and rounds to multiples of 2^−16: differences
in the 13th digit would reach another multiple about once in a million pictures, by estimate, and the file's checksum
would notice.
"""

from __future__ import annotations

import copy
import hashlib
from functools import cached_property

import numpy as np
import torch

from flowmo.codec.context import IDENTITY_BYTES, ONE, BitCoder, Bits
from flowmo.generate.generator import Generator

STEPS = 16


class GeneratorModel:
    """A generator in the place of a ``ContextModel``. Of a picture's class it knows nothing.

    Args:
        steps: in which the ids are revealed; more take longer and predict better.
    """

    def __init__(self, generator: Generator, steps: int = STEPS):
        self.generator, self.steps = generator, steps
        self.network = copy.deepcopy(generator.network).double().cpu().eval()
        self.tokenizer = generator.vocabulary.tokenizer

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens of a picture, and bits of a token."""
        v = self.generator.vocabulary
        return v.tokens, v.sub_tokens * v.id_bits

    @cached_property
    def identity(self) -> bytes:
        """Names the model in files that need it."""
        text = f"{self.generator.identity()} in {self.steps} steps"
        return hashlib.blake2b(text.encode(), digest_size=IDENTITY_BYTES).digest()

    @torch.no_grad()
    def run(self, pictures: int, code: BitCoder) -> Bits:
        """As ``ContextModel.run``, in another order: that of the generator, each id from its highest bit."""
        v, rows = self.generator.vocabulary, np.arange(pictures)
        ids = torch.zeros(pictures, v.ids, dtype=torch.int64)
        known: Bits = np.zeros((pictures, *self.shape), np.int8)
        nobody = torch.full((1,), self.generator.null_class)
        for hidden, revealed in self.generator.reveal_plan(self.steps, "halton"):
            shares = torch.cat([self.network(row[None], hidden[None], nobody)[:, revealed] for row in ids])
            counts = (shares.softmax(dim=-1) * ONE).round().long().numpy() + 1
            for i, place in enumerate(revealed.tolist()):
                token, sub = divmod(place, v.sub_tokens)
                left = counts[:, i]
                for bit in reversed(range(v.id_bits)):
                    halves = left.reshape(pictures, 2, -1)
                    unset, set_ = halves.sum(axis=-1).T
                    p = np.clip((set_ * ONE) // (unset + set_), 1, ONE - 1)
                    chosen = code(token, sub * v.id_bits + bit, p)
                    known[:, token, sub * v.id_bits + bit] = chosen
                    ids[:, place] |= torch.from_numpy(chosen.astype(np.int64) << bit)
                    left = halves[rows, chosen]
        return known
