"""The authors' own model beside ours: their code, from a clone of their repository, and the same weights in both.

``pip install einops mup==1.0.0`` and a clone of github.com/kylesargent/FlowMo are what it takes. Their package has the
name of ours, which stands aside while theirs is imported. Their ``reconstruct`` wants CUDA and bfloat16; the decode
that is timed is the loop that it calls, ``rf_sample``, with its arguments.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flowmo import Config, FlowMo
from flowmo.checkpoint.authors import convert_release
from flowmo.tokenizer import build

WIDTH_UNIT = 192
"""Their widths are counted in this many channels."""


def import_models(repository: Path) -> ModuleType:
    """Their ``flowmo.models``."""
    theirs = ModuleType("flowmo")
    theirs.__path__ = [str(repository / "flowmo")]
    ours, sys.modules["flowmo"] = sys.modules["flowmo"], theirs
    try:
        return importlib.import_module("flowmo.models")
    finally:
        sys.modules["flowmo"] = ours


def settings(config: Config) -> Any:
    """Ours in their names, as much of them as their model reads."""
    model, sampling = config.model, config.eval.sampling
    low, high = (t / (1 - t) for t in (sampling.guidance_low, sampling.guidance_high))
    return SimpleNamespace(
        data=SimpleNamespace(image_size=config.data.image_size),
        model=SimpleNamespace(
            code_length=model.code_length,
            context_dim=model.context_dim,
            enc_depth=model.enc_depth,
            dec_depth=model.dec_depth,
            patch_size=model.patch_size,
            quantization_type=model.quantization_type,
            codebook_size_for_entropy=model.codebook_size_for_entropy,
            enc_mup_width=model.enc_hidden_size // WIDTH_UNIT,
        ),
        eval=SimpleNamespace(sampling=SimpleNamespace(cfg_interval=f"({low}, {high})")),
    )


def both(repository: Path, config: Config) -> tuple[FlowMo, dict[str, Callable[..., Tensor]]]:
    """Our tokenizer and the parts of theirs, of the same random weights.

    The parts take what ``plain.inputs`` gives: ``encode`` images, ``decoder pass`` noise and a marked code,
    ``decode`` the same.
    """
    import mup

    models = import_models(repository)
    own = settings(config)
    width = config.model.hidden_size // WIDTH_UNIT
    make = lambda width: models.FlowMo(width=width, config=own)  # noqa: E731
    torch.manual_seed(0)
    theirs = mup.set_base_shapes(make(width), make(width), delta=make(4 if width == 1 else 1)).eval()
    theirs.requires_grad_(False)
    for parameter in theirs.decoder.parameters():  # open the gates, or the blocks would not show
        parameter.add_(0.02 * torch.randn_like(parameter))
    ours = build(config, convert_release(theirs.state_dict(), config))
    sampling = config.eval.sampling

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        return theirs.encode(images)[0]

    @torch.no_grad()
    def decoder_pass(noise: Tensor, code: Tensor) -> Tensor:
        return theirs.decode(noise, code, torch.ones(len(noise)))[0]

    @torch.no_grad()
    def decode(noise: Tensor, code: Tensor) -> Tensor:
        guidance = sampling.guidance
        schedule = f"pow_{1 / sampling.rho}" if sampling.rho != 1 else "linear"
        null = torch.zeros_like(code) if guidance != 1 else None
        samples = models.rf_sample(theirs, noise, code, null, sampling.sample_steps, guidance, schedule)
        return samples[-1].clip(-1, 1)

    return ours.eval().requires_grad_(False), {"encode": encode, "decoder pass": decoder_pass, "decode": decode}
