"""The straightforward reading of the paper, as a yardstick for speed: same weights, same pictures, nothing spared.

Every pass builds its rotary table anew; each picture of a batch has a time embedding and modulations of its own; code
and null code go through the network one after the other; keys, queries and values are three products. Only what never
acts (see ``docs/architecture.md``) is missing here too, because its weights are.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo import streams as random_streams
from flowmo.model.sampler import seeded_noise, shifted_times
from flowmo.model.transformer import (
    MIN_PREDICTION_TIME,
    NORM_EPS,
    Decoder,
    DoubleStreamBlock,
    Encoder,
    RMSNorm,
    StreamLayers,
    patchify,
    rotary_angles,
    rotary_table,
    timestep_embedding,
    unpatchify,
)
from flowmo.tokenizer import FlowMo


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def turn(x: Tensor, table: Tensor) -> Tensor:
    """Channel pairs as complex numbers, turned: b h n d."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(*table[..., ::2])).flatten(-2)


def heads(x: Tensor, weight: Tensor, bias: Tensor, count: int, rms: RMSNorm | None, table: Tensor) -> Tensor:
    x = F.linear(x, weight, bias).unflatten(-1, (count, -1)).transpose(1, 2)
    return x if rms is None else turn(rms(x), table)


def project(stream: StreamLayers, x: Tensor, table: Tensor) -> list[Tensor | None]:
    """Queries, keys and values b h n d."""
    layer = stream.kv if stream.keys_only else stream.qkv
    count = 2 if stream.keys_only else 3
    parts = list(zip(layer.weight.chunk(count), layer.bias.chunk(count), strict=True))
    norms = [stream.key_norm, None] if stream.keys_only else [stream.query_norm, stream.key_norm, None]
    made = [heads(x, *part, stream.heads, rms, table) for part, rms in zip(parts, norms, strict=True)]
    return [None, *made] if stream.keys_only else made


def block(layer: DoubleStreamBlock, code: Tensor, picture: Tensor, table: Tensor, time: Tensor | None):
    length = code.shape[1]
    streams = [(layer.code, code, table[:, :length]), (layer.picture, picture, table[:, length:])]
    projected, modulations = [], []
    for stream, x, part in streams:
        modulation = None
        x = norm(x)
        if stream.modulation is not None:
            modulation = stream.modulation(F.silu(time))[:, None].chunk(2 if stream.keys_only else 6, dim=-1)
            x = (1 + modulation[1]) * x + modulation[0]
        projected.append(project(stream, x, part))
        modulations.append(modulation)
    query = torch.cat([q for q, *_ in projected if q is not None], dim=2)
    key, value = (torch.cat([p[i] for p in projected], dim=2) for i in (1, 2))
    mixed = F.scaled_dot_product_attention(query, key, value, scale=layer.attention_scale).transpose(1, 2).flatten(2)
    results, start = [], 0
    for (stream, x, _), (q, *_), modulation in zip(streams, projected, modulations, strict=True):
        if q is None:
            results.append(x)
            continue
        update = stream.proj(mixed[:, start : start + x.shape[1]])
        start += x.shape[1]
        x = x + (update if modulation is None else modulation[2] * update)
        hidden = norm(x) if modulation is None else (1 + modulation[4]) * norm(x) + modulation[3]
        update = stream.mlp_out(F.gelu(stream.mlp_in(hidden), approximate="tanh"))
        results.append(x + (update if modulation is None else modulation[5] * update))
    return results


def fresh_table(net: Encoder | Decoder, height: int, width: int, device: torch.device) -> Tensor:
    rotary_angles.cache_clear()
    return rotary_table(net.config, net.width // net.heads, height, width, device)


@torch.no_grad()
def encode(tokenizer: FlowMo, images: Tensor) -> Tensor:
    """The code before quantization."""
    net = tokenizer.encoder
    table = fresh_table(net, *images.shape[-2:], images.device)
    picture = net.picture_in(patchify(images, net.config.patch_size))
    code = net.code_embedding.expand(len(images), net.config.code_length, -1)
    for layer in net.blocks:
        code, picture = block(layer, code, picture, table, None)
    return net.code_out(norm(code))


@torch.no_grad()
def velocity(tokenizer: FlowMo, x: Tensor, code: Tensor, t: float) -> Tensor:
    """One pass; ``code`` has its channel of ones, or is null."""
    net = tokenizer.decoder
    h, w = x.shape[-2:]
    times = torch.full((len(x),), t, device=x.device)
    time = net.time_out(F.silu(net.time_in(timestep_embedding(times))))
    table = fresh_table(net, h, w, x.device)
    code, picture = net.code_in(code), net.picture_in(patchify(x, net.config.patch_size))
    for layer in net.blocks:
        code, picture = block(layer, code, picture, table, time)
    shift, scale = net.out_modulation(F.silu(time))[:, None].chunk(2, dim=-1)
    out = unpatchify(net.picture_out(norm((1 + scale) * norm(picture) + shift)), net.config.patch_size, h)
    return out if net.config.prediction == "velocity" else (x - out) / max(t, MIN_PREDICTION_TIME)


def inputs(tokenizer: FlowMo) -> tuple[Tensor, Tensor, Tensor]:
    """A picture, noise and a code, those of ``flowmo.evaluate.speed.parts``."""
    side, generator = tokenizer.config.data.image_size, random_streams.stream(0, random_streams.Stream.BENCHMARK)
    images = torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    code = torch.randn(1, tokenizer.code_length, tokenizer.config.model.context_dim, generator=generator).sign()
    return tuple(x.to(tokenizer.device) for x in (images, seeded_noise([0], side, side), code))


def marked(code: Tensor) -> Tensor:
    """With the channel of ones that tells a code from the null code."""
    return F.pad(code, (0, 1), value=1.0)


@torch.no_grad()
def decode(tokenizer: FlowMo, code: Tensor, steps: int, guidance: float, x: Tensor) -> Tensor:
    """Quantized code to pictures: a pass of the code and one of the null code wherever guidance applies."""
    own = tokenizer.config.eval.sampling
    code = marked(code)
    times = shifted_times(steps, own.rho)
    for t, t_next in itertools.pairwise(times):
        v = velocity(tokenizer, x, code, t)
        if guidance != 1 and own.guidance_low <= t <= own.guidance_high:
            null = velocity(tokenizer, x, torch.zeros_like(code), t)
            v = null + guidance * (v - null)
        x = x - (t - t_next) * v
    return x.clamp(-1, 1)
