"""No bottleneck at all (the release's ``noop``): the upper bound that the others are measured against."""

from __future__ import annotations

from torch import Tensor

from flowmo.model.quantizers.base import Quantized, WholeBatch, alone


class Identity:
    """Continuous code of ``channels`` channels a token, passed on unchanged and without a loss."""

    sub_tokens = id_count = None
    needs_whole_batch = False

    def __init__(self, channels: int):
        self.channels = self.encoder_channels = channels

    def __call__(self, code: Tensor, whole_batch: WholeBatch = alone) -> Quantized:
        return Quantized(code.float(), None)

    def quantize(self, code: Tensor) -> tuple[Tensor, None]:
        return code.float(), None

    def code_from_ids(self, ids: Tensor) -> Tensor:
        raise TypeError("this tokenizer has no bottleneck and so no ids; keep the Codes that encode returned")
