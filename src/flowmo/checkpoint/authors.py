"""Checkpoints of the authors (github kylesargent/FlowMo): their state dict to ours.

Their model carries about 80 M parameters that never act: the encoder's modulation, time MLP and image head, the
decoder's code head, the last block's unread stream except its keys and values, and the encoder's weights for an
all-zero code. These are dropped. Any other difference is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from flowmo.checkpoint import CheckpointError
from flowmo.config import Config, ConfigError, ModelConfig
from flowmo.model.transformer import TIMESTEP_SINUSOIDS

HEADS = 12  # in every model of the release
GROUPS = {18: 9, 56: 14}  # entropy group of the published models by bits per token; weights do not show it


class Entry(NamedTuple):
    """One tensor of the authors' model, and the rows of it that make our tensor ``ours``, or ``None`` if dead."""

    key: str
    shape: tuple[int, ...]
    ours: str | None
    rows: slice


def is_release(state: Mapping[str, Any]) -> bool:
    return "decoder.double_blocks.0.img_attn.qkv.weight" in state


def release_config(state: Mapping[str, Tensor]) -> Config:
    """Infer the settings from the shapes of an authors' state dict.

    Weights do not show the code length and the entropy group. They default to the published models': 256 tokens,
    groups of 9 or 14 bits.
    """
    try:
        channels = state["decoder.txt_in.weight"].shape[1] - 1
        code_channels = state["encoder.txt_in.weight"].shape[1]
        values = {
            "model.patch_size": int((state["decoder.img_in.weight"].shape[1] // 3) ** 0.5),
            "model.hidden_size": state["decoder.img_in.weight"].shape[0],
            "model.num_heads": HEADS,
            "model.enc_hidden_size": state["encoder.img_in.weight"].shape[0],
            "model.enc_num_heads": HEADS,
            "model.dec_depth": _depth(state, "decoder"),
            "model.enc_depth": _depth(state, "encoder"),
            "model.context_dim": channels,
            "model.quantization_type": "kl" if code_channels == 2 * channels else "lfq",
        }
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"This is not a checkpoint of the authors' release: {error} is missing.") from None
    group = GROUPS.get(channels) or next(g for g in range(min(14, channels), 0, -1) if channels % g == 0)
    try:
        return Config().updated({**values, "model.codebook_size_for_entropy": group})
    except ConfigError as error:
        raise CheckpointError(f"The checkpoint's shapes do not make a FlowMo: {error}") from None


def _depth(state: Mapping[str, Tensor], network: str) -> int:
    return max(int(key.split(".")[2]) for key in state if key.startswith(f"{network}.double_blocks.")) + 1


def entries(config: Config) -> Iterator[Entry]:
    """Yield every tensor of the authors' model with these settings."""
    m = config.model
    code_channels = m.context_dim * (2 if m.quantization_type == "kl" else 1)
    yield from _network("encoder", m, m.enc_hidden_size, m.enc_num_heads, m.enc_depth, code_channels)
    yield from _network("decoder", m, m.hidden_size, m.num_heads, m.dec_depth, m.context_dim + 1)


def _linear(key: str, out: int, into: int, ours: str | None = None, rows: slice = slice(None)) -> Iterator[Entry]:
    for kind, shape in (("weight", (out, into)), ("bias", (out,))):
        yield Entry(f"{key}.{kind}", shape, ours and f"{ours}.{kind}", rows)


def _network(network: str, m: ModelConfig, w: int, heads: int, depth: int, channels: int) -> Iterator[Entry]:
    decoder = network == "decoder"
    pixels, hidden = 3 * m.patch_size**2, int(w * m.mlp_ratio)
    yield from _linear(f"{network}.time_in.in_layer", w, TIMESTEP_SINUSOIDS, "decoder.time_in" if decoder else None)
    yield from _linear(f"{network}.time_in.out_layer", w, w, "decoder.time_out" if decoder else None)
    yield from _linear(f"{network}.img_in", w, pixels, f"{network}.picture_in")
    code_in = list(_linear(f"{network}.txt_in", w, channels, "decoder.code_in"))
    if not decoder:  # the encoder's code is zeros, so only the bias acts
        code_in = [code_in[0]._replace(ours=None), code_in[1]._replace(ours="encoder.code_embedding")]
    yield from code_in
    for i in range(depth):
        for theirs, ours in (("img", "picture"), ("txt", "code")):
            unread = i == depth - 1 and theirs == ("txt" if decoder else "img")
            names = f"{network}.double_blocks.{i}.{theirs}", f"{network}.blocks.{i}.{ours}"
            yield from _stream(*names, w, w // heads, hidden, unread)
    for theirs, out in (("img", pixels), ("txt", channels)):
        read = theirs == ("img" if decoder else "txt")
        head, modulation = ("decoder.picture_out", "decoder.out_modulation") if decoder else ("encoder.code_out", None)
        last = f"{network}.final_layer_{theirs}"
        yield from _linear(f"{last}.linear", out, w, head if read else None)
        yield from _linear(f"{last}.adaLN_modulation.1", 2 * w, w, modulation if read else None)


def _stream(theirs: str, ours: str, w: int, head_dim: int, hidden: int, unread: bool) -> Iterator[Entry]:
    """One stream of a block; only the keys and values of an ``unread`` one act."""

    def live(name: str) -> str | None:
        return None if unread else f"{ours}.{name}"

    modulation = f"{ours}.modulation" if ours.startswith("decoder.") else None
    yield from _linear(f"{theirs}_mod.lin", 6 * w, w, modulation, slice(2 * w) if unread else slice(None))
    qkv = (f"{ours}.kv", slice(w, None)) if unread else (f"{ours}.qkv", slice(None))
    yield from _linear(f"{theirs}_attn.qkv", 3 * w, w, *qkv)
    norm = f"{theirs}_attn.norm"
    yield Entry(f"{norm}.query_norm.scale", (head_dim,), live("query_norm.scale"), slice(None))
    yield Entry(f"{norm}.key_norm.scale", (head_dim,), f"{ours}.key_norm.scale", slice(None))
    yield from _linear(f"{theirs}_attn.proj", w, w, live("proj"))
    yield from _linear(f"{theirs}_mlp.0", hidden, w, live("mlp_in"))
    yield from _linear(f"{theirs}_mlp.2", w, hidden, live("mlp_out"))


def convert_release(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Convert an authors' state dict to weights of ``FlowMo(config)``.

    Raises:
        CheckpointError: a key is missing, unexpected or of another shape than these settings give.
    """
    expected = {entry.key: entry for entry in entries(config)}
    misshapen = [
        f"{key} is {tuple(state[key].shape)}, not {entry.shape}"
        for key, entry in expected.items()
        if key in state and tuple(state[key].shape) != entry.shape
    ]
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    for problem, keys in (("lacks", missing), ("has the unexpected", extra), ("does not fit:", misshapen)):
        if keys:
            raise CheckpointError(f"The checkpoint {problem} {', '.join(keys[:3])} ({len(keys)} such).")
    return {e.ours: state[e.key][e.rows] for e in expected.values() if e.ours is not None}
