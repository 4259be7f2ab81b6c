"""Vector quantization with a codebook that follows its members (van den Oord et al. 2017, appendix A.1).

A token of f channels is cut into s sub-tokens of f / s channels; the nearest of a codebook's K entries replaces each.
The codebook learns by moving averages, not by gradients: an entry is the mean of the sub-tokens that chose it lately.

Notable: what the codebook learns from is a mean over sub-tokens, so that ``whole_batch`` makes it the whole batch's,
however that is cut over processes and passes; all processes then change their codebooks by the same numbers. An entry
that hardly anyone chooses restarts beside one that many choose, so that the two share its members: unlike the usual
jump to a random sub-token of the batch, which only one process has, it needs no pictures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.model.quantizers.base import Quantized, WholeBatch, alone
from flowmo.streams import Stream, stream

DEAD_SHARE = 0.05
"""An entry restarts when it is chosen less often than this share of an even use of all entries."""


class VQ(nn.Module):
    """Bottleneck of ``channels`` channels a token as ``sub_tokens`` ids of ``entries`` each.

    ``codebook`` entries × channels of a sub-token, and the moving averages ``use`` and ``members`` that it is the ratio
    of, belong to the tokenizer's state: checkpoints hold them. A forward pass changes none of them; ``learn`` does.

    Args:
        decay: of the moving averages, a step.
        commitment_weight: of the pull of the encoder's output to its entry.

    Raises:
        ValueError: ``channels`` is not a multiple of ``sub_tokens``, or fewer than two entries.
    """

    needs_whole_batch = True

    def __init__(
        self, channels: int, entries: int, sub_tokens: int, decay: float = 0.99, commitment_weight: float = 0.25
    ):
        super().__init__()
        if channels % sub_tokens:
            raise ValueError(f"{channels} channels do not split into {sub_tokens} sub-tokens")
        if entries < 2:
            raise ValueError(f"{entries} entries tell nothing apart; there must be at least 2")
        self.channels = self.encoder_channels = channels
        self.sub_tokens = sub_tokens
        self.id_count = entries
        self.decay, self.commitment_weight = decay, commitment_weight
        codebook = torch.randn(entries, channels // sub_tokens)
        self.register_buffer("codebook", codebook)
        self.register_buffer("use", torch.full((entries,), 1 / entries))
        self.register_buffer("members", codebook / entries)
        self.register_buffer("steps", torch.zeros(()))
        self._seen: Tensor | None = None

    def forward(self, code: Tensor, whole_batch: WholeBatch = alone) -> Quantized:
        code = code.float()
        entry, ids = self.quantize(code)
        self._seen = whole_batch(self.statistics(code.detach(), ids))
        commitment = F.mse_loss(code, entry)
        return Quantized(
            code=entry + (code - code.detach()),  # straight-through; exactly the entry in the forward pass
            ids=ids,
            losses={"commitment": self.commitment_weight * commitment},
            statistics={
                "commitment": commitment.detach(),
                "codebook_entropy": torch.special.entr(self._seen[:, 0]).sum(),
            },
        )

    def quantize(self, code: Tensor) -> tuple[Tensor, Tensor]:
        x = code.detach().float().unflatten(-1, (self.sub_tokens, -1))  # b t s d
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 a neighbour could seem nearer
            distance = self.codebook.square().sum(dim=1) - 2 * x @ self.codebook.T  # less |x|², equal for all
        ids = distance.argmin(dim=-1)
        return self.code_from_ids(ids), ids

    def code_from_ids(self, ids: Tensor) -> Tensor:
        return self.codebook[ids].flatten(-2)

    def statistics(self, code: Tensor, ids: Tensor) -> Tensor:
        """entries × (1 + 2 d): share of the sub-tokens that chose an entry, and their sums and sums of squares over
        the number of all sub-tokens."""
        x = code.unflatten(-1, (self.sub_tokens, -1)).flatten(0, -2)  # n d
        rows = torch.cat((torch.ones_like(x[:, :1]), x, x.square()), dim=1)
        return torch.zeros(self.id_count, rows.shape[1], device=x.device).index_add_(0, ids.flatten(), rows) / len(x)

    @torch.no_grad()
    def learn(self, step: int = 0) -> None:
        """Move the codebook towards what the last batch's sub-tokens were, restart entries that are out of use.

        The first batch spreads the whole codebook over itself: fresh entries lie where no encoder's output need be.
        Nothing here waits for the device.
        """
        if self._seen is None:
            return
        use, members, squares = self._seen.split((1, self.codebook.shape[1], self.codebook.shape[1]), dim=1)
        self._seen = None
        # All processes, and a resumed run, draw the same numbers.
        generator = stream(step, Stream.CODEBOOK)
        noise = torch.randn(self.codebook.shape, generator=generator).to(self.codebook, non_blocking=True)
        first, mean = self.steps == 0, members.sum(dim=0)
        spread = mean + (squares.sum(dim=0) - mean**2).clamp(min=0).sqrt() * noise
        self.use.copy_(torch.where(first, self.use, self.use.lerp(use[:, 0], 1 - self.decay)))
        followed = self.members.lerp(members, 1 - self.decay)
        self.members.copy_(torch.where(first, spread / self.id_count, followed))
        self.codebook.copy_(torch.where(first, spread, self.members / self.use[:, None]))
        within = (squares - members**2 / use.clamp(min=1e-12)).sum(dim=0).clamp(min=0).sqrt()
        self._restart_unused(within * noise)  # after the first batch all are in equal use
        self.steps += 1

    def _restart_unused(self, offset: Tensor) -> None:
        """Put dead entries beside the most used, each with half of that one's members; ``offset``: entries × d.

        The least used entry is paired with the most used, and so on. A pair acts if one is dead and the other is not.
        """
        dead_below, pairs = DEAD_SHARE / self.id_count, self.id_count // 2
        popular = self.use.argsort(descending=True, stable=True)[:pairs]
        rare = self.use.argsort(stable=True)[:pairs]
        restart = (self.use[rare] < dead_below) & (self.use[popular] >= dead_below)
        half = torch.where(restart, 0.5, 1.0)
        self.use[popular] *= half
        self.members[popular] *= half[:, None]
        self.use[rare] = torch.where(restart, self.use[popular], self.use[rare])
        beside = self.codebook[popular] + offset[rare]
        self.codebook[rare] = torch.where(restart[:, None], beside, self.codebook[rare])
        members = beside * self.use[rare, None]
        self.members[rare] = torch.where(restart[:, None], members, self.members[rare])
