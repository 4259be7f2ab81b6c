"""A stage-2 generator as the context model of the range coder.

The generator unmasks the ids in its fixed order. Each bit of an id, from the highest, is coded with its share of the
remaining probability mass.

Unlike a ``ContextModel`` it computes in floating point, so two machines may differ in the last digits. Double
precision rounded to multiples of 2^−16 makes a mismatch unlikely: about one image in a million by estimate, and the
file's checksum detects it.
"""

from __future__ import annotations

import copy
import hashlib
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.codec.context import IDENTITY_BYTES, ONE, BitCoder
from flowmo.data.bits import Bits, token_bits
from flowmo.generate.generator import Generator

STEPS = 16


class GeneratorModel:
    """A generator that predicts bits as a ``ContextModel`` does, without a class condition.

    Args:
        steps: number of steps that unmask the ids; more are slower and predict better.
    """

    def __init__(self, generator: Generator, steps: int = STEPS):
        self.generator, self.steps = generator, steps
        self.network = copy.deepcopy(generator.network).double().cpu().eval()
        vocabulary = generator.vocabulary
        self.tokenizer = vocabulary.tokenizer
        self.shape = vocabulary.tokens, vocabulary.sub_tokens * vocabulary.id_bits

    @cached_property
    def identity(self) -> bytes:
        text = f"{self.generator.identity()} in {self.steps} steps"
        return hashlib.blake2b(text.encode(), digest_size=IDENTITY_BYTES).digest()

    @torch.no_grad()
    def run(self, images: int, code: BitCoder) -> Bits:
        v = self.generator.vocabulary
        ids = torch.zeros(images, v.ids, dtype=torch.int64)
        null_class = torch.full((1,), self.generator.null_class)
        for mask, unmasked in self.generator.unmasking_plan(self.steps):
            # one image a pass: a batch of another size would round differently
            logits = torch.cat([self.network(row[None], mask[None], null_class)[:, unmasked] for row in ids])
            for i, position in enumerate(unmasked.tolist()):
                ids[:, position] = code_ids(code, logits[:, i], *divmod(position, v.sub_tokens))
        return token_bits(ids.numpy().reshape(images, v.tokens, v.sub_tokens), v.id_bits)


def code_ids(code: BitCoder, logits: Tensor, token: int, sub_token: int) -> Tensor:
    """Code one id per image, from its highest bit.

    Args:
        logits: float64 images × ids. Bit patterns of no id get the least probability.

    Returns:
        int64 images.
    """
    id_bits = (logits.shape[-1] - 1).bit_length()
    counts = F.pad((logits.softmax(dim=-1) * ONE).round(), (0, (1 << id_bits) - logits.shape[-1]))
    left = counts.long().numpy() + 1
    ids: np.ndarray = np.zeros(len(left), np.int64)
    for bit in reversed(range(id_bits)):
        halves = left.reshape(len(left), 2, -1)
        unset, set_ = halves.sum(axis=-1).T
        p = np.clip((set_ * ONE) // (unset + set_), 1, ONE - 1)
        chosen = code(token, sub_token * id_bits + bit, p)
        ids |= chosen.astype(np.int64) << bit
        left = halves[np.arange(len(left)), chosen]
    return torch.from_numpy(ids)
