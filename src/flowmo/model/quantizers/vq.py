"""Vector quantization with an EMA codebook (van den Oord et al. 2017, appendix A.1).

A token of f channels is cut into s sub-tokens of f / s channels; each is replaced by the nearest of K codebook entries.

Notable: the codebook learns from means over sub-tokens, which ``whole_batch`` averages over ranks and micro-batches, so
every rank makes the same update. A dead entry restarts beside a popular one and takes half of its members. Unlike the
usual jump to a random sub-token, this needs no data from other ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.config.sections import ModelConfig
from flowmo.model.quantizers.base import Quantized, Quantizer, WholeBatch, local_statistic, straight_through
from flowmo.streams import Stream, stream

DEAD_SHARE = 0.05
"""An entry is dead if it is used less often than this share of uniform use."""


class VQ(Quantizer):
    """Bottleneck of ``channels`` channels per token as ``sub_tokens`` ids below ``id_count``.

    Checkpoints hold the buffers: ``codebook``, entries × channels per sub-token; the moving averages ``use`` and
    ``members``, whose quotient ``members / use`` is the codebook; and the number of ``steps``. Only ``learn`` changes
    them.
    """

    needs_whole_batch = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.decay, self.commitment_weight = config.vq_decay, config.vq_commit_weight
        entries = config.vq_entries
        codebook = torch.randn(entries, self.channels // config.vq_sub_tokens)
        self.codebook = nn.Buffer(codebook)
        self.use = nn.Buffer(torch.full((entries,), 1 / entries))
        self.members = nn.Buffer(codebook / entries)
        self.steps = nn.Buffer(torch.zeros(()))
        self._seen: Tensor | None = None

    def forward(self, code: Tensor, whole_batch: WholeBatch = local_statistic) -> Quantized:
        code = code.float()
        quantized, ids = self.quantize(code)
        self._seen = whole_batch(self.statistics(code.detach(), ids))
        commitment = F.mse_loss(code, quantized.detach())
        statistics = {"commitment": commitment, "codebook_entropy": torch.special.entr(self._seen[:, 0]).sum()}
        return Quantized(quantized, ids, {"commitment": self.commitment_weight * commitment}, statistics)

    def quantize(self, code: Tensor) -> tuple[Tensor, Tensor]:
        code = code.float()
        codebook = self.codebook.float()  # of another type after FlowMo.bfloat16()
        x = code.detach().unflatten(-1, (-1, codebook.shape[1]))  # b t s f/s
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 could pick a neighbour
            distance = codebook.square().sum(dim=1) - 2 * x @ codebook.T  # without |x|², equal for all
        ids = distance.argmin(dim=-1)
        return straight_through(self.code_from_ids(ids), code), ids

    def code_from_ids(self, ids: Tensor) -> Tensor:
        return self.codebook[ids].flatten(-2).float()

    def statistics(self, code: Tensor, ids: Tensor) -> Tensor:
        """entries × (1 + 2d): each entry's share of the sub-tokens, and the means of their values and squares."""
        x = code.reshape(-1, self.codebook.shape[1])  # n d
        rows = torch.cat((torch.ones_like(x[:, :1]), x, x.square()), dim=1)
        return torch.zeros(len(self.use), rows.shape[1], device=x.device).index_add_(0, ids.flatten(), rows) / len(x)

    @torch.no_grad()
    def learn(self, step: int = 0) -> None:
        """Move the codebook towards the last batch's sub-tokens and restart dead entries, without a device sync.

        The first batch spreads the whole codebook over itself, because fresh entries may lie far from all codes.
        """
        if self._seen is None:
            return
        use, members, squares = self._seen.split((1, self.codebook.shape[1], self.codebook.shape[1]), dim=1)
        self._seen = None
        # Every rank, and a resumed run, draws the same numbers.
        generator = stream(step, Stream.CODEBOOK)
        noise = torch.randn(self.codebook.shape, generator=generator).to(self.codebook, non_blocking=True)
        first, mean = self.steps == 0, members.sum(dim=0)
        spread = mean + (squares.sum(dim=0) - mean**2).clamp(min=0).sqrt() * noise
        self.use.copy_(torch.where(first, self.use, self.use.lerp(use[:, 0], 1 - self.decay)))
        followed = self.members.lerp(members, 1 - self.decay)
        self.members.copy_(torch.where(first, spread / len(self.use), followed))
        self.codebook.copy_(torch.where(first, spread, self.members / self.use[:, None]))
        within = (squares - members**2 / use.clamp(min=1e-12)).sum(dim=0).clamp(min=0).sqrt()
        self._restart_dead(within * noise)  # none is dead after the first batch
        self.steps += 1

    def _restart_dead(self, offset: Tensor) -> None:
        """Move dead entries beside the most used ones, each with half of their members; ``offset``: entries × d.

        The least used entry is paired with the most used, and so on. A pair acts if exactly one of it is dead.
        """
        dead_below, pairs = DEAD_SHARE / len(self.use), len(self.use) // 2
        popular = self.use.argsort(descending=True, stable=True)[:pairs]
        rare = self.use.argsort(stable=True)[:pairs]
        restart = (self.use[rare] < dead_below) & (self.use[popular] >= dead_below)
        half = torch.where(restart, 0.5, 1.0)
        self.use[popular] *= half
        self.members[popular] *= half[:, None]
        self.use[rare] = torch.where(restart, self.use[popular], self.use[rare])
        beside = self.codebook[popular] + offset[rare]
        self.codebook[rare] = torch.where(restart[:, None], beside, self.codebook[rare])
        self.members[rare] = torch.where(restart[:, None], beside * self.use[rare, None], self.members[rare])
