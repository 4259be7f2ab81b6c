"""The convolutional tokenizers of LlamaGen, MaskBit and Open-MAGVIT2, and TiTok's pixel decoder: variants of a VQGAN.

Encoders and decoders are flat chains of layers. Each layer has the name of its published weights, but with underscores
in place of dots; ``load_exactly`` ignores that difference.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproduce.peers.base import TokenNetwork, load_exactly, read_weights

WIDTH = 128
EMA = "model_ema."


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class Residual(nn.Module):
    """Two normalized 3 × 3 convolutions with a shortcut.

    Args:
        project_output: if channels change, project the block's own output, as MaskGIT does, instead of its input.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, project_output: bool = False):
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1, self.conv2 = conv(inputs, outputs, bias), conv(outputs, outputs, bias)
        self.project_output = project_output
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(outputs if project_output else inputs, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(y if self.project_output else x)
        return x + y


class Attention(nn.Module):
    """Self-attention over all positions, with one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # b 1 hw c
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)


class AdaptiveNorm(nn.Module):
    """Group norm with a scale from the code's standard deviation and a shift from its mean."""

    def __init__(self, code_channels: int, channels: int):
        super().__init__()
        self.gn = nn.GroupNorm(32, channels, eps=1e-6, affine=False)
        self.gamma, self.beta = nn.Linear(code_channels, channels), nn.Linear(code_channels, channels)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        flat = code.flatten(2)
        scale, shift = self.gamma((flat.var(dim=-1) + self.gn.eps).sqrt()), self.beta(flat.mean(dim=-1))
        return scale[:, :, None, None] * self.gn(x) + shift[:, :, None, None]


class DepthToSpace(nn.Module):
    """Pixel shuffle, with the channels innermost; ``nn.PixelShuffle`` has them outermost."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c // 4, 2 * h, 2 * w)


class Chain(nn.Sequential):
    """Layers one after another; adaptive norms also see the input of the chain."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__(OrderedDict(layers))

    def forward(self, code: Tensor) -> Tensor:
        x = code
        for layer in self:
            x = layer(x, code) if isinstance(layer, AdaptiveNorm) else layer(x)
        return x


class Names(NamedTuple):
    """Names in the published weights: of levels, residual blocks, the middle, and resampling convolutions."""

    encoder: str
    decoder: str
    block: str
    middle: str
    down: str
    up: str


class VQGAN(NamedTuple):
    """A variant; the defaults are MaskGIT's (Chang et al. 2022).

    Attributes:
        multipliers: channels of each level in units of ``WIDTH``, from the highest resolution.
        blocks: residual blocks per level.
        lowest_first: names number the decoder's levels from the lowest resolution.
        attention: as in the original VQGAN: attention at the lowest resolution, biases, one more block in the decoder.
        magvit: adaptive norms, depth-to-space, and shortcuts that project their input.
    """

    names: Names
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    lowest_first: bool = False
    attention: bool = False
    magvit: bool = False

    def encoder(self, channels: int) -> Chain:
        """Images b × 3 × h × w -> code b × channels × h/s × w/s."""
        widths, lowest = [WIDTH * m for m in (1, *self.multipliers)], len(self.multipliers) - 1
        layers: dict[str, nn.Module] = {"conv_in": conv(3, WIDTH, self.attention)}
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            name = f"{self.names.encoder}_{i}"
            layers |= self._level(name, inputs, outputs, self.blocks, self.attention and i == lowest)
            if i < lowest:
                if not self.magvit:
                    layers[f"{name}_pad"] = nn.ZeroPad2d((0, 1, 0, 1))
                layers[f"{name}_{self.names.down}"] = nn.Conv2d(outputs, outputs, 3, stride=2, padding=int(self.magvit))
        return Chain(layers | self._middle(widths[-1]) | self._head(widths[-1], channels, 3 if self.attention else 1))

    def decoder(self, channels: int) -> Chain:
        """Code b × channels × h × w -> images b × 3 × sh × sw."""
        widths, lowest = [WIDTH * m for m in (*self.multipliers, self.multipliers[-1])], len(self.multipliers) - 1
        layers: dict[str, nn.Module] = {"conv_in": conv(channels, widths[-1])} | self._middle(widths[-1])
        for i in range(lowest, -1, -1):
            name, width = f"{self.names.decoder}_{lowest - i if self.lowest_first else i}", widths[i]
            if self.magvit:
                layers[f"adaptive_{i}"] = AdaptiveNorm(channels, widths[i + 1])
            layers |= self._level(
                name, widths[i + 1], width, self.blocks + self.attention, self.attention and i == lowest
            )
            if i and self.magvit:
                layers |= {f"{name}_{self.names.up}": conv(width, 4 * width), f"{name}_shuffle": DepthToSpace()}
            elif i:
                layers |= {
                    f"{name}_double": nn.Upsample(scale_factor=2.0),
                    f"{name}_{self.names.up}": conv(width, width),
                }
        return Chain(layers | self._head(widths[0], 3))

    def _residual(self, inputs: int, outputs: int) -> Residual:
        return Residual(inputs, outputs, bias=self.attention, project_output=not (self.attention or self.magvit))

    def _level(self, name: str, inputs: int, outputs: int, blocks: int, attention: bool) -> dict[str, nn.Module]:
        layers: dict[str, nn.Module] = {}
        for j in range(blocks):
            layers[f"{name}_{self.names.block}_{j}"] = self._residual(outputs if j else inputs, outputs)
            if attention:
                layers[f"{name}_attn_{j}"] = Attention(outputs)
        return layers

    def _middle(self, channels: int) -> dict[str, nn.Module]:
        layers: list[nn.Module] = [self._residual(channels, channels) for _ in range(self.blocks)]
        if self.attention:
            layers.insert(1, Attention(channels))
        return {f"{self.names.middle}_{j}": layer for j, layer in enumerate(layers)}

    @staticmethod
    def _head(channels: int, outputs: int, kernel: int = 3) -> dict[str, nn.Module]:
        last = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2)
        return {"norm_out": norm(channels), "silu": nn.SiLU(), "conv_out": last}


MASKBIT = VQGAN(Names("down", "up", "res_blocks", "mid_res_blocks", "down_conv", "upsample_conv"), lowest_first=True)
TITOK = VQGAN(Names("", "up", "block", "mid", "", "upsample_conv"))
MAGVIT2 = VQGAN(Names("down", "up", "block", "mid_block", "downsample", "upsample_conv1"), blocks=4, magvit=True)
LLAMAGEN = VQGAN(
    Names("conv_blocks", "conv_blocks", "res", "mid", "downsample_conv", "upsample_conv"),
    lowest_first=True,
    attention=True,
)


class VectorCodebook(nn.Module):
    """Unit vectors; the nearest one's index is the id."""

    def __init__(self, entries: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(entries, channels)

    def vectors(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1)

    def ids(self, code: Tensor) -> Tensor:
        """Code … × channels -> ids …."""
        x, codebook = F.normalize(code, dim=-1), self.vectors()
        return (codebook.square().sum(dim=1) - 2 * x @ codebook.T).argmin(dim=-1)


class LlamaGen(TokenNetwork):
    """LlamaGen's tokenizers (Sun et al. 2024): one id of 16 384 per ``stride`` × ``stride`` pixels."""

    id_count = 16384

    def __init__(self, stride: int):
        super().__init__()
        variant = LLAMAGEN._replace(multipliers={8: (1, 2, 2, 4), 16: (1, 1, 2, 2, 4)}[stride])
        self.encoder, self.decoder = variant.encoder(256), variant.decoder(256)
        self.quantize = VectorCodebook(self.id_count, 8)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(256, 8, 1), nn.Conv2d(8, 256, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.quantize.ids(self.quant_conv(self.encoder(x)).permute(0, 2, 3, 1))

    def decode(self, ids: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self.quantize.vectors()[ids].permute(0, 3, 1, 2)))

    def read(self, path: str | Path) -> None:
        weights = read_weights(path, "ema", "model")
        load_exactly(self, weights, path, lambda name: name != "quantize.codebook_used")


class BitTokenNetwork(TokenNetwork):
    """A tokenizer whose ids are the signs of its code's channels."""

    def __init__(self, variant: VQGAN, bits: int):
        super().__init__()
        self.bits, self.id_count = bits, 2**bits
        self.encoder, self.decoder = variant.encoder(bits), variant.decoder(bits)

    def encode(self, x: Tensor) -> Tensor:
        return bits_to_ids(self.encoder(x))

    def decode(self, ids: Tensor) -> Tensor:
        return self.decoder(ids_to_bits(ids, self.bits))

    def read(self, path: str | Path) -> None:
        """Load a state dict or a Lightning checkpoint, by preference the EMA weights. The quantizer needs none."""
        weights = read_weights(path, "state_dict")
        weights |= {name.removeprefix(EMA): value for name, value in weights.items() if name.startswith(EMA)}
        load_exactly(self, weights, path, self.is_needed)

    @staticmethod
    def is_needed(name: str) -> bool:
        """Training checkpoints also hold a discriminator and losses."""
        return name.startswith(("encoder", "decoder"))


class MaskBit(BitTokenNetwork):
    """MaskBit's tokenizer (Weber et al. 2024): 256 tokens of 14 bits; images in [0, 1]."""

    low = 0.0

    def __init__(self) -> None:
        super().__init__(MASKBIT, 14)

    @staticmethod
    def is_needed(name: str) -> bool:
        return not name.startswith("quantize.")


class OpenMagvit2(BitTokenNetwork):
    """Open-MAGVIT2's tokenizer of 256-pixel images (Luo et al. 2024): 256 tokens of 18 bits."""

    def __init__(self) -> None:
        super().__init__(MAGVIT2, 18)


def bits_to_ids(x: Tensor) -> Tensor:
    """Pack the signs of x b × c × … into integers b …; channel 0 is the lowest bit."""
    return torch.einsum("bc...,c->b...", (x > 0).long(), 2 ** torch.arange(x.shape[1], device=x.device))


def ids_to_bits(ids: Tensor, channels: int) -> Tensor:
    """Invert ``bits_to_ids``: b × … -> −1 and 1, b × c × …."""
    shifts = torch.arange(channels, device=ids.device).view(-1, *(1,) * (ids.ndim - 1))
    return ((ids[:, None] >> shifts) & 1).float() * 2 - 1
