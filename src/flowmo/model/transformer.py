"""The encoder and the decoder: transformers over a picture stream and a code stream (section 3.1, figure 3).

Notable:
- Each block keeps separate weights for the two streams and lets them meet in one joint attention (MMDiT).
- Attention logits are scaled by 8 / head size (µP), which equals 1 / sqrt(head size) only at head size 64.
- Only live parameters are built: the encoder has no timestep, so it has no modulation, and the last block keeps
  of the stream whose output nobody reads just its keys and values.
- What depends on the timestep alone is computed by ``Decoder.modulate`` and handed to ``forward``, so that a
  sampler computes it once a run instead of once a pass.

Nothing here knows of training, data, files or devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.config.sections import ModelConfig, rotary_axes

NORM_EPS = 1e-6
ROTARY_BASE = 10_000
TIMESTEP_SINUSOIDS = 256


def code_lattice(code_length: int) -> tuple[int, int]:
    """Rows and columns of the most nearly square lattice of ``code_length`` points."""
    rows = next(r for r in range(math.isqrt(code_length), 0, -1) if code_length % r == 0)
    return rows, code_length // rows


def code_positions(code_length: int, rows: int, columns: int, layout: str) -> Tensor:
    """Positions of the code tokens on the three rotary axes, float64 code_length × 3.

    ``diagonal``, the paper's, puts token i at (i, i, i). ``lattice`` spreads the tokens evenly over the picture at
    (i, row, column): attention still reaches everywhere, but each token starts out looking at its own neighbourhood.
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
    """Cosines and sines for every token of the joint sequence, code tokens first.

    A picture token sits at (0, row, column), the code tokens where ``code_positions`` puts them.

    Returns:
        float32 2 × tokens × head_dim/2: cosines, then sines.
    """
    code = code_positions(code_length, rows, columns, layout)
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    picture = torch.stack((torch.zeros_like(row), row, column), dim=-1).flatten(0, 1)
    positions = torch.cat((code, picture))  # n 3
    angles = []
    for axis, channels in enumerate(rotary_axes(head_dim)):
        frequency = ROTARY_BASE ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angles.append(positions[:, axis, None] * frequency)
    angle = torch.cat(angles, dim=-1)  # n d/2
    return torch.stack((angle.cos(), angle.sin())).to(device, torch.float32)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn interleaved channel pairs of ``x`` (b n … d) by the angles of ``table`` (2 n d/2)."""
    cos, sin = table.unflatten(1, (-1,) + (1,) * (x.ndim - 3))  # n 1 … d/2
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which fuses the parts with what is around them, but no complex numbers
        even, odd = pairs.unbind(-1)
        return torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2)


def timestep_embedding(t: Tensor) -> Tensor:
    """Sinusoids of 1000·t for timesteps t in [0, 1]: b -> b × 256, cosines first."""
    half = TIMESTEP_SINUSOIDS // 2
    frequency = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = 1000 * t.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def patchify(images: Tensor, patch: int) -> Tensor:
    """b c h w -> b (h/p · w/p) (p · p · c), rows first, channels innermost."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of ``patchify`` for a picture of ``height`` × ``width`` pixels."""
    b = patches.shape[0]
    x = patches.reshape(b, height // patch, width // patch, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, height, width)


@dataclass(frozen=True)
class Shape:
    """Size and form of one network.

    Attributes:
        patch: a picture token covers ``patch`` × ``patch`` pixels.
        code_layout: rotary positions of the code tokens, see ``code_positions``.
        mup: attention logits scaled as µP asks, see ``attention_scale``.
        prediction: what the decoder's last layer estimates, ``velocity`` or ``picture``, see ``Decoder``.
        initial_gate: residual gates of a fresh decoder; at 0, the release's, its blocks start as the identity.
        mean_velocity: the decoder is told where its step ends, see ``Decoder``.
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

    @classmethod
    def encoder(cls, m: ModelConfig) -> Shape:
        size = (m.enc_hidden_size, m.enc_num_heads, m.enc_depth, m.patch_size)
        return cls(*size, m.mlp_ratio, m.code_layout, m.enable_mup)

    @classmethod
    def decoder(cls, m: ModelConfig) -> Shape:
        size = (m.hidden_size, m.num_heads, m.dec_depth, m.patch_size, m.mlp_ratio)
        return cls(*size, m.code_layout, m.enable_mup, m.prediction, m.initial_gate, m.mean_velocity)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def attention_scale(self) -> float:
        """µP divides logits by the head size; 8 makes that 1 / sqrt(head size) at 64 channels."""
        return 8 / self.head_dim if self.mup else self.head_dim**-0.5

    def rotary_table(self, code_length: int, height: int, width: int, device: torch.device) -> Tensor:
        """Table for a picture of ``height`` × ``width`` pixels; it is kept, so asking again costs nothing."""
        return rotary_table(
            code_length, height // self.patch, width // self.patch, self.head_dim, self.code_layout, device
        )


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32 at least, whatever the precision around it."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.together([self], x)

    @staticmethod
    def together(norms: Sequence[RMSNorm], x: Tensor) -> Tensor:
        """Several norms at once, one for each entry of the third to last axis of ``x`` (… norms h d); a single one is
        that of every entry."""
        x = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS) * torch.stack([norm.scale for norm in norms])[:, None]


class Modulation(NamedTuple):
    """Shift, scale and gate of one sub-layer, each n × 1 × width with n the batch, or 1 for a shared timestep."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


def modulated_norm(x: Tensor, modulation: Modulation | None) -> Tensor:
    """(1 + scale) · LayerNorm(x) + shift; the encoder's modulation is the identity and passes ``None``."""
    if modulation is None:
        return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    shift, scale = modulation.shift, modulation.scale
    if shift.shape[0] == 1:  # one timestep for the whole batch: the norm's own affine does it in one pass
        return F.layer_norm(x, x.shape[-1:], (1 + scale).flatten(), shift.flatten(), NORM_EPS)
    return torch.addcmul(shift, 1 + scale, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS))


GELU_SLOPE = 2 * math.sqrt(2 / math.pi)


def gelu(x: Tensor) -> Tensor:
    """GELU, the form with tanh."""
    if x.requires_grad or x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # x · (1 + tanh u) / 2 = x · sigmoid(2u) with u = √(2/π) · (x + 0.044715 x³). CPUs take three times as long for tanh
    # as for the exponential of a sigmoid.
    double_u = torch.addcmul(x.new_tensor(GELU_SLOPE), x, x, value=GELU_SLOPE * 0.044715).mul_(x)
    return double_u.sigmoid_().mul_(x)


class GELU(nn.Module):
    """``gelu`` as a module, so that a packed layer can take it over."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


def gated_residual(x: Tensor, update: Tensor, modulation: Modulation | None) -> Tensor:
    if modulation is None:
        return x + update
    return torch.addcmul(x, modulation.gate, update.to(x.dtype))


plain_bfloat16_on_cpu = True
"""Whether CPUs take the plain path in ``attend``; switched off to account for a GPU on a machine without one."""


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Softmax(scale · q·kᵀ)·v over b h n d."""
    if plain_bfloat16_on_cpu and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # Processors with bfloat16 matrix units run two plain products faster than the fused CPU kernel:
        # 1.6x forward and backward at 16 x 4 x 384 x 64 (2 cores of an AVX-512 BF16 machine).
        return ((query * scale) @ key.transpose(-2, -1)).softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


class Stream(nn.Module):
    """One stream's half of a block: attention projections and MLP, with a modulation where there is a timestep.

    ``keys_only`` builds what the other stream still attends to and nothing else: the last block's unread stream.
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
        self.gelu = GELU()
        self.mlp_out = nn.Linear(hidden, width)
        if self.modulation is not None:
            with torch.no_grad():
                for gate in (2, 5):
                    rows = slice(gate * width, (gate + 1) * width)
                    self.modulation.weight[rows] = 0
                    self.modulation.bias[rows] = shape.initial_gate

    def modulate(self, activated: Tensor) -> tuple[Modulation, ...] | None:
        """Modulations for the attention and the MLP from SiLU(time embedding), n × width."""
        if self.modulation is None:
            return None
        parts = self.modulation(activated).float()[:, None].chunk(2 if self.keys_only else 6, dim=-1)
        return (Modulation(*parts),) if self.keys_only else (Modulation(*parts[:3]), Modulation(*parts[3:]))

    def project(self, x: Tensor, modulation: Modulation | None, table: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Queries (``None`` when keys only), keys and values, each b n h d, turned by the rotary table."""
        norms = [self.key_norm] if self.keys_only else [self.query_norm, self.key_norm]
        layer = self.kv if self.keys_only else self.qkv
        parts = layer(modulated_norm(x, modulation)).unflatten(-1, (len(norms) + 1, self.heads, -1))
        turned, value = rotate(RMSNorm.together(norms, parts[:, :, :-1]), table), parts[:, :, -1]
        query, key = (None, *turned.to(value.dtype).unbind(2))[-2:]
        return query, key, value

    def finish(self, x: Tensor, attended: Tensor, modulations: tuple[Modulation, ...] | None) -> Tensor:
        """Residual additions of the attention's output (b n c) and of the MLP."""
        attention, mlp = modulations or (None, None)
        x = gated_residual(x, self.proj(attended), attention)
        hidden = self.gelu(self.mlp_in(modulated_norm(x, mlp)))
        return gated_residual(x, self.mlp_out(hidden), mlp)


class DoubleStreamBlock(nn.Module):
    """Joint attention of the code and the picture stream, then an MLP for each stream that is read afterwards."""

    def __init__(self, shape: Shape, modulated: bool, code_read: bool = True, picture_read: bool = True):
        super().__init__()
        self.attention_scale = shape.attention_scale
        self.code = Stream(shape, modulated, keys_only=not code_read)
        self.picture = Stream(shape, modulated, keys_only=not picture_read)

    @property
    def used_outside(self) -> list[nn.Module]:
        """Modules that ``Decoder.modulate`` calls, before and outside the block's forward pass."""
        return [stream.modulation for stream in (self.code, self.picture) if stream.modulation is not None]

    def modulate(self, activated: Tensor) -> BlockModulation:
        return self.code.modulate(activated), self.picture.modulate(activated)

    def forward(
        self, code: Tensor, picture: Tensor, table: Tensor, modulations: BlockModulation = (None, None)
    ) -> tuple[Tensor, Tensor]:
        """code: b m c, picture: b n c, table: rotary table of the m + n tokens. A stream not read comes back as is."""
        length = code.shape[1]
        for_code, for_picture = modulations
        code_q, code_k, code_v = self.code.project(code, for_code[0] if for_code else None, table[:, :length])
        picture_q, picture_k, picture_v = self.picture.project(
            picture, for_picture[0] if for_picture else None, table[:, length:]
        )
        query = torch.cat([q for q in (code_q, picture_q) if q is not None], dim=1)
        attended = attend(
            query.transpose(1, 2),
            torch.cat((code_k, picture_k), dim=1).transpose(1, 2),
            torch.cat((code_v, picture_v), dim=1).transpose(1, 2),
            self.attention_scale,
        )
        attended = attended.transpose(1, 2).flatten(2)  # b n c
        if code_q is not None:
            code = self.code.finish(code, attended[:, :length], for_code)
            attended = attended[:, length:]
        if picture_q is not None:
            picture = self.picture.finish(picture, attended, for_picture)
        return code, picture


BlockModulation = tuple[tuple[Modulation, ...] | None, tuple[Modulation, ...] | None]


def select_timestep(many: Any, i: int) -> Any:
    """The conditioning of timestep ``i`` out of that of many: every tensor n × … becomes 1 × …."""
    if isinstance(many, Tensor):
        return many[i : i + 1]
    if many is None:
        return None
    parts = [select_timestep(part, i) for part in many]
    return type(many)(*parts) if hasattr(many, "_fields") else tuple(parts)


class Encoder(nn.Module):
    """Equation 1: picture tokens and blank code tokens in, code before quantization out."""

    def __init__(self, shape: Shape, code_length: int, channels: int):
        super().__init__()
        self.shape = shape
        self.code_length = code_length
        self.picture_in = nn.Linear(3 * shape.patch**2, shape.width)
        # The paper feeds zeros through a linear layer; only its bias can ever act, so only that is built.
        self.code_embedding = nn.Parameter(torch.empty(shape.width).uniform_(-1, 1) / math.sqrt(channels))
        self.blocks = nn.ModuleList(
            DoubleStreamBlock(shape, modulated=False, picture_read=i < shape.depth - 1) for i in range(shape.depth)
        )
        self.code_out = nn.Linear(shape.width, channels)

    def forward(self, images: Tensor) -> Tensor:
        """images: b 3 h w in [−1, 1], h and w multiples of the patch -> code: b code_length channels."""
        b, _, h, w = images.shape
        table = self.shape.rotary_table(self.code_length, h, w, images.device)
        # The residual stream stays float32 under autocast: its sum over all blocks is what bfloat16 would lose.
        picture = self.picture_in(patchify(images, self.shape.patch)).float()
        # Contiguous like every other block's input, or the first block would be compiled for itself.
        code = self.code_embedding.float().expand(b, self.code_length, -1).contiguous()
        for block in self.blocks:
            code, picture = block(code, picture, table)
        return self.code_out(modulated_norm(code, None))


MIN_PREDICTION_TIME = 0.05
"""Least t that a picture prediction is divided by on its way to a velocity."""


class Conditioning(NamedTuple):
    """What a decoder pass needs of its timesteps t (n, with n the batch, or 1 for a shared timestep)."""

    t: Tensor
    blocks: tuple[BlockModulation, ...]
    out: Modulation


class Decoder(nn.Module):
    """Equation 3: the velocity of the noised picture x_t given the code and the timestep.

    With ``shape.prediction`` "picture" the network's output is its estimate x̂ of the picture, and the velocity is
    (x_t − x̂) / t: the same loss and sampler, but a narrow network need not carry the noise through to its output.

    With ``shape.mean_velocity`` it is the mean over a step, (x_t − x_end) / (t − t_end), rather than the velocity at
    its start: what stage 1C teaches. A fresh decoder pays no heed to the end, and so starts as its teacher.
    """

    def __init__(self, shape: Shape, channels: int):
        super().__init__()
        self.shape = shape
        self.time_in = nn.Linear(TIMESTEP_SINUSOIDS, shape.width)
        self.time_out = nn.Linear(shape.width, shape.width)
        self.picture_in = nn.Linear(3 * shape.patch**2, shape.width)
        self.code_in = nn.Linear(channels + 1, shape.width)
        self.blocks = nn.ModuleList(
            DoubleStreamBlock(shape, modulated=True, code_read=i < shape.depth - 1) for i in range(shape.depth)
        )
        self.out_modulation = nn.Linear(shape.width, 2 * shape.width)
        self.picture_out = nn.Linear(shape.width, 3 * shape.patch**2)
        if shape.mean_velocity:
            self.span_in = nn.Linear(TIMESTEP_SINUSOIDS, shape.width)
            self.span_out = nn.Linear(shape.width, shape.width)
            nn.init.zeros_(self.span_out.weight)
            nn.init.zeros_(self.span_out.bias)

    def modulate(self, t: Tensor, end: Tensor | None = None) -> Conditioning:
        """Everything that depends on the timesteps t (n, in [0, 1]) alone, and on the ends of their steps, n ≤ t.

        Only a decoder of mean velocities heeds ``end``; ``None`` asks it for the velocity at t.
        """
        embedded = self.time_out(F.silu(self.time_in(timestep_embedding(t))))
        if self.shape.mean_velocity:
            span = torch.zeros_like(t) if end is None else t - end
            embedded = embedded + self.span_out(F.silu(self.span_in(timestep_embedding(span))))
        activated = F.silu(embedded)
        blocks = tuple(block.modulate(activated) for block in self.blocks)
        return Conditioning(t, blocks, Modulation(*self.out_modulation(activated).float()[:, None].chunk(2, dim=-1)))

    def embed_code(self, code: Tensor, keep: Tensor | None = None) -> Tensor:
        """Code tokens of the first block: b m channels -> b m width.

        A channel of ones tells a code from the null code of classifier-free guidance, which is all zeros.

        Args:
            keep: b, True where the code is kept and False where the null code takes its place; ``None`` keeps all.
        """
        code = F.pad(code, (0, 1), value=1.0)
        if keep is not None:
            code = code * keep[:, None, None].to(code.dtype)
        return self.code_in(code).float()

    def forward(self, x_t: Tensor, code: Tensor, at_t: Conditioning) -> Tensor:
        """x_t: b 3 h w, code: embedded code b m width, at_t: of ``modulate`` -> velocity float32 b 3 h w."""
        h, w = x_t.shape[-2:]
        table = self.shape.rotary_table(code.shape[1], h, w, x_t.device)
        picture = self.picture_in(patchify(x_t, self.shape.patch)).float()
        for block, modulation in zip(self.blocks, at_t.blocks, strict=True):
            code, picture = block(code, picture, table, modulation)
        # Norm, modulation and norm again: the authors' checkpoints were trained so.
        picture = modulated_norm(modulated_norm(picture, at_t.out), None)
        out = unpatchify(self.picture_out(picture), self.shape.patch, h, w).float()
        if self.shape.prediction == "velocity":
            return out
        return (x_t - out) / at_t.t.clamp(min=MIN_PREDICTION_TIME)[:, None, None, None]
