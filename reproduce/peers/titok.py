"""TiTok (Yu et al. 2024): 32, 64 or 128 tokens of 12 bits from a ViT; a second ViT, then MaskGIT's decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from reproduce.peers.base import SIDE, TokenNetwork, load_exactly, read_weights
from reproduce.peers.vqgan import TITOK, Chain, VectorCodebook

SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Width, depth and heads."""
PATCH, CODE_CHANNELS, PIXEL_CODES = 16, 12, 1024
PATCHES = (SIDE // PATCH) ** 2


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        wide, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = Chain({"c_fc": wide, "gelu": nn.GELU(), "c_proj": narrow})

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class ViT(nn.Module):
    """A transformer over a class token, the patches and the latent tokens, each with learned positions."""

    def __init__(self, size: str, tokens: int):
        super().__init__()
        self.width, depth, heads = SIZES[size]
        scale = self.width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(1, self.width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(PATCHES + 1, self.width))
        self.latent_token_positional_embedding = nn.Parameter(scale * torch.randn(tokens, self.width))
        self.ln_pre, self.ln_post = nn.LayerNorm(self.width), nn.LayerNorm(self.width)
        self.transformer = nn.Sequential(*(Block(self.width, heads) for _ in range(depth)))

    def run(self, patches: Tensor, latents: Tensor) -> Tensor:
        """Patches b × p × width and latents b × tokens × width -> b × (1 + p + tokens) × width."""
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = torch.cat((first, patches), dim=1) + self.positional_embedding
        return self.transformer(self.ln_pre(torch.cat((x, latents + self.latent_token_positional_embedding), dim=1)))


class Encoder(ViT):
    def __init__(self, size: str, tokens: int):
        super().__init__(size, tokens)
        self.patch_embed = nn.Conv2d(3, self.width, PATCH, PATCH)
        self.conv_out = nn.Conv2d(self.width, CODE_CHANNELS, 1)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """Images b × 3 × 256 × 256 and latent tokens -> code b × channels × tokens."""
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        out = self.ln_post(self.run(patches, latents.expand(len(x), -1, -1))[:, 1 + PATCHES :])
        # The published weights were trained with this reshape, which reads tokens × width as width × tokens.
        return self.conv_out(out.reshape(len(x), self.width, out.shape[1], 1)).flatten(2)


class PatchDecoder(ViT):
    def __init__(self, size: str, tokens: int):
        super().__init__(size, tokens)
        self.decoder_embed = nn.Linear(CODE_CHANNELS, self.width)
        self.mask_token = nn.Parameter(self.width**-0.5 * torch.randn(1, 1, self.width))
        wide = nn.Conv2d(self.width, 2 * self.width, 1)
        self.ffn = nn.Sequential(wide, nn.Tanh(), nn.Conv2d(2 * self.width, PIXEL_CODES, 1))

    def forward(self, code: Tensor) -> Tensor:
        """Code b × tokens × channels -> logits of the pixel codes, b × 1024 × 16 × 16."""
        patches = self.mask_token.expand(len(code), PATCHES, -1)
        x = self.ln_post(self.run(patches, self.decoder_embed(code))[:, 1 : 1 + PATCHES])
        side = SIDE // PATCH
        return self.ffn(x.transpose(1, 2).reshape(len(x), self.width, side, side))


class TiTok(TokenNetwork):
    """Images of 256 × 256 in [0, 1]."""

    id_count = 4096
    low = 0.0

    def __init__(self, size: str, tokens: int):
        super().__init__()
        self.latent_tokens = nn.Parameter(torch.randn(tokens, SIZES[size][0]))
        self.encoder, self.decoder = Encoder(size, tokens), PatchDecoder(size, tokens)
        self.quantize = VectorCodebook(self.id_count, CODE_CHANNELS)
        self.pixel_quantize = VectorCodebook(PIXEL_CODES, 256)
        self.pixel_decoder = TITOK.decoder(256)

    def encode(self, x: Tensor) -> Tensor:
        return self.quantize.ids(self.encoder(x, self.latent_tokens).transpose(1, 2))

    def decode(self, ids: Tensor) -> Tensor:
        logits = self.decoder(self.quantize.vectors()[ids])
        code = torch.einsum("bnhw,nc->bchw", logits.softmax(dim=1), self.pixel_quantize.embedding.weight)
        return self.pixel_decoder(code)

    def read(self, path: str | Path) -> None:
        load_exactly(self, read_weights(path), path)
