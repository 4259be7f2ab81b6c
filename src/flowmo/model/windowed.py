"""Encoder and decoder for images of any size: convolutions at high resolution, windowed attention over cells.

One code token describes one cell of ``CELL`` × ``CELL`` pixels, so the number of tokens follows the image's area.

Notable:
- Every operation is local or acts within windows of cells, and every second block shifts its windows by half their
  side (Liu et al. 2021). So the weights fit any height and width, and the cost per pixel is constant.
- Otherwise the decoder is FlowMo's (equation 3): it sees the noised image x_t, the code and the timestep.
- Dense 3 × 3 convolutions at 1/4 and 1/8 of the resolution do most of the work on texture. On CPUs with matrix units
  they are several times faster than attention blocks.
- A convolution's weight is one matrix, so optimizer and norm control treat it as a linear layer.
- Under autocast the features between blocks are bfloat16, unlike the transformer's: 98 % of ``native``'s ids stay.

In annotations of shapes: b batch, r rows and c columns of the feature map, d channels.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.config.sections import CELL, ModelConfig
from flowmo.model.transformer import (
    TIMESTEP_SINUSOIDS,
    Modulation,
    depth_to_space,
    gated_residual,
    modulated_norm,
    space_to_depth,
    timestep_embedding,
    velocity_from,
)


def relative_index(window: int, device: torch.device) -> Tensor:
    """Index of each pair of a window's cells in the table of (2 · window − 1)² relative positions: cells × cells."""
    cells = torch.arange(window**2, device=device)
    row, column = cells // window, cells % window
    down, across = row[:, None] - row + window - 1, column[:, None] - column + window - 1
    return down * (2 * window - 1) + across


class Convolution(nn.Linear):
    """A dense 3 × 3 convolution over b × r × c × d; ``weight`` is out × (3 · 3 · in)."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(9 * channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        return F.conv2d(x.permute(0, 3, 1, 2), weight, self.bias, padding=1).permute(0, 2, 3, 1)


class ConvolutionBlock(nn.Module):
    """Residual block of two convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_in = Convolution(channels, channels)
        self.conv_out = Convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_out(F.silu(self.conv_in(modulated_norm(x))))


class WindowedBlock(nn.Module):
    """Attention within windows of cells, then an MLP; both residual."""

    def __init__(self, config: ModelConfig, width: int, heads: int, shifted: bool, modulated: bool):
        super().__init__()
        self.heads, self.window = heads, config.window
        self.offset = config.window // 2 if shifted else 0
        hidden = int(config.mlp_ratio * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)
        self.position_bias = nn.Parameter(torch.zeros(heads, (2 * config.window - 1) ** 2))
        # One layer makes the modulations of all blocks (Chen et al. 2023); each block adds its own.
        gates = torch.tensor([0.0, 0.0, 1.0]).repeat(2)
        self.modulation = nn.Parameter(gates[:, None].repeat(1, width)) if modulated else None

    def attention(self, x: Tensor, outside: Tensor) -> Tensor:
        """x: b × windows × cells × 3d; outside: windows × cells, True for padding."""
        q, k, v = x.unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # b windows heads cells d
        bias = self.position_bias[:, relative_index(self.window, x.device)]  # heads cells cells
        bias = bias + outside[:, None, None] * -1e4  # windows heads cells cells
        logits = (modulated_norm(q) * (8 / q.shape[-1] ** 0.5)) @ modulated_norm(k).transpose(-2, -1)
        attended = (logits + bias.to(q.dtype)).softmax(-1).to(v.dtype) @ v
        return attended.transpose(2, 3).flatten(3)

    def forward(self, x: Tensor, common: Tensor | None = None) -> Tensor:
        """x: b × r × c × d, any number of rows and columns; common: b × 6 × d, the common part of the modulations."""
        attention = mlp = None
        if self.modulation is not None:
            parts = [part[:, None, None] for part in (common + self.modulation).unbind(1)]  # b 1 1 d
            attention, mlp = Modulation(*parts[:3]), Modulation(*parts[3:])
        windows, outside = self.partition(self.qkv(modulated_norm(x, attention)))
        attended = self.merge(self.attention(windows, outside), *x.shape[1:3])
        x = gated_residual(x, self.proj(attended), attention)
        hidden = F.gelu(self.mlp_in(modulated_norm(x, mlp)), approximate="tanh")
        return gated_residual(x, self.mlp_out(hidden), mlp)

    def window_counts(self, rows: int, columns: int) -> tuple[int, int]:
        """Windows along each axis. In this form ``torch.export`` can follow the sizes of padded maps."""
        before = self.offset + self.window - 1
        return (rows + before) // self.window, (columns + before) // self.window

    def partition(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """b × r × c × d -> b × windows × cells × d, padded to whole windows; and windows × cells, True for padding."""
        rows, columns = x.shape[1:3]
        down, across = (count * self.window for count in self.window_counts(rows, columns))
        padding = (0, 0, self.offset, across - columns - self.offset, self.offset, down - rows - self.offset)
        inside = torch.ones((1, rows, columns, 1), dtype=torch.bool, device=x.device)
        return self.windows(F.pad(x, padding)), ~self.windows(F.pad(inside, padding))[0, :, :, 0]

    def windows(self, x: Tensor) -> Tensor:
        return space_to_depth(x, self.window).unflatten(-1, (self.window**2, -1)).flatten(1, 2)

    def merge(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Invert ``partition``."""
        cells = x.flatten(2).unflatten(1, self.window_counts(rows, columns))
        x = depth_to_space(cells, self.window)
        return x[:, self.offset : self.offset + rows, self.offset : self.offset + columns]


def chain(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


class WindowedEncoder(nn.Module):
    """Equation 1: images b × c × h × w of whole cells to one code token per cell, b × (h/16 · w/16) × channels."""

    def __init__(self, config: ModelConfig, channels: int):
        super().__init__()
        self.config, self.width = config, config.enc_hidden_size
        w = self.width
        self.picture_in = Convolution(config.channels * 4**2, w // 4)
        self.down8 = nn.Linear(4 * (w // 4), w // 2)
        self.down16 = nn.Linear(4 * (w // 2), w)
        convolutions = [ConvolutionBlock(n) for n in (w // 4, w // 2) for _ in range(config.conv_depth)]
        attention = [
            WindowedBlock(config, w, config.enc_num_heads, i % 2 == 1, modulated=False) for i in range(config.enc_depth)
        ]
        self.blocks = nn.ModuleList([*convolutions, *attention])
        self.code_out = nn.Linear(w, channels)

    def forward(self, images: Tensor) -> Tensor:
        n = self.config.conv_depth
        x = self.picture_in(space_to_depth(images.permute(0, 2, 3, 1), 4))
        x = self.down8(space_to_depth(chain(self.blocks[:n], x), 2))
        x = self.down16(space_to_depth(chain(self.blocks[n : 2 * n], x), 2))
        return self.code_out(modulated_norm(chain(self.blocks[2 * n :], x))).flatten(1, 2)


class WindowedDecoder(nn.Module):
    """Equation 3: the velocity of the noised image x_t given the code and the timestep."""

    def __init__(self, config: ModelConfig, channels: int):
        super().__init__()
        self.config, self.width = config, config.hidden_size
        w = self.width
        self.time_in = nn.Linear(TIMESTEP_SINUSOIDS, w)
        self.time_out = nn.Linear(w, w)
        self.modulation = nn.Linear(w, 8 * w)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.code_in = nn.Linear(2 * channels + 1, w)
        self.picture_in16 = nn.Linear(config.channels * 16**2, w)
        self.picture_in8 = nn.Linear(config.channels * 8**2, w // 2)
        self.picture_in4 = nn.Linear(config.channels * 4**2, w // 4)
        self.up8 = nn.Linear(w, 4 * (w // 2))
        self.up4 = nn.Linear(w // 2, 4 * (w // 4))
        attention = [
            WindowedBlock(config, w, config.num_heads, i % 2 == 1, modulated=True) for i in range(config.dec_depth)
        ]
        convolutions = [ConvolutionBlock(n) for n in (w // 2, w // 4) for _ in range(config.conv_depth)]
        self.blocks = nn.ModuleList([*attention, *convolutions])
        self.picture_out = Convolution(w // 4, config.channels * 4**2)

    def embed_code(self, code: Tensor, keep: Tensor | None = None) -> Tensor:
        """b × m × channels -> b × m × width. A channel that is exactly 0 was not sent; a mask tells the decoder so."""
        code = F.pad(torch.cat((code, (code != 0).to(code.dtype)), dim=-1), (0, 1), value=1.0)
        if keep is not None:
            code = code * keep[:, None, None].to(code.dtype)
        return self.code_in(code)

    def forward(self, x_t: Tensor, code: Tensor, t: Tensor, end: Tensor | None = None) -> Tensor:
        """Arguments and result as in ``Decoder.forward``; ``end`` is unused."""
        time = F.silu(self.time_out(F.silu(self.time_in(timestep_embedding(t)))))
        common = self.modulation(time).float().unflatten(-1, (8, -1))
        depth, n = self.config.dec_depth, self.config.conv_depth
        patches = space_to_depth(x_t.permute(0, 2, 3, 1), 4)
        rows, columns = x_t.shape[-2] // CELL, x_t.shape[-1] // CELL
        x = code.unflatten(1, (rows, columns)) + self.picture_in16(space_to_depth(patches, 4))
        for block in self.blocks[:depth]:
            x = block(x, common[:, :6])
        modulation = Modulation(*(part[:, None, None] for part in common[:, 6:].unbind(1)))
        x = depth_to_space(self.up8(modulated_norm(x, modulation)), 2) + self.picture_in8(space_to_depth(patches, 2))
        x = chain(self.blocks[depth : depth + n], x)
        x = depth_to_space(self.up4(modulated_norm(x)), 2) + self.picture_in4(patches)
        x = chain(self.blocks[depth + n :], x)
        out = depth_to_space(self.picture_out(modulated_norm(x)), 4).permute(0, 3, 1, 2).float()
        return velocity_from(out, x_t, t, self.config.prediction)
