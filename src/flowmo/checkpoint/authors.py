"""Checkpoints of the authors (github kylesargent/FlowMo): their state dict to ours.

Their model carries about 87 M parameters that never act: the encoder's modulation, time MLP and image head, the
decoder's code head, the last block's unread stream except its keys and values, and the encoder's weights for an
all-zero code. These are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flowmo.checkpoint import CheckpointError
from flowmo.config import Config, ConfigError

HEADS = 12  # in every model of the release
GROUPS = {18: 9, 56: 14}  # entropy group of the published models by bits per token; weights do not show it
DEAD = re.compile(
    r"encoder\.(time_in\..+|txt_in\.weight|.+_mod\.lin\..+|final_layer_img\..+|final_layer_txt\.adaLN_modulation\..+)"
    r"|decoder\.final_layer_txt\..+"
)
RENAMES = {
    "encoder.txt_in.bias": "encoder.code_embedding",  # the encoder's code is zeros, so only the bias acts
    ".time_in.in_layer.": ".time_in.",
    ".time_in.out_layer.": ".time_out.",
    ".img_in.": ".picture_in.",
    ".txt_in.": ".code_in.",
    ".final_layer_img.linear.": ".picture_out.",
    ".final_layer_img.adaLN_modulation.1.": ".out_modulation.",
    ".final_layer_txt.linear.": ".code_out.",
    ".double_blocks.": ".blocks.",
    ".img_": ".picture.",
    ".txt_": ".code.",
    ".mod.lin.": ".modulation.",
    ".attn.norm.": ".",
    ".attn.": ".",
    ".mlp.0.": ".mlp_in.",
    ".mlp.2.": ".mlp_out.",
}
"""Parts of the names of their tensors -> of ours, replaced in this order."""


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
    group = GROUPS.get(channels) or next((g for g in range(min(14, channels), 0, -1) if channels % g == 0), 1)
    try:
        return Config().updated({**values, "model.codebook_size_for_entropy": group})
    except ConfigError as error:
        raise CheckpointError(f"The checkpoint's shapes do not make a FlowMo: {error}") from None


def _depth(state: Mapping[str, Tensor], network: str) -> int:
    return max(int(key.split(".")[2]) for key in state if key.startswith(f"{network}.double_blocks.")) + 1


def convert_release(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Convert an authors' state dict to weights of ``FlowMo(config)``.

    Other keys are kept: a network that loads the result refuses unexpected, missing and misshapen tensors.
    """
    m, converted = config.model, {}
    unread = {
        f"encoder.blocks.{m.enc_depth - 1}.picture.": m.enc_hidden_size,
        f"decoder.blocks.{m.dec_depth - 1}.code.": m.hidden_size,
    }
    for key, value in state.items():
        if DEAD.fullmatch(key):
            continue
        for theirs, ours in RENAMES.items():
            key = key.replace(theirs, ours)
        width = next((width for stream, width in unread.items() if key.startswith(stream)), None)
        if width is None or ".key_norm." in key:
            converted[key] = value
        elif ".qkv." in key:  # of an unread stream only keys and values act
            converted[key.replace(".qkv.", ".kv.")] = _checked(key, value, 3 * width)[width:]
        elif ".modulation." in key:
            converted[key] = _checked(key, value, 6 * width)[: 2 * width]
    return converted


def _checked(key: str, value: Tensor, rows: int) -> Tensor:
    if len(value) != rows:
        raise CheckpointError(f"{key} has {len(value)} rows, not {rows}.")
    return value
