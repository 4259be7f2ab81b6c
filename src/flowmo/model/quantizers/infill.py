"""Continuous bottleneck: a frozen causal language model must reconstruct spans of the code.

Training replaces a random span of code tokens by the last hidden states of the language model at the span's positions.
The model reads the code in fill-in-the-middle order, <PRE> prefix <SUF> suffix <MID> span. Gradients flow through it to
the encoder. Inference passes the code on unchanged and needs no language model.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from flowmo.config.sections import ModelConfig
from flowmo.errors import FlowMoError, one_line
from flowmo.model.quantizers.base import Quantized, Quantizer, WholeBatch, local_statistic
from flowmo.model.torchvision_import import before_importing

SPAN_SHARE = 0.3
SENTINELS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
HUB_NAMES = {"qwen2.5-coder-0.5b": "Qwen/Qwen2.5-Coder-0.5B"}


class LanguageModelError(FlowMoError, ValueError):
    """A language model that cannot be loaded or does not fit the code."""


class Infill(Quantizer):
    """Continuous code of ``channels`` channels per token. A causal language model predicts one span of it in training.

    ``channels`` is the hidden size of the language model, which ``model.language_model`` names: a model on the Hub or a
    folder saved by ``transformers``. If it is empty, ``model.quantization_type`` names the language model. The first
    training pass loads it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        name = config.language_model or config.quantization_type
        self.name = HUB_NAMES.get(name, name)

    def forward(self, code: Tensor, whole_batch: WholeBatch = local_statistic) -> Quantized:
        length = code.shape[1]
        span = max(round(SPAN_SHARE * length), 1)
        start = int(torch.randint(length - span + 1, ()))
        return Quantized(self.fill_in(code.float(), start, start + span))

    def fill_in(self, code: Tensor, start: int, end: int) -> Tensor:
        """Replace tokens ``start`` to ``end`` of code b × tokens × channels by the language model's hidden states."""
        model, sentinel_ids = load_language_model(self.name, self.channels)
        model.to(code.device)
        before, span, after = code[:, :start], code[:, start:end], code[:, end:]
        sentinels = model.get_input_embeddings()(torch.tensor(sentinel_ids, device=code.device))
        prefix, suffix, middle = (vector.expand(len(code), 1, -1) for vector in sentinels)
        sequence = torch.cat((prefix, before, suffix, after, middle, span), dim=1)
        hidden = model(inputs_embeds=sequence.to(sentinels.dtype), use_cache=False).last_hidden_state
        return torch.cat((before, hidden[:, -span.shape[1] :].float(), after), dim=1)


@cache
def load_language_model(name: str, channels: int) -> tuple[Any, list[int]]:
    """Load a frozen causal language model without its head, once, and the ids of ``SENTINELS`` in its vocabulary.

    If the model has no tokenizer, or its tokenizer lacks them, the vocabulary's last three ids are the sentinel tokens.
    Raises ``LanguageModelError`` if ``transformers`` cannot load the model, or its hidden size is not ``channels``.
    """
    before_importing("transformers")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(name).base_model
    except (ImportError, OSError, ValueError) as error:
        raise LanguageModelError(f"{name}: cannot load a language model by transformers ({one_line(error)})") from None
    width = model.config.hidden_size
    if width != channels:
        raise LanguageModelError(f"{name} has hidden size {width}. Write model.context_dim={width}, not {channels}.")
    try:
        sentinel_ids = AutoTokenizer.from_pretrained(name).convert_tokens_to_ids(list(SENTINELS))
    except (OSError, ValueError, KeyError, TypeError):
        sentinel_ids = []
    if None in sentinel_ids or len(set(sentinel_ids)) < len(SENTINELS):  # unknown tokens share one id
        sentinel_ids = list(range(model.config.vocab_size))[-len(SENTINELS) :]
    return model.eval().requires_grad_(False), sentinel_ids
