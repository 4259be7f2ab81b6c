"""Bottlenecks, one a file, behind one contract (``contract.Quantizer``). A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flowmo.model.quantizers.base import Learner, Quantized, Quantizer, WholeBatch, alone, check_ids
from flowmo.model.quantizers.bsq import BSQ
from flowmo.model.quantizers.fsq import FSQ
from flowmo.model.quantizers.identity import Identity
from flowmo.model.quantizers.infill import HUB_NAMES, Infill
from flowmo.model.quantizers.kl import KL
from flowmo.model.quantizers.layernorm import LayerNorm
from flowmo.model.quantizers.lfq import LFQ
from flowmo.model.quantizers.vq import VQ

if TYPE_CHECKING:
    from flowmo.config import ModelConfig

__all__ = [
    "BSQ",
    "FSQ",
    "KL",
    "LFQ",
    "VQ",
    "Identity",
    "Infill",
    "LayerNorm",
    "Learner",
    "Quantized",
    "Quantizer",
    "WholeBatch",
    "alone",
    "build_quantizer",
    "check_ids",
]


def build_quantizer(model: ModelConfig) -> Quantizer:
    """The bottleneck that ``model.quantization_type`` names, with that section's settings."""
    bits = (model.context_dim, model.codebook_size_for_entropy, model.entropy_loss_weight, model.commit_loss_weight)
    builders: dict[str, Callable[[], Quantizer]] = {
        "lfq": lambda: LFQ(*bits),
        "bsq": lambda: BSQ(*bits),
        "fsq": lambda: FSQ(model.context_dim, model.fsq_levels, model.codebook_size_for_entropy),
        "vq": lambda: VQ(
            model.context_dim, model.vq_entries, model.vq_sub_tokens, model.vq_decay, model.vq_commit_weight
        ),
        "kl": lambda: KL(model.context_dim),
        "layernorm": lambda: LayerNorm(model.context_dim),
        "noop": lambda: Identity(model.context_dim),
    }
    if model.quantization_type in HUB_NAMES:
        return Infill(model.context_dim, model.language_model or model.quantization_type)
    return builders[model.quantization_type]()
