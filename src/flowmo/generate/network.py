"""Bidirectional transformers that guess hidden ids from the others and a class (Chang et al. 2022).

``MaskGiT`` is ours. ``UViT`` is the paper's: TiTok's ``UViTBert`` (bytedance/1d-tokenizer), which has 397 178 368
parameters at width 1024, depth 28, 512 ids of 9 bits and 1000 classes.

Shape annotations name axes: b batch, n ids of a picture, d width, v ids of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.config import GeneratorConfig
from flowmo.model.transformer import GELU, RMSNorm, attend


class MaskGiT(nn.Module):
    """Ids b n, some hidden, and a class b to logits b n v of every place.

    Args:
        settings: widths and depth, and how ids enter.
        id_bits: bits of an id; the vocabulary is 2^id_bits.
        ids: of a picture, n.
        classes: number of classes; class number ``classes`` is the null class of guidance.
    """

    def __init__(self, settings: GeneratorConfig, id_bits: int, ids: int, classes: int):
        super().__init__()
        width = settings.hidden_size
        self.id_bits, self.classes, self.bit_tokens = id_bits, classes, settings.bit_tokens
        if settings.bit_tokens:  # MaskBiT: an id enters as the signs that the tokenizer's decoder sees, no table
            self.bits_in = nn.Linear(id_bits, width)
        else:
            self.id_table = nn.Embedding(2**id_bits, width)
        self.hidden_id = nn.Parameter(torch.empty(width))
        self.place = nn.Parameter(torch.empty(ids, width))
        self.class_table = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(
            Block(width, settings.num_heads, settings.mlp_ratio, settings.dropout) for _ in range(settings.depth)
        )
        self.norm_out = nn.LayerNorm(width)
        self.logits_out = nn.Linear(width, 2**id_bits)
        self.initialise()

    def initialise(self) -> None:
        """Normal weights of deviation 0.02, as BERT's; what ends a residual branch shrinks with their number."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:  # their scales are 1
                ends_branch = name.endswith(("proj.weight", "mlp_out.weight"))
                deviation = 0.02 / (2 * len(self.blocks)) ** 0.5 if ends_branch else 0.02
                nn.init.normal_(parameter, std=deviation)

    def forward(self, ids: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        """Args: ids int64 b n, any value where hidden; hidden bool b n; labels int64 b."""
        x = torch.where(hidden[..., None], self.hidden_id, self.embed(ids)) + self.place
        x = torch.cat((self.class_table(labels)[:, None], x), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.logits_out(self.norm_out(x[:, 1:]))

    def embed(self, ids: Tensor) -> Tensor:
        """b n d."""
        if not self.bit_tokens:
            return self.id_table(ids)
        bits = (ids[..., None] >> torch.arange(self.id_bits, device=ids.device)) & 1
        return self.bits_in(2 * bits.to(self.place.dtype) - 1)


class Block(nn.Module):
    """Attention over all places, then an MLP, each normed before and added."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query_norm, self.key_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.mlp_in = nn.Linear(width, int(mlp_ratio * width))
        self.gelu = GELU()
        self.mlp_out = nn.Linear(int(mlp_ratio * width), width)

    def forward(self, x: Tensor) -> Tensor:
        """b n d -> b n d."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attend(self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype), v, q.shape[-1] ** -0.5)
        x = x + self._drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        return x + self._drop(self.mlp_out(self.gelu(self.mlp_in(self.mlp_norm(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class UViT(nn.Module):
    """TiTok's generator: a transformer whose later blocks read the earlier ones' outputs.

    Arguments as of ``MaskGiT``. The names and shapes of its tensors are those of ``UViTBert.state_dict()``, so that
    either loads the other's. ``embeddings`` has a row for each id, then one for hidden ids, one for each class, and one
    for the null class. ``depth`` / 2 blocks come before ``mid_block``; each of as many after it first maps its input
    and the output of its counterpart before, side by side, to the width.
    """

    def __init__(self, settings: GeneratorConfig, id_bits: int, ids: int, classes: int):
        super().__init__()
        width, half = settings.hidden_size, settings.depth // 2
        self.vocabulary_size = 2**id_bits
        shape = (width, settings.num_heads, settings.mlp_ratio, settings.dropout)
        self.embeddings = nn.Embedding(self.vocabulary_size + classes + 2, width)
        self.pos_embed = nn.Parameter(torch.empty(1, ids + 1, width))
        self.in_blocks = nn.ModuleList(UViTBlock(*shape) for _ in range(half))
        self.mid_block = UViTBlock(*shape)
        self.out_blocks = nn.ModuleList(UViTBlock(*shape, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, self.vocabulary_size)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:  # their scales are 1
                nn.init.normal_(parameter, std=0.02)  # TiTok truncates it at ±2, a hundred deviations

    @property
    def blocks(self) -> list[UViTBlock]:
        """All, in the order in which they run."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def forward(self, ids: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        """As ``MaskGiT``: logits b n v."""
        tokens = torch.cat(
            (labels[:, None] + self.vocabulary_size + 1, ids.masked_fill(hidden, self.vocabulary_size)), 1
        )
        x = self.embeddings(tokens) + self.pos_embed
        outputs: list[Tensor] = []
        for block in self.in_blocks:
            x = block(x)
            outputs.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, outputs.pop())
        return self.lm_head(self.norm(x[:, 1:]))


class UViTBlock(nn.Module):
    """Attention, then an MLP, each normed before and added; with ``skip`` after a linear map of two inputs."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float, skip: bool = False):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=False), "proj": nn.Linear(width, width)})
        hidden = int(mlp_ratio * width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, earlier: Tensor | None = None) -> Tensor:
        """b n d -> b n d."""
        if self.skip_linear is not None and earlier is not None:
            x = self.skip_linear(torch.cat((x, earlier), dim=-1))
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v, q.shape[-1] ** -0.5).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.attn["proj"](mixed), self.dropout, self.training)
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + F.dropout(self.mlp["fc2"](hidden), self.dropout, self.training)


def build_network(settings: GeneratorConfig, id_bits: int, ids: int, classes: int) -> MaskGiT | UViT:
    """The network that ``generator.network`` names; arguments as of ``MaskGiT``."""
    kinds: dict[str, type[MaskGiT] | type[UViT]] = {"maskgit": MaskGiT, "uvit": UViT}
    return kinds[settings.network](settings, id_bits, ids, classes)
