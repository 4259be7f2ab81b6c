"""Continuous bottleneck whose code a frozen language model must be able to fill in.

In training a random span of the code's tokens is replaced by what a causal language model makes of it: its last hidden
states at the span's places, when it reads the code in fill-in-the-middle order (prefix mark, what comes before, suffix
mark, what comes after, middle mark, span). Gradients flow through the model to the encoder; the model stays as it is.
Without training the code is passed on unchanged and no language model is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowmo.errors import FlowMoError
from flowmo.losses.torchvision_import import before_importing
from flowmo.model.quantizers.base import Quantized, WholeBatch, alone

SPAN_SHARE = 0.3
MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
HUB_NAMES = {"qwen2.5-coder-0.5b": "Qwen/Qwen2.5-Coder-0.5B"}


class LanguageModelError(FlowMoError, ValueError):
    """A language model that is not there, or does not fit the code."""


class Infill:
    """Continuous code of ``channels`` channels a token, a span of it seen through a causal language model.

    Args:
        channels: hidden size of the language model.
        name: a key of ``HUB_NAMES``, the name of a model on the Hub, or a folder of one saved by ``transformers``.

    Raises:
        LanguageModelError: on the first training pass, where the model cannot be loaded or has another hidden size.
    """

    sub_tokens = id_count = None
    needs_whole_batch = False

    def __init__(self, channels: int, name: str):
        self.channels = self.encoder_channels = channels
        self.name = name
        self._model: Any = None
        self._marks: list[int] = []

    def __call__(self, code: Tensor, whole_batch: WholeBatch = alone) -> Quantized:
        length = code.shape[1]
        span = max(round(SPAN_SHARE * length), 1)
        start = int(torch.randint(length - span + 1, ()))
        return Quantized(self.fill_in(code.float(), start, start + span), None)

    def fill_in(self, code: Tensor, start: int, end: int) -> Tensor:
        """``code`` b × tokens × channels with the tokens from ``start`` up to ``end`` seen through the model."""
        model = self._load(code.device)
        before, span, after = code[:, :start], code[:, start:end], code[:, end:]
        marks = model.get_input_embeddings()(torch.tensor(self._marks, device=code.device))
        prefix, suffix, middle = (mark.expand(len(code), 1, -1) for mark in marks)
        read = torch.cat((prefix, before, suffix, after, middle, span), dim=1)
        seen = model(inputs_embeds=read.to(marks.dtype), use_cache=False).last_hidden_state
        return torch.cat((before, seen[:, -span.shape[1] :].float(), after), dim=1)

    def quantize(self, code: Tensor) -> tuple[Tensor, None]:
        return code.float(), None

    def code_from_ids(self, ids: Tensor) -> Tensor:
        raise TypeError("this tokenizer's code is continuous and has no ids; keep the Codes that encode returned")

    def _load(self, device: torch.device) -> Any:
        if self._model is None:
            self._model, self._marks = load_language_model(HUB_NAMES.get(self.name, self.name), self.channels)
        if self._model.device != device:
            self._model.to(device)
        return self._model


def load_language_model(name: str, channels: int) -> tuple[Any, list[int]]:
    """A frozen causal language model without its head, and its ids of ``MARKS``.

    Where it comes without a tokenizer, its last three ids serve as marks.

    Raises:
        LanguageModelError: ``transformers`` is missing, the model cannot be loaded, or its hidden size is another.
    """
    before_importing("transformers")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise LanguageModelError(f"{name}: a language model needs transformers: pip install transformers") from None
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LanguageModelError(f"{name}: no such language model ({' '.join(str(error).split())[:150]})") from None
    if config.hidden_size != channels:
        raise LanguageModelError(
            f"{name} has hidden size {config.hidden_size}; write model.context_dim={config.hidden_size}, not {channels}"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(name).base_model
    except (OSError, ValueError) as error:
        raise LanguageModelError(f"{name}: cannot be loaded ({' '.join(str(error).split())[:150]})") from None
    try:
        marks = AutoTokenizer.from_pretrained(name).convert_tokens_to_ids(list(MARKS))
    except (OSError, ValueError, KeyError, TypeError):
        marks = []
    if None in marks or len(set(marks)) < len(MARKS):  # a tokenizer without them calls all of them unknown
        marks = list(range(config.vocab_size - len(MARKS), config.vocab_size))
    return model.eval().requires_grad_(False), marks
