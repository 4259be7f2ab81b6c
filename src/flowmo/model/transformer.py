"""Encoder and decoder: transformers over an image stream and a code stream (section 3.1, figure 3).

Notable:
- Each block has separate weights for the two streams and one joint attention (MMDiT).
- Attention logits are scaled by 8 / head size (µP), which equals 1 / sqrt(head size) only at head size 64.
- Only live parameters are built. The encoder has no timestep, so it has no modulation. In the last block the unused
  stream has only keys and values.

In annotations of shapes: b batch, c channels of an image, m code tokens, n image tokens, d width or channels.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.config.sections import ModelConfig, rotary_axes

NORM_EPS = 1e-6
ROTARY_BASE = 10_000
TIMESTEP_SINUSOIDS = 256
MIN_PREDICTION_TIME = 1e-12
"""Lower bound of t in the division that turns an image prediction into a velocity, so that t = 0 divides by no 0."""


def code_lattice(code_length: int) -> tuple[int, int]:
    """Rows and columns of the most nearly square lattice of ``code_length`` points."""
    rows = next(r for r in range(math.isqrt(code_length), 0, -1) if code_length % r == 0)
    return rows, code_length // rows


def code_positions(code_length: int, rows: int, columns: int, layout: str) -> Tensor:
    """Positions of the code tokens on the three rotary axes, float64 code_length × 3.

    ``diagonal``, the release's, puts token i at (i, i, i). ``lattice`` spreads the tokens evenly over the image at
    (i, row, column): attention is still global, but each token starts out looking at its own neighbourhood.
    """
    index = torch.arange(code_length, dtype=torch.float64)
    if layout == "diagonal":
        return index[:, None].expand(-1, 3)
    lattice_rows, lattice_columns = code_lattice(code_length)
    row = ((index // lattice_columns) + 0.5) * rows / lattice_rows - 0.5
    column = ((index % lattice_columns) + 0.5) * columns / lattice_columns - 0.5
    return torch.stack((index, row, column), dim=-1)


def rotary_table(config: ModelConfig, head_dim: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return the cached ``rotary_angles`` for images of ``height`` × ``width`` pixels."""
    rows, columns = height // config.patch_size, width // config.patch_size
    return rotary_angles(config.code_length, rows, columns, head_dim, config.code_layout, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # training may use a table that inference has cached
def rotary_angles(
    code_length: int, rows: int, columns: int, head_dim: int, layout: str, device: torch.device
) -> Tensor:
    """Cosines and sines for the joint sequence, code tokens first: float32 2 × tokens × head_dim.

    Image tokens sit at (0, row, column). Each angle is repeated for both channels of its pair.
    """
    axes = [torch.arange(count, dtype=torch.float64) for count in (1, rows, columns)]
    positions = torch.cat((code_positions(code_length, rows, columns, layout), torch.cartesian_prod(*axes)))  # m+n 3
    frequencies = [ROTARY_BASE ** -(torch.arange(0, d, 2, dtype=torch.float64) / d) for d in rotary_axes(head_dim)]
    angles = [position[:, None] * frequency for position, frequency in zip(positions.T, frequencies, strict=True)]
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


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """b × r × c × d -> b × r/f × c/f × f·f·d."""
    b, r, c, d = x.shape
    x = x.reshape(b, r // factor, factor, c // factor, factor, d)
    return x.transpose(2, 3).reshape(b, r // factor, c // factor, factor * factor * d)


def depth_to_space(x: Tensor, factor: int) -> Tensor:
    """Invert ``space_to_depth``."""
    b, r, c, d = x.shape
    x = x.reshape(b, r, c, factor, factor, d // factor**2).transpose(2, 3)
    return x.reshape(b, r * factor, c * factor, d // factor**2)


def patchify(images: Tensor, patch: int) -> Tensor:
    """b × c × h × w -> b × (h/p · w/p) × (p · p · c), rows first, channels innermost."""
    return space_to_depth(images.permute(0, 2, 3, 1), patch).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int, height: int) -> Tensor:
    """Invert ``patchify`` for images of ``height`` pixels."""
    rows = patches.unflatten(1, (height // patch, -1))
    return depth_to_space(rows, patch).permute(0, 3, 1, 2).contiguous()


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale, in the scale's type even under autocast."""

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
"""Modulations of a stream's attention and MLP; ``None`` means none, as in the encoder."""


def modulated_norm(x: Tensor, modulation: Modulation | None = None) -> Tensor:
    """(1 + scale) · LayerNorm(x) + shift."""
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return normed if modulation is None else (1 + modulation.scale) * normed + modulation.shift


def gated_residual(x: Tensor, update: Tensor, modulation: Modulation | None) -> Tensor:
    """x + gate · update."""
    return x + update if modulation is None else x + modulation.gate * update


class StreamLayers(nn.Module):
    """One stream's half of a block: attention projections and MLP.

    With ``keys_only`` it has just the keys and values that the other stream attends to.
    """

    def __init__(self, config: ModelConfig, width: int, heads: int, modulated: bool, keys_only: bool = False):
        super().__init__()
        hidden = int(config.mlp_ratio * width)
        self.heads, self.keys_only = heads, keys_only
        self.key_norm = RMSNorm(width // heads)
        self.modulation = nn.Linear(width, (2 if keys_only else 6) * width) if modulated else None
        if keys_only:
            self.kv = nn.Linear(width, 2 * width)
            return
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = RMSNorm(width // heads)
        self.proj = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)
        if self.modulation is not None:
            weight, bias = (p.detach().unflatten(0, (6, width)) for p in self.modulation.parameters())
            weight[2::3] = 0  # the gates
            bias[2::3] = config.initial_gate

    def modulate(self, time: Tensor | None) -> Modulations:
        """SiLU(time embedding), b × width, to the modulations of the attention and the MLP."""
        if self.modulation is None:
            return None, None
        parts = self.modulation(time).float()[:, None].chunk(2 if self.keys_only else 6, dim=-1)
        return (Modulation(*parts), None) if self.keys_only else (Modulation(*parts[:3]), Modulation(*parts[3:]))

    def project(self, x: Tensor, modulation: Modulation | None, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each b × n × heads × d. With ``keys_only`` there are no queries: their n is 0."""
        x = modulated_norm(x, modulation)
        if self.keys_only:
            key, value = self.kv(x).unflatten(-1, (2, self.heads, -1)).unbind(2)
            query = value[:, :0].detach()
        else:
            query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
            query = rotate(self.query_norm(query), table).to(value.dtype)
        return query, rotate(self.key_norm(key), table).to(value.dtype), value

    def finish(self, x: Tensor, attended: Tensor, modulations: Modulations) -> Tensor:
        """Residual updates by the attention's output (b × n × d) and by the MLP. With ``keys_only`` there are none."""
        if self.keys_only:
            return x
        attention, mlp = modulations
        x = gated_residual(x, self.proj(attended), attention)
        hidden = F.gelu(self.mlp_in(modulated_norm(x, mlp)), approximate="tanh")
        return gated_residual(x, self.mlp_out(hidden), mlp)


class DoubleStreamBlock(nn.Module):
    """Joint attention of the code and the image stream, then an MLP for each stream.

    Args:
        modulated: by the timestep, as in the decoder.
        keys_only: in the last block, the stream that no later layer uses: ``code`` or ``image``.
    """

    def __init__(self, config: ModelConfig, width: int, heads: int, modulated: bool, keys_only: str = ""):
        super().__init__()
        head_dim = width // heads
        self.attention_scale = 8 / head_dim if config.enable_mup else head_dim**-0.5
        self.code = StreamLayers(config, width, heads, modulated, keys_only == "code")
        self.picture = StreamLayers(config, width, heads, modulated, keys_only == "image")

    def forward(self, code: Tensor, image: Tensor, table: Tensor, time: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """code: b × m × d, image: b × n × d, table: of m + n tokens, time: b × d. The unused stream is unchanged."""
        code_modulation, image_modulation = self.code.modulate(time), self.picture.modulate(time)
        code_qkv = self.code.project(code, code_modulation[0], table[:, : code.shape[1]])
        image_qkv = self.picture.project(image, image_modulation[0], table[:, code.shape[1] :])
        query, key, value = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(code_qkv, image_qkv, strict=True))
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.attention_scale)
        attended = attended.transpose(1, 2).flatten(2)  # b m+n d
        queries = code_qkv[0].shape[1]
        code = self.code.finish(code, attended[:, :queries], code_modulation)
        return code, self.picture.finish(image, attended[:, queries:], image_modulation)


class Encoder(nn.Module):
    """Equation 1: image tokens and blank code tokens in, code before quantization out."""

    def __init__(self, config: ModelConfig, channels: int):
        super().__init__()
        self.config, self.width, self.heads = config, config.enc_hidden_size, config.enc_num_heads
        self.picture_in = nn.Linear(config.channels * config.patch_size**2, self.width)
        # The release feeds the paper's zeros through a linear layer; only its bias can act.
        self.code_embedding = nn.Parameter(torch.empty(self.width).uniform_(-1, 1).div_(math.sqrt(channels)))
        self.blocks = nn.ModuleList(
            DoubleStreamBlock(config, self.width, self.heads, False, "image" if i == config.enc_depth - 1 else "")
            for i in range(config.enc_depth)
        )
        self.code_out = nn.Linear(self.width, channels)

    def forward(self, images: Tensor) -> Tensor:
        """images: b × c × h × w in [−1, 1], h and w multiples of the patch -> code: b × code_length × channels."""
        b, _, h, w = images.shape
        table = rotary_table(self.config, self.width // self.heads, h, w, images.device)
        # The residual stream stays float32 under autocast: bfloat16 would lose its sum over the blocks.
        image = self.picture_in(patchify(images, self.config.patch_size)).float()
        # Contiguous as in later blocks, or torch.compile specialises the first block.
        code = self.code_embedding.float().expand(b, self.config.code_length, -1).contiguous()
        for block in self.blocks:
            code, image = block(code, image, table)
        return self.code_out(modulated_norm(code))


class Decoder(nn.Module):
    """Equation 3: the velocity of the noised image x_t given the code and the timestep.

    With ``config.prediction`` "image" the last layer estimates the image x̂, and the velocity is (x_t − x̂) / t, so that
    a narrow network need not reproduce the noise. Euler's last step, to t = 0, gives x̂ itself.

    With ``config.mean_velocity`` the output is the mean velocity over a step, (x_t − x_end) / (t − t_end), which stage
    1C teaches. A fresh decoder ignores the end, and so starts as its teacher.
    """

    def __init__(self, config: ModelConfig, channels: int):
        super().__init__()
        self.config, self.width, self.heads = config, config.hidden_size, config.num_heads
        width, patch_channels = self.width, config.channels * config.patch_size**2
        self.time_in = nn.Linear(TIMESTEP_SINUSOIDS, width)
        self.time_out = nn.Linear(width, width)
        self.picture_in = nn.Linear(patch_channels, width)
        self.code_in = nn.Linear(channels + 1, width)
        self.blocks = nn.ModuleList(
            DoubleStreamBlock(config, width, self.heads, True, "code" if i == config.dec_depth - 1 else "")
            for i in range(config.dec_depth)
        )
        self.out_modulation = nn.Linear(width, 2 * width)
        self.picture_out = nn.Linear(width, patch_channels)
        if config.mean_velocity:
            self.span_in = nn.Linear(TIMESTEP_SINUSOIDS, width)
            self.span_out = nn.Linear(width, width)
            nn.init.zeros_(self.span_out.weight)
            nn.init.zeros_(self.span_out.bias)

    def embed_code(self, code: Tensor, keep: Tensor | None = None) -> Tensor:
        """Code b × m × channels -> code tokens b × m × width. Where ``keep``, bool b, is False, the code is null.

        A channel of ones tells a code from the null code of classifier-free guidance, which is all zeros.
        """
        code = F.pad(code, (0, 1), value=1.0)
        if keep is not None:
            code = code * keep[:, None, None].to(code.dtype)
        return self.code_in(code).float()

    def forward(self, x_t: Tensor, code: Tensor, t: Tensor, end: Tensor | None = None) -> Tensor:
        """Return the velocity, float32 b × c × h × w.

        Args:
            x_t: b × c × h × w.
            code: from ``embed_code``, b × m × width.
            t: timesteps in [0, 1], b, or 1 if the batch shares one.
            end: ends of the steps, like t, for a decoder of mean velocities; ``None`` asks for the velocity at t.
        """
        time = self.time_out(F.silu(self.time_in(timestep_embedding(t))))
        if self.config.mean_velocity:
            span = torch.zeros_like(t) if end is None else t - end
            time = time + self.span_out(F.silu(self.span_in(timestep_embedding(span))))
        time = F.silu(time)
        h, w = x_t.shape[-2:]
        table = rotary_table(self.config, self.width // self.heads, h, w, x_t.device)
        image = self.picture_in(patchify(x_t, self.config.patch_size)).float()
        for block in self.blocks:
            code, image = block(code, image, table, time)
        # The authors' checkpoints were trained with a second norm after the modulation.
        modulation = Modulation(*self.out_modulation(time).float()[:, None].chunk(2, dim=-1))
        image = modulated_norm(modulated_norm(image, modulation))
        out = unpatchify(self.picture_out(image), self.config.patch_size, h).float()
        return velocity_from(out, x_t, t, self.config.prediction)


def velocity_from(out: Tensor, x_t: Tensor, t: Tensor, prediction: str) -> Tensor:
    """Convert a decoder's output b × c × h × w, a ``velocity`` or an ``image``, to the velocity; t: b or 1."""
    if prediction == "velocity":
        return out
    return (x_t - out) / t.clamp(min=MIN_PREDICTION_TIME)[:, None, None, None]
