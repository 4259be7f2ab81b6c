"""The authors' checkpoints (github kylesargent/FlowMo): their state dict to ours.

Their model carries about 80 M parameters that never act: the encoder's modulation, time MLP and picture head, the
decoder's code head, all of the last block's unread stream but its keys and values, and the encoder's map of an
all-zero code. They are dropped; anything else that is missing, unexpected or misshapen is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from flowmo.config import Config, ConfigError
from flowmo.errors import FlowMoError
from flowmo.model.transformer import Shape

HEADS = 12  # in every model of the release
GROUPS = {18: 9, 56: 14}  # entropy group of the published models by their bits a token; no weight tells it
STREAMS = {"img": "picture", "txt": "code"}
STREAM_KEYS = {
    "{s}_attn.qkv": "qkv",
    "{s}_attn.norm.query_norm.scale": "query_norm.scale",
    "{s}_attn.norm.key_norm.scale": "key_norm.scale",
    "{s}_attn.proj": "proj",
    "{s}_mlp.0": "mlp_in",
    "{s}_mlp.2": "mlp_out",
    "{s}_mod.lin": "modulation",
}


class CheckpointMismatchError(FlowMoError, ValueError):
    """A state dict is not of the architecture expected; the message names the first keys that differ."""


def is_release(state: Mapping[str, Any]) -> bool:
    return "decoder.double_blocks.0.img_attn.qkv.weight" in state


def release_config(state: Mapping[str, Tensor]) -> Config:
    """The settings that the shapes of an authors' state dict imply. Code length and entropy group leave no trace in
    the weights: they are the published models' (256 tokens, groups of 9 or 14 bits) until overridden."""
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
        raise CheckpointMismatchError(f"not a FlowMo checkpoint of the authors' release: {error} is missing") from None
    group = GROUPS.get(channels) or next(g for g in range(min(14, channels), 0, -1) if channels % g == 0)
    try:
        return Config().updated({**values, "model.codebook_size_for_entropy": group})
    except ConfigError as error:
        raise CheckpointMismatchError(f"the checkpoint's shapes make no FlowMo: {error}") from None


def _depth(state: Mapping[str, Tensor], net: str) -> int:
    numbers = {int(key.split(".")[2]) for key in state if key.startswith(f"{net}.double_blocks.")}
    return max(numbers) + 1


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every key of the authors' model with these settings, and its shape."""
    m = config.model
    code_in = m.context_dim * (2 if m.quantization_type == "kl" else 1)
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    for net, shape, channels in (
        ("encoder", Shape.encoder(config.model), code_in),
        ("decoder", Shape.decoder(config.model), m.context_dim + 1),
    ):
        w, hidden, pixels = shape.width, int(shape.width * shape.mlp_ratio), 3 * shape.patch**2
        linear(f"{net}.time_in.in_layer", w, 256)
        linear(f"{net}.time_in.out_layer", w, w)
        linear(f"{net}.img_in", w, pixels)
        linear(f"{net}.txt_in", w, channels)
        for i in range(shape.depth):
            for s in STREAMS:
                block = f"{net}.double_blocks.{i}.{s}"
                linear(f"{block}_mod.lin", 6 * w, w)
                linear(f"{block}_attn.qkv", 3 * w, w)
                shapes[f"{block}_attn.norm.query_norm.scale"] = (shape.head_dim,)
                shapes[f"{block}_attn.norm.key_norm.scale"] = (shape.head_dim,)
                linear(f"{block}_attn.proj", w, w)
                linear(f"{block}_mlp.0", hidden, w)
                linear(f"{block}_mlp.2", w, hidden)
        for s, out in (("img", pixels), ("txt", channels)):
            linear(f"{net}.final_layer_{s}.linear", out, w)
            linear(f"{net}.final_layer_{s}.adaLN_modulation.1", 2 * w, w)
    return shapes


def convert_release(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Weights of ``FlowMo(config)`` from an authors' state dict.

    Raises:
        CheckpointMismatchError: a key is missing, unexpected or of another shape than these settings give.
    """
    expected = expected_shapes(config)
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    misshapen = [
        f"{key} is {tuple(state[key].shape)}, not {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    for problem, keys in (("lacks", missing), ("has the unexpected", extra), ("does not fit:", misshapen)):
        if keys:
            raise CheckpointMismatchError(f"the checkpoint {problem} {', '.join(keys[:3])} ({len(keys)} such)")
    return dict(_renamed(state, config))


def _renamed(state: Mapping[str, Tensor], config: Config) -> Iterator[tuple[str, Tensor]]:
    def linear(name: str, new: str, rows: slice = slice(None)) -> Iterator[tuple[str, Tensor]]:
        for kind in ("weight", "bias"):
            yield f"{new}.{kind}", state[f"{name}.{kind}"][rows]

    yield from linear("encoder.img_in", "encoder.picture_in")
    yield "encoder.code_embedding", state["encoder.txt_in.bias"]
    yield from linear("encoder.final_layer_txt.linear", "encoder.code_out")
    yield from linear("decoder.time_in.in_layer", "decoder.time_in")
    yield from linear("decoder.time_in.out_layer", "decoder.time_out")
    yield from linear("decoder.img_in", "decoder.picture_in")
    yield from linear("decoder.txt_in", "decoder.code_in")
    yield from linear("decoder.final_layer_img.adaLN_modulation.1", "decoder.out_modulation")
    yield from linear("decoder.final_layer_img.linear", "decoder.picture_out")
    for net, shape, unread in (
        ("encoder", Shape.encoder(config.model), "img"),
        ("decoder", Shape.decoder(config.model), "txt"),
    ):
        w = shape.width
        for i in range(shape.depth):
            for s, stream in STREAMS.items():
                old, new = f"{net}.double_blocks.{i}.", f"{net}.blocks.{i}.{stream}."
                if i == shape.depth - 1 and s == unread:  # only what the other stream attends to
                    yield f"{new}key_norm.scale", state[f"{old}{s}_attn.norm.key_norm.scale"]
                    yield from linear(f"{old}{s}_attn.qkv", f"{new}kv", slice(w, None))
                    if net == "decoder":
                        yield from linear(f"{old}{s}_mod.lin", f"{new}modulation", slice(0, 2 * w))
                    continue
                for pattern, name in STREAM_KEYS.items():
                    key = pattern.format(s=s)
                    if key.endswith(".scale"):
                        yield new + name, state[old + key]
                    elif name != "modulation" or net == "decoder":
                        yield from linear(old + key, new + name)
