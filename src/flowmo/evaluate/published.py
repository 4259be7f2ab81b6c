"""Published metrics, not measured here: tables 1 and 3 of the paper."""

from __future__ import annotations

import math
from typing import NamedTuple


class Published(NamedTuple):
    """A table row: 50 000 images of ImageNet-1K validation at 256 × 256.

    Attributes:
        tokens, bits: tokens per image, and bits per token; ``None`` for a continuous code.
        own: reported by the tokenizer's authors, not measured by the paper.
    """

    name: str
    tokens: int
    bits: float | None
    rfid: float
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    own: bool = False

    @property
    def bits_per_pixel(self) -> float | None:
        return None if self.bits is None else self.tokens * self.bits / 256**2


COSMOS_BITS = math.log2(8**3 * 5**3)  # levels of its FSQ

TABLE_1 = (
    Published("TiTok-L-32", 32, 12, 2.21, 15.60, 0.359, 0.322),
    Published("TiTok-B-64", 64, 12, 1.70, 16.80, 0.407, 0.252),
    Published("TiTok-S-128", 128, 12, 1.71, 17.52, 0.437, 0.210),
    Published("LlamaGen-16", 256, 14, 2.19, 20.67, 0.589, 0.132),
    Published("MaskBiT", 256, 14, 1.37, 21.5, 0.56, own=True),
    Published("Cosmos DI-16x16", 256, COSMOS_BITS, 4.40, 19.98, 0.536, 0.153),
    Published("OpenMagViT-V2", 256, 18, 1.17, 21.63, 0.640, 0.111),
    Published("FlowMo-Lo", 256, 18, 0.95, 22.07, 0.649, 0.113),
    Published("ViT-VQGAN", 1024, 13, 1.28, own=True),
    Published("LlamaGen-32", 1024, 14, 0.59, 24.44, 0.768, 0.064),
    Published("FlowMo-Hi", 1024, 14, 0.56, 24.93, 0.785, 0.073),
    Published("Cosmos DI-8x8", 1024, COSMOS_BITS, 0.87, 24.82, 0.763, 0.072),
)
TABLE_3 = (
    Published("DiTo", 256, None, 0.78, 24.10, 0.706, 0.102, own=True),
    Published("FlowMo, continuous", 256, None, 0.65, 26.61, 0.791, 0.054),
)
