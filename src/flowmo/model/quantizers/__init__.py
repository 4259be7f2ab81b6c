"""Bottlenecks, one per file, behind one base class.

A new one is a file here, a line in ``QUANTIZERS``, and its name in ``config/sections.py``: among the choices of
``model.quantization_type`` and, if it has ids, in ``ids_per_token``.
"""

from __future__ import annotations

from collections.abc import Callable

from flowmo.config.sections import ModelConfig
from flowmo.model.quantizers.base import Learner, Quantized, Quantizer, WholeBatch, local_statistic
from flowmo.model.quantizers.bsq import BSQ
from flowmo.model.quantizers.fsq import FSQ
from flowmo.model.quantizers.identity import Identity
from flowmo.model.quantizers.infill import HUB_NAMES, Infill
from flowmo.model.quantizers.kl import KL
from flowmo.model.quantizers.layernorm import LayerNorm
from flowmo.model.quantizers.lfq import LFQ
from flowmo.model.quantizers.vq import VQ

__all__ = [
    "BSQ",
    "FSQ",
    "KL",
    "LFQ",
    "QUANTIZERS",
    "VQ",
    "Identity",
    "Infill",
    "LayerNorm",
    "Learner",
    "Quantized",
    "Quantizer",
    "WholeBatch",
    "build_quantizer",
    "local_statistic",
]


def _binary(kind: type[LFQ], m: ModelConfig) -> LFQ:
    return kind(m.context_dim, m.codebook_size_for_entropy, m.entropy_loss_weight, m.commit_loss_weight)


QUANTIZERS: dict[str, Callable[[ModelConfig], Quantizer]] = {
    "lfq": lambda m: _binary(LFQ, m),
    "bsq": lambda m: _binary(BSQ, m),
    "fsq": lambda m: FSQ(m.context_dim, m.fsq_levels, m.codebook_size_for_entropy),
    "vq": lambda m: VQ(m.context_dim, m.vq_entries, m.vq_sub_tokens, m.vq_decay, m.vq_commit_weight),
    "kl": lambda m: KL(m.context_dim),
    "layernorm": lambda m: LayerNorm(m.context_dim),
    "noop": lambda m: Identity(m.context_dim),
    **dict.fromkeys(HUB_NAMES, lambda m: Infill(m.context_dim, m.language_model or m.quantization_type)),
}
"""Bottlenecks by ``model.quantization_type``."""


def build_quantizer(model: ModelConfig) -> Quantizer:
    """Build the bottleneck that ``model.quantization_type`` names."""
    return QUANTIZERS[model.quantization_type](model)
