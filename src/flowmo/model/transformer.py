"""Encoder and decoder: transformers over an image stream and a code stream (section 3.1, figure 3).

Notable:
- Each block has separate weights for the two streams and one joint attention (MMDiT).
- Attention logits are scaled by 8 / head size (µP), which equals 1 / sqrt(head size) only at head size 64.
- Only live parameters are built. The encoder has no timestep, so it has no modulation. In the last block, the stream
  that nobody reads afterwards has only keys and values.
- ``Decoder.modulate`` computes everything that depends on the timestep alone.

In annotations of shapes: b batch, c channels of an image, m code tokens, n image tokens, d width or channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.config.sections import ModelConfig, rotary_axes

NORM_EPS = 1e-6
ROTARY_BASE = 10_000
TIMESTEP_SINUSOIDS = 256
MIN_PREDICTION_TIME = 0.05
"""Lower bound of t in the division that turns an image prediction into a velocity."""


@dataclass(frozen=True)
class Shape:
    """Size and form of one network.

    Attributes:
        patch: an image token covers ``patch`` × ``patch`` pixels.
        code_layout: rotary positions of the code tokens, see ``code_positions``.
        mup: scale attention logits as µP does, see ``attention_scale``.
        prediction: output of the decoder's last layer, ``velocity`` or ``picture``, see ``Decoder``.
        initial_gate: residual gates of a fresh decoder; at 0, as in the release, its blocks start as the identity.
        mean_velocity: the decoder is conditioned on the end of its step, see ``Decoder``.
        channels: of the images.
    """

    width: int
    heads: int
    depth: int
    patch: int
    mlp_ratio: float = 4.0
    code_layout: str = "diagonal"
    mup: bool = True
    prediction: str = "velocity"
    initial_gate: float = 0.0
    mean_velocity: bool = False
    channels: int = 3

    @classmethod
    def encoder(cls, m: ModelConfig) -> Shape:
        size = (m.enc_hidden_size, m.enc_num_heads, m.enc_depth, m.patch_size)
        return cls(*size, m.mlp_ratio, m.code_layout, m.enable_mup, channels=m.channels)

    @classmethod
    def decoder(cls, m: ModelConfig) -> Shape:
        size = (m.hidden_size, m.num_heads, m.dec_depth, m.patch_size)
        output = (m.prediction, m.initial_gate, m.mean_velocity, m.channels)
        return cls(*size, m.mlp_ratio, m.code_layout, m.enable_mup, *output)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def attention_scale(self) -> float:
        return 8 / self.head_dim if self.mup else self.head_dim**-0.5

    @property
    def values(self) -> int:
        """Values of an image token."""
        return self.channels * self.patch**2

    def rotary_table(self, code_length: int, height: int, width: int, device: torch.device) -> Tensor:
        """The cached rotary table for images of ``height`` × ``width`` pixels."""
        rows, columns = height // self.patch, width // self.patch
        return rotary_table(code_length, rows, columns, self.head_dim, self.code_layout, device)


def code_lattice(code_length: int) -> tuple[int, int]:
    """Rows and columns of the most nearly square lattice of ``code_length`` points."""
    rows = next(r for r in range(math.isqrt(code_length), 0, -1) if code_length % r == 0)
    return rows, code_length // rows


def code_positions(code_length: int, rows: int, columns: int, layout: str) -> Tensor:
    """Positions of the code tokens on the three rotary axes, float64 code_length × 3.

    ``diagonal``, the paper's, puts token i at (i, i, i). ``lattice`` spreads the tokens evenly over the image at
    (i, row, column): attention is still global, but each token starts out looking at its own neighbourhood.
    """
    index = torch.arange(code_length, dtype=torch.float64)
    if layout == "diagonal":
        return index[:, None].expand(-1, 3)
    lattice_rows, lattice_columns = code_lattice(code_length)
    row = ((index // lattice_columns) + 0.5) * rows / lattice_rows - 0.5
    column = ((index % lattice_columns) + 0.5) * columns / lattice_columns - 0.5
    return torch.stack((index, row, column), dim=-1)


@lru_cache(maxsize=64)
def rotary_table(code_length: int, rows: int, columns: int, head_dim: int, layout: str, device: torch.device) -> Tensor:
    """Cosines and sines for the joint sequence, code tokens first; image tokens sit at (0, row, column).

    Returns:
        float32 2 × tokens × head_dim: cosines, then sines, each angle twice for the two channels of a pair.
    """
    axes = [torch.arange(count, dtype=torch.float64) for count in (1, rows, columns)]
    positions = torch.cat((code_positions(code_length, rows, columns, layout), torch.cartesian_prod(*axes)))  # m+n 3
    angles = []
    for axis, channels in enumerate(rotary_axes(head_dim)):
        frequency = ROTARY_BASE ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angles.append(positions[:, axis, None] * frequency)
    angle = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)  # m+n d
    return torch.stack((angle.cos(), angle.sin())).to(device, torch.float32)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved channel pairs of ``x`` (b × n × heads × d) by the angles of ``table`` (2 × n × d)."""
    cos, sin = table[:, :, None]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    quarter_turn = torch.stack((-odd, even), dim=-1).flatten(-2)
    return x * cos + quarter_turn * sin


def timestep_embedding(t: Tensor) -> Tensor:
    """Sinusoids of 1000·t for timesteps t in [0, 1]: b -> b × 256, cosines first."""
    half = TIMESTEP_SINUSOIDS // 2
    frequency = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = 1000 * t.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def patchify(images: Tensor, patch: int) -> Tensor:
    """b × c × h × w -> b × (h/p · w/p) × (p · p · c), rows first, channels innermost."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of ``patchify`` for images of ``height`` × ``width`` pixels."""
    b = patches.shape[0]
    x = patches.reshape(b, height // patch, width // patch, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, height, width)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale, in float32 even under autocast."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.scale.dtype), self.scale.shape, self.scale, NORM_EPS)


class Modulation(NamedTuple):
    """Shift, scale and gate of one sub-layer, each b × 1 × width, or 1 × 1 × width for a shared timestep."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


Modulations = tuple[Modulation | None, Modulation | None]
"""Of a stream's attention and MLP; ``None`` is the identity, as in the encoder."""
IDENTITY: Modulations = (None, None)


def modulated_norm(x: Tensor, modulation: Modulation | None = None) -> Tensor:
    """(1 + scale) · LayerNorm(x) + shift."""
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return normed if modulation is None else (1 + modulation.scale) * normed + modulation.shift


def gated_residual(x: Tensor, update: Tensor, modulation: Modulation | None) -> Tensor:
    """x + gate · update."""
    return x + update if modulation is None else x + modulation.gate * update


class Stream(nn.Module):
    """One stream's half of a block: attention projections and MLP.

    With ``keys_only`` it has just the keys and values that the other stream attends to.
    """

    def __init__(self, shape: Shape, modulated: bool, keys_only: bool = False):
        super().__init__()
        width, hidden = shape.width, int(shape.mlp_ratio * shape.width)
        self.heads = shape.heads
        self.keys_only = keys_only
        self.key_norm = RMSNorm(shape.head_dim)
        self.modulation = nn.Linear(width, (2 if keys_only else 6) * width) if modulated else None
        if keys_only:
            self.kv = nn.Linear(width, 2 * width)
            return
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = RMSNorm(shape.head_dim)
        self.proj = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, hidden)
        self.gelu = nn.GELU(approximate="tanh")
        self.mlp_out = nn.Linear(hidden, width)
        if self.modulation is not None:
            weight, bias = (p.detach().unflatten(0, (6, width)) for p in self.modulation.parameters())
            for gate in (2, 5):
                nn.init.zeros_(weight[gate])
                nn.init.constant_(bias[gate], shape.initial_gate)

    def modulate(self, activated: Tensor) -> Modulations:
        """SiLU(time embedding), b × width, to the modulations of the attention and the MLP."""
        if self.modulation is None:
            return IDENTITY
        parts = self.modulation(activated).float()[:, None].split(activated.shape[-1], dim=-1)
        return (Modulation(*parts), None) if self.keys_only else (Modulation(*parts[:3]), Modulation(*parts[3:]))

    def project(self, x: Tensor, modulation: Modulation | None, table: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Queries (``None`` with ``keys_only``), keys and values, each b × n × heads × d."""
        x = modulated_norm(x, modulation)
        if self.keys_only:
            query, (key, value) = None, self.kv(x).unflatten(-1, (2, self.heads, -1)).unbind(2)
        else:
            query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
            query = rotate(self.query_norm(query), table).to(value.dtype)
        return query, rotate(self.key_norm(key), table).to(value.dtype), value

    def finish(self, x: Tensor, attended: Tensor, modulations: Modulations) -> Tensor:
        """Residual updates by the attention's output (b × n × d) and by the MLP."""
        attention, mlp = modulations
        x = gated_residual(x, self.proj(attended), attention)
        return gated_residual(x, self.mlp_out(self.gelu(self.mlp_in(modulated_norm(x, mlp)))), mlp)


class DoubleStreamBlock(nn.Module):
    """Joint attention of the code and the image stream, then an MLP for each stream that is read afterwards."""

    def __init__(self, shape: Shape, modulated: bool, code_read: bool = True, image_read: bool = True):
        super().__init__()
        self.attention_scale = shape.attention_scale
        self.code = Stream(shape, modulated, keys_only=not code_read)
        self.picture = Stream(shape, modulated, keys_only=not image_read)

    @property
    def used_outside(self) -> list[nn.Module]:
        """Modules that ``Decoder.modulate`` calls outside the block's forward pass."""
        return [stream.modulation for stream in (self.code, self.picture) if stream.modulation is not None]

    def modulate(self, activated: Tensor) -> tuple[Modulations, Modulations]:
        return self.code.modulate(activated), self.picture.modulate(activated)

    def forward(
        self,
        code: Tensor,
        image: Tensor,
        table: Tensor,
        modulations: tuple[Modulations, Modulations] = (IDENTITY, IDENTITY),
    ) -> tuple[Tensor, Tensor]:
        """code: b × m × d, image: b × n × d, table: of m + n tokens. A stream that is not read is unchanged."""
        m = code.shape[1]
        for_code, for_image = modulations
        code_q, code_k, code_v = self.code.project(code, for_code[0], table[:, :m])
        image_q, image_k, image_v = self.picture.project(image, for_image[0], table[:, m:])
        query = torch.cat([q for q in (code_q, image_q) if q is not None], dim=1)
        key, value = torch.cat((code_k, image_k), dim=1), torch.cat((code_v, image_v), dim=1)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=self.attention_scale
        )
        attended = attended.transpose(1, 2).flatten(2)  # b m+n d
        if code_q is not None:
            code = self.code.finish(code, attended[:, :m], for_code)
            attended = attended[:, m:]
        if image_q is not None:
            image = self.picture.finish(image, attended, for_image)
        return code, image


class Encoder(nn.Module):
    """Equation 1: image tokens and blank code tokens in, code before quantization out."""

    def __init__(self, shape: Shape, code_length: int, channels: int):
        super().__init__()
        self.shape = shape
        self.code_length = code_length
        self.picture_in = nn.Linear(shape.values, shape.width)
        # The paper feeds zeros through a linear layer; only its bias can act.
        self.code_embedding = nn.Parameter(torch.empty(shape.width).uniform_(-1, 1).div_(math.sqrt(channels)))
        self.blocks = nn.ModuleList(
            DoubleStreamBlock(shape, modulated=False, image_read=i < shape.depth - 1) for i in range(shape.depth)
        )
        self.code_out = nn.Linear(shape.width, channels)

    def forward(self, images: Tensor) -> Tensor:
        """images: b × c × h × w in [−1, 1], h and w multiples of the patch -> code: b × code_length × channels."""
        b, _, h, w = images.shape
        table = self.shape.rotary_table(self.code_length, h, w, images.device)
        # The residual stream stays float32 under autocast: bfloat16 would lose its sum over the blocks.
        image = self.picture_in(patchify(images, self.shape.patch)).float()
        # Contiguous as in later blocks, or torch.compile specialises the first block.
        code = self.code_embedding.float().expand(b, self.code_length, -1).contiguous()
        for block in self.blocks:
            code, image = block(code, image, table)
        return self.code_out(modulated_norm(code))


class Conditioning(NamedTuple):
    """Inputs of a decoder pass that depend on the timesteps t alone; t is b, or 1 if the batch shares one."""

    t: Tensor
    blocks: tuple[tuple[Modulations, Modulations], ...]
    out: Modulation


class Decoder(nn.Module):
    """Equation 3: the velocity of the noised image x_t given the code and the timestep.

    With ``shape.prediction`` "picture" the last layer estimates the image x̂, and the velocity is (x_t − x̂) / t. Loss
    and sampler are the same, but a narrow network need not carry the noise through to its output.

    With ``shape.mean_velocity`` the output is the mean velocity over a step, (x_t − x_end) / (t − t_end), which stage
    1C teaches. A fresh decoder ignores the end, and so starts as its teacher.
    """

    def __init__(self, shape: Shape, channels: int):
        super().__init__()
        self.shape = shape
        self.time_in = nn.Linear(TIMESTEP_SINUSOIDS, shape.width)
        self.time_out = nn.Linear(shape.width, shape.width)
        self.picture_in = nn.Linear(shape.values, shape.width)
        self.code_in = nn.Linear(channels + 1, shape.width)
        self.blocks = nn.ModuleList(
            DoubleStreamBlock(shape, modulated=True, code_read=i < shape.depth - 1) for i in range(shape.depth)
        )
        self.out_modulation = nn.Linear(shape.width, 2 * shape.width)
        self.picture_out = nn.Linear(shape.width, shape.values)
        if shape.mean_velocity:
            self.span_in = nn.Linear(TIMESTEP_SINUSOIDS, shape.width)
            self.span_out = nn.Linear(shape.width, shape.width)
            nn.init.zeros_(self.span_out.weight)
            nn.init.zeros_(self.span_out.bias)

    def modulate(self, t: Tensor, end: Tensor | None = None) -> Conditioning:
        """Compute all modulations for timesteps t (b in [0, 1]).

        Args:
            end: ends of the steps, b, end ≤ t, for a decoder of mean velocities; ``None`` asks for the velocity at t.
        """
        embedded = self.time_out(F.silu(self.time_in(timestep_embedding(t))))
        if self.shape.mean_velocity:
            span = torch.zeros_like(t) if end is None else t - end
            embedded = embedded + self.span_out(F.silu(self.span_in(timestep_embedding(span))))
        activated = F.silu(embedded)
        blocks = tuple(block.modulate(activated) for block in self.blocks)
        return Conditioning(t, blocks, Modulation(*self.out_modulation(activated).float()[:, None].chunk(2, dim=-1)))

    def embed_code(self, code: Tensor, keep: Tensor | None = None) -> Tensor:
        """Code b × m × channels -> code tokens b × m × width.

        A channel of ones tells a code from the null code of classifier-free guidance, which is all zeros.

        Args:
            keep: bool b, False replaces the code by the null code; ``None`` keeps all.
        """
        code = F.pad(code, (0, 1), value=1.0)
        if keep is not None:
            code = code * keep[:, None, None].to(code.dtype)
        return self.code_in(code).float()

    def forward(self, x_t: Tensor, code: Tensor, at_t: Conditioning) -> Tensor:
        """x_t: b × c × h × w, code: embedded, b × m × width, at_t: from ``modulate`` -> float32 velocity like x_t."""
        h, w = x_t.shape[-2:]
        table = self.shape.rotary_table(code.shape[1], h, w, x_t.device)
        image = self.picture_in(patchify(x_t, self.shape.patch)).float()
        for block, modulations in zip(self.blocks, at_t.blocks, strict=True):
            code, image = block(code, image, table, modulations)
        # The authors' checkpoints were trained with a second norm after the modulation.
        image = modulated_norm(modulated_norm(image, at_t.out))
        out = unpatchify(self.picture_out(image), self.shape.patch, h, w).float()
        return velocity_from(out, x_t, at_t.t, self.shape.prediction)


def velocity_from(out: Tensor, x_t: Tensor, t: Tensor, prediction: str) -> Tensor:
    """Convert a decoder's output b × c × h × w, a ``velocity`` or a ``picture``, to the velocity; t: b or 1."""
    if prediction == "velocity":
        return out
    return (x_t - out) / t.clamp(min=MIN_PREDICTION_TIME)[:, None, None, None]
