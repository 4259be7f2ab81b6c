"""Bidirectional transformers that predict masked ids from the others and a class (Chang et al. 2022).

``MaskGIT`` is ours. ``UViT`` is TiTok's ``UViTBert`` (bytedance/1d-tokenizer), which has 397 178 368 parameters at
width 1024, depth 28, 512 ids of 9 bits and 1000 classes. The paper's generator has about 397 M, so that it is probably
this one.

Shapes: b batch, n ids per image, d width, v vocabulary size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.config import GeneratorConfig
from flowmo.model.transformer import RMSNorm


class MaskGIT(nn.Module):
    """Maps ids (b × n), a mask of the ids to predict (b × n) and class labels (b) to logits (b × n × v).

    Args:
        settings: sizes, and the kind of token embedding.
        id_bits: bits of an id; the vocabulary size is 2^id_bits.
        ids_per_image: n.
        classes: number of classes; class ``classes`` is the null class of guidance.
    """

    def __init__(self, settings: GeneratorConfig, id_bits: int, ids_per_image: int, classes: int):
        super().__init__()
        width = settings.hidden_size
        self.id_bits, self.bit_tokens = id_bits, settings.bit_tokens
        if settings.bit_tokens:  # as in MaskBit, the bits of an id (±1) are embedded by a linear layer
            self.bits_in = nn.Linear(id_bits, width)
        else:
            self.id_table = nn.Embedding(2**id_bits, width)
        self.hidden_id = nn.Parameter(torch.empty(width))
        self.place = nn.Parameter(torch.empty(ids_per_image, width))  # position embedding
        self.class_table = nn.Embedding(classes + 1, width)
        shape = (width, settings.num_heads, settings.mlp_ratio, settings.dropout)
        self.blocks = nn.ModuleList(Block(*shape) for _ in range(settings.depth))
        self.norm_out = nn.LayerNorm(width)
        self.logits_out = nn.Linear(width, 2**id_bits)
        initialise(self, residual_branches=2 * settings.depth)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Args: ids int64 b × n, any value where masked; mask bool b × n, True for ids to predict; labels int64 b."""
        x = torch.where(mask[..., None], self.hidden_id, self.embed(ids)) + self.place
        x = torch.cat((self.class_table(labels)[:, None], x), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.logits_out(self.norm_out(x[:, 1:]))

    def embed(self, ids: Tensor) -> Tensor:
        if not self.bit_tokens:
            return self.id_table(ids)
        bits = (ids[..., None] >> torch.arange(self.id_bits, device=ids.device)) & 1
        return self.bits_in(2 * bits.to(self.place.dtype) - 1)


def initialise(network: nn.Module, residual_branches: int = 1) -> None:
    """Draw normal weights of standard deviation 0.02, as in BERT. Norms keep scale 1; biases are 0.

    The last layers of the n residual branches have standard deviation 0.02 / √n.
    """
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" not in name:
            branches = residual_branches if name.endswith(("proj.weight", "mlp_out.weight")) else 1
            nn.init.normal_(parameter, std=0.02 / branches**0.5)


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm MLP, both residual."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query_norm, self.key_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.mlp_in = nn.Linear(width, int(mlp_ratio * width))
        self.mlp_out = nn.Linear(int(mlp_ratio * width), width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(self.attention_norm(x)), self.heads)
        q, k = self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.dropout(self.proj(mixed.transpose(1, 2).flatten(2)))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + self.dropout(self.mlp_out(hidden))


def split_heads(qkv: Tensor, heads: int) -> Tensor:
    """b × n × 3d -> queries, keys and values: 3 × b × heads × n × d/heads."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


class UViT(nn.Module):
    """TiTok's generator: a transformer with U-Net skip connections.

    Takes the arguments of ``MaskGIT``. Names and shapes of its tensors are those of ``UViTBert.state_dict()``, so each
    loads the other's weights. The rows of ``embeddings`` are the ids, the mask id, the classes and the null class.
    ``depth`` / 2 blocks come before ``mid_block`` and as many after it. Each block i after it, counted from 0 over all,
    has a long skip connection from block ``depth`` − i, as in U-ViT.
    """

    def __init__(self, settings: GeneratorConfig, id_bits: int, ids_per_image: int, classes: int):
        super().__init__()
        width, half = settings.hidden_size, settings.depth // 2
        self.vocabulary_size = 2**id_bits
        shape = (width, settings.num_heads, settings.mlp_ratio, settings.dropout)
        self.embeddings = nn.Embedding(self.vocabulary_size + classes + 2, width)
        self.pos_embed = nn.Parameter(torch.empty(1, ids_per_image + 1, width))
        self.in_blocks = nn.ModuleList(UViTBlock(*shape) for _ in range(half))
        self.mid_block = UViTBlock(*shape)
        self.out_blocks = nn.ModuleList(UViTBlock(*shape, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, self.vocabulary_size)
        initialise(self)  # TiTok also truncates at ±2, which is 100 standard deviations and changes nothing

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in execution order."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Same arguments and result as ``MaskGIT.forward``."""
        classes = labels[:, None] + self.vocabulary_size + 1
        x = self.embeddings(torch.cat((classes, ids.masked_fill(mask, self.vocabulary_size)), 1)) + self.pos_embed
        skips: list[Tensor] = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.lm_head(self.norm(x[:, 1:]))


class UViTBlock(nn.Module):
    """Pre-norm attention, then a pre-norm MLP, both residual. ``skip`` adds a linear layer that merges two inputs."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float, skip: bool = False):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=False), "proj": nn.Linear(width, width)})
        hidden = int(mlp_ratio * width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, earlier: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and earlier is not None:
            x = self.skip_linear(torch.cat((x, earlier), dim=-1))
        q, k, v = split_heads(self.attn["qkv"](self.norm1(x)), self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.attn["proj"](mixed))
        return x + self.dropout(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


def build_network(settings: GeneratorConfig, id_bits: int, ids_per_image: int, classes: int) -> MaskGIT | UViT:
    """Build the network that ``generator.network`` names. Takes the arguments of ``MaskGIT``."""
    kinds: dict[str, type[MaskGIT] | type[UViT]] = {"maskgit": MaskGIT, "uvit": UViT}
    return kinds[settings.network](settings, id_bits, ids_per_image, classes)
