"""Checkpoints of the authors (github kylesargent/FlowMo): their state dict to ours.

Their model carries about 80 M parameters that never act: the encoder's modulation, time MLP and image head, the
decoder's code head, the last block's unread stream except its keys and values, and the encoder's weights for an
all-zero code. These are dropped. Any other difference is an error, here or when a network loads the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flowmo.checkpoint import CheckpointError
from flowmo.config import Config, ConfigError, ModelConfig

HEADS = 12  # in every model of the release
GROUPS = {18: 9, 56: 14}  # entropy group of the published models by bits per token; weights do not show it
BLOCK = re.compile(r"(encoder|decoder)\.double_blocks\.(\d+)\.(img|txt)_(.+)")
DEAD = re.compile(
    r"encoder\.(time_in\..+|txt_in\.weight|.+_mod\.lin\..+|final_layer_img\..+|final_layer_txt\.adaLN_modulation\..+)"
    r"|decoder\.final_layer_txt\..+"
)
STREAMS = {"img": "picture", "txt": "code"}
LAYERS = {
    "encoder.img_in": "encoder.picture_in",
    "encoder.final_layer_txt.linear": "encoder.code_out",
    "decoder.time_in.in_layer": "decoder.time_in",
    "decoder.time_in.out_layer": "decoder.time_out",
    "decoder.img_in": "decoder.picture_in",
    "decoder.txt_in": "decoder.code_in",
    "decoder.final_layer_img.linear": "decoder.picture_out",
    "decoder.final_layer_img.adaLN_modulation.1": "decoder.out_modulation",
}
BLOCK_LAYERS = {
    "mod.lin": "modulation",
    "attn.qkv": "qkv",
    "attn.norm.query_norm": "query_norm",
    "attn.norm.key_norm": "key_norm",
    "attn.proj": "proj",
    "mlp.0": "mlp_in",
    "mlp.2": "mlp_out",
}


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


def convert_release(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Convert an authors' state dict to weights of ``FlowMo(config)``.

    Raises:
        CheckpointError: a key is unexpected. A network that loads the result finds missing and misshapen tensors.
    """
    converted, unexpected = {}, []
    for key, value in state.items():
        try:
            if found := _ours(key, config.model):
                converted[found[0]] = value[found[1]]
        except (KeyError, TypeError, IndexError):
            unexpected.append(str(key))
    if unexpected:
        raise CheckpointError(
            f"The checkpoint has the unexpected {', '.join(unexpected[:3])} ({len(unexpected)} such)."
        )
    return converted


def _ours(key: str, m: ModelConfig) -> tuple[str, slice] | None:
    """Return our name of an authors' tensor and its rows that act, or ``None`` if none do."""
    everything, (layer, _, kind) = slice(None), key.rpartition(".")
    if DEAD.fullmatch(key):
        return None
    if key == "encoder.txt_in.bias":  # the encoder's code is zeros, so only the bias acts
        return "encoder.code_embedding", everything
    block = BLOCK.fullmatch(layer)
    if not block:
        return f"{LAYERS[layer]}.{kind}", everything
    network, number, stream, name = block.groups()
    ours, rows = BLOCK_LAYERS[name], everything
    width, depth, unread = (
        (m.hidden_size, m.dec_depth, "txt") if network == "decoder" else (m.enc_hidden_size, m.enc_depth, "img")
    )
    if stream == unread and int(number) == depth - 1:  # only its keys and values act
        acting = {"modulation": ("modulation", slice(2 * width)), "qkv": ("kv", slice(width, None))}
        acting["key_norm"] = ("key_norm", everything)
        if ours not in acting:
            return None
        ours, rows = acting[ours]
    return f"{network}.blocks.{number}.{STREAMS[stream]}.{ours}.{kind}", rows
