"""Lookup-free quantization: one bit per channel (equation 2), with entropy and commitment losses (equations 7 and 8).

A token of f channels is factorised into f / G sub-tokens of G bits. The group index is outer: sub-token s takes the
channels s, s + f/G, s + 2f/G, …, and bit g of its id is set where channel g·(f/G) + s is positive.

Notable: the entropy loss needs no table of tokens × 2^G. A softmax over 2·⟨x, codebook⟩ / temperature is a product of
independent bits. So the per-sample entropy is a sum of G binary entropies, and the mean distribution is one matrix
product of two tables of 2^(G/2) columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.config.sections import ModelConfig
from flowmo.model.quantizers.base import Quantized, Quantizer, WholeBatch, local_statistic, straight_through

TEMPERATURE = 0.1
LOG_EPS = 1e-5  # inside the logarithm of the mean distribution, as in the authors' code


class LFQ(Quantizer):
    """Binary bottleneck of ``channels`` bits per token in groups of ``group`` bits."""

    needs_whole_batch = True
    corner = 1.0  # magnitude of a quantized channel

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.group = config.codebook_size_for_entropy
        self.entropy_weight = config.entropy_loss_weight
        self.commitment_weight = config.commit_loss_weight

    def forward(self, code: Tensor, whole_batch: WholeBatch = local_statistic) -> Quantized:
        code = self.normalize(code.float())
        quantized = self.nearest_code(code)
        with torch.autocast(code.device.type, enabled=False):  # a distribution over 2^G codes needs float32
            sample_entropy, mean_entropy = self.entropies(code, whole_batch)
        commitment = self.commitment(code, quantized)
        losses = {
            "entropy": self.entropy_weight * (sample_entropy - mean_entropy),
            "commitment": self.commitment_weight * commitment,
        }
        statistics = {"sample_entropy": sample_entropy, "codebook_entropy": mean_entropy, "commitment": commitment}
        return Quantized(straight_through(quantized, code), self.ids_from_signs(quantized), losses, statistics)

    def quantize(self, code: Tensor) -> tuple[Tensor, Tensor]:
        code = self.normalize(code.float())
        quantized = self.nearest_code(code)
        return straight_through(quantized, code), self.ids_from_signs(quantized)

    def code_from_ids(self, ids: Tensor) -> Tensor:
        bits = ids[..., None, :] // 2 ** torch.arange(self.group, device=ids.device)[:, None] % 2  # b t g s
        return self.nearest_code(bits.flatten(-2))

    def sub_token_of(self, channel: Tensor) -> Tensor:
        return channel % (self.channels // self.group)

    def normalize(self, code: Tensor) -> Tensor:
        """Map the encoder's output to the space of quantized codes; the identity for LFQ."""
        return code

    def nearest_code(self, code: Tensor) -> Tensor:
        """Round to the nearest code that has ids."""
        return torch.where(code > 0, self.corner, -self.corner)  # 0 goes to −1, as in the release; the paper prints ≥

    def commitment(self, code: Tensor, quantized: Tensor) -> Tensor:
        """Equation 8: distance between the encoder's output and its quantized code, as a mean over elements."""
        return F.mse_loss(code, quantized)

    def ids_from_signs(self, signs: Tensor) -> Tensor:
        """b × t × f -> int64 b × t × f/G."""
        bits = (signs > 0).unflatten(-1, (self.group, -1))  # b t g s
        return (bits * 2 ** torch.arange(self.group, device=signs.device)[:, None]).sum(dim=-2)

    def entropies(self, code: Tensor, whole_batch: WholeBatch = local_statistic) -> tuple[Tensor, Tensor]:
        """Equation 7: mean entropy of a sub-token over its 2^G codes, and entropy of the mean distribution, in nats."""
        x = code.unflatten(-1, (self.group, -1)).movedim(-2, -1).flatten(0, -2)  # n g
        logit = 4 * x / TEMPERATURE  # set bit against unset bit: 2·(x − (−x)) / temperature
        p = logit.sigmoid()
        low, high = p[:, : self.group // 2], p[:, self.group // 2 :]
        mean = mean_over_batch(code_probabilities(high).T @ code_probabilities(low) / len(p), whole_batch)
        return binary_entropy(logit), -(mean * (mean + LOG_EPS).log()).sum()


def binary_entropy(logit: Tensor) -> Tensor:
    """Entropy of independent bits, … × bits, summed over bits and averaged over the rest: softplus(l) − l·σ(l)."""
    return (F.softplus(logit) - logit * logit.sigmoid()).sum(dim=-1).mean()


def mean_over_batch(mean: Tensor, whole_batch: WholeBatch) -> Tensor:
    """Return the global batch's mean with this micro-batch's gradient."""
    return mean + (whole_batch(mean.detach()) - mean.detach())


def code_probabilities(p: Tensor) -> Tensor:
    """Probability of each of the 2^k codes of k independent bits: n k -> n 2^k, bit 0 fastest."""
    table = p.new_ones(len(p), 1)
    for bit in p.unbind(dim=-1):
        table = torch.cat((table * (1 - bit[:, None]), table * bit[:, None]), dim=-1)
    return table
