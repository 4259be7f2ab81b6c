"""Lookup-free quantization: one bit a channel (equation 2), with entropy and commitment losses (equations 7 and 8).

A token of f channels is factorised into f / G sub-tokens of G bits. The group index is outer: sub-token s takes the
channels s, s + f/G, s + 2f/G, …, and bit g of its id is set where channel g·(f/G) + s is positive.

Notable: the entropies of a group's 2^G codes never touch a table of 2^G × tokens numbers. A softmax over
2·⟨x, codebook⟩ / temperature is a product of independent bits, so the per-sample entropy is a sum of G binary
entropies, and the mean distribution is one matrix product of two half-groups' tables (2^(G/2) columns each).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.model.quantizers.base import Quantized, WholeBatch, alone

TEMPERATURE = 0.1
LOG_EPS = 1e-5  # the authors' guard inside the logarithm of the mean distribution; kept for equal losses


class LFQ:
    """Binary bottleneck of ``channels`` bits a token in groups of ``group`` bits.

    Raises:
        ValueError: ``channels`` is not a multiple of ``group``.
    """

    needs_whole_batch = True

    def __init__(self, channels: int, group: int, entropy_weight: float = 0.0025, commitment_weight: float = 0.000625):
        if channels % group:
            raise ValueError(f"{channels} bits a token do not split into groups of {group}")
        self.channels = self.encoder_channels = channels
        self.group = group
        self.sub_tokens = channels // group
        self.id_count = 2**group
        self.entropy_weight = entropy_weight
        self.commitment_weight = commitment_weight

    def sub_token_of(self, channel: Tensor) -> Tensor:
        """Index of the sub-token that each channel belongs to."""
        return channel % self.sub_tokens

    def __call__(self, code: Tensor, whole_batch: WholeBatch = alone) -> Quantized:
        code = self.bounded(code.float())
        corner = self.corner(code)
        with torch.autocast(code.device.type, enabled=False):  # a distribution over 2^G codes needs float32
            sample_entropy, mean_entropy = self.entropies(code, whole_batch)
        commitment = self.commitment(code, corner)
        return Quantized(
            code=corner + (code - code.detach()),  # straight-through; exactly the corner in the forward pass
            ids=self.ids_from_signs(corner),
            losses={
                "entropy": self.entropy_weight * (sample_entropy - mean_entropy),
                "commitment": self.commitment_weight * commitment,
            },
            statistics={
                "sample_entropy": sample_entropy.detach(),
                "codebook_entropy": mean_entropy.detach(),
                "commitment": commitment.detach(),
            },
        )

    def quantize(self, code: Tensor) -> tuple[Tensor, Tensor]:
        corner = self.corner(code)
        return corner, self.ids_from_signs(corner)

    # What a binary bottleneck on another body than the cube does otherwise

    def bounded(self, code: Tensor) -> Tensor:
        """The encoder's output where it is compared with the corners."""
        return code

    def corner(self, code: Tensor) -> Tensor:
        """The nearest code that ids can name."""
        return torch.where(code > 0, 1.0, -1.0)

    def commitment(self, code: Tensor, corner: Tensor) -> Tensor:
        """How far the encoder's output is from its corner."""
        return F.mse_loss(code, corner)

    def ids_from_signs(self, signs: Tensor) -> Tensor:
        """b t f -> int64 b t f/G."""
        bits = (signs > 0).unflatten(-1, (self.group, self.sub_tokens))
        weight = 2 ** torch.arange(self.group, device=signs.device)
        return (bits * weight[:, None]).sum(dim=-2)

    def code_from_ids(self, ids: Tensor) -> Tensor:
        shift = torch.arange(self.group, device=ids.device)
        bits = (ids[..., None, :] >> shift[:, None]) & 1  # b t g s
        return bits.flatten(-2).float() * 2 - 1

    def entropies(self, code: Tensor, whole_batch: WholeBatch = alone) -> tuple[Tensor, Tensor]:
        """Mean entropy of a sub-token over its 2^G codes, and entropy of the mean distribution, in nats."""
        x = code.unflatten(-1, (self.group, self.sub_tokens)).movedim(-2, -1).flatten(0, -2)  # n g
        logit = 4 * x / TEMPERATURE  # of a set bit against an unset one: 2·(x − (−x)) / temperature
        p = logit.sigmoid()
        # Binary entropy from the logit: softplus(l) − l·σ(l); exact where p·log p would be 0·∞.
        sample_entropy = (F.softplus(logit) - logit * p).sum(dim=-1).mean()
        low, high = p[:, : self.group // 2], p[:, self.group // 2 :]
        mean = code_probabilities(high).T @ code_probabilities(low) / len(p)
        if whole_batch is not alone:
            # The value of the whole batch with the gradient of this part, whose mean over the parts is the right one.
            mean = mean + (whole_batch(mean.detach()) - mean.detach())
        return sample_entropy, -(mean * (mean + LOG_EPS).log()).sum()


def code_probabilities(p: Tensor) -> Tensor:
    """Probability of each of the 2^k codes of k independent bits: n k -> n 2^k, bit 0 fastest."""
    table = p.new_ones(len(p), 1)
    for bit in p.unbind(dim=-1):
        table = torch.cat((table * (1 - bit[:, None]), table * bit[:, None]), dim=-1)
    return table
