"""Bottlenecks, one per file, behind one base class.

To add one, write a file here and a line in ``QUANTIZERS``. Add its name in ``config/sections.py`` to the choices of
``model.quantization_type`` and, if it has ids, to ``ids_per_token``. ``config/rules.py`` checks how its channels split
into ids, and which bottlenecks allow ``model.nested_dropout``, which needs ``sub_token_of``.
"""

from flowmo.config.sections import ModelConfig
from flowmo.model.quantizers.base import Quantized, Quantizer, WholeBatch, local_statistic
from flowmo.model.quantizers.bsq import BSQ
from flowmo.model.quantizers.fsq import FSQ
from flowmo.model.quantizers.infill import HUB_NAMES, Infill
from flowmo.model.quantizers.kl import KL
from flowmo.model.quantizers.layernorm import LayerNorm
from flowmo.model.quantizers.lfq import LFQ
from flowmo.model.quantizers.vq import VQ

__all__ = ["QUANTIZERS", "Quantized", "Quantizer", "WholeBatch", "build_quantizer", "local_statistic"]

QUANTIZERS: dict[str, type[Quantizer]] = {
    "lfq": LFQ,
    "bsq": BSQ,
    "fsq": FSQ,
    "vq": VQ,
    "kl": KL,
    "layernorm": LayerNorm,
    "noop": Quantizer,
    **dict.fromkeys(HUB_NAMES, Infill),
}
"""Bottlenecks by ``model.quantization_type``."""


def build_quantizer(config: ModelConfig) -> Quantizer:
    """Build the bottleneck that ``model.quantization_type`` names."""
    return QUANTIZERS[config.quantization_type](config)
