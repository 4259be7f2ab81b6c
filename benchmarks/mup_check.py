"""Coordinate check of µP: do activations, and their changes by training, keep their scale over widths?

If they do, a learning rate found at a small width serves a large one (Yang et al. 2022, appendix D.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowmo.config import Config
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.stages import pretrain_loss
from flowmo.streams import Stream, seed_global
from flowmo.tokenizer import FlowMo
from flowmo.train.optimizer import NormControl, build_optimizers, scale_initial_weights, set_learning_rate


@dataclass(frozen=True)
class Coordinates:
    """Scales at several widths.

    Attributes:
        widths: ascending.
        size: by layer, the mean absolute activation after the last step, one a width.
        change: by layer, the mean absolute change of the activations since the first step, one a width.
    """

    widths: tuple[int, ...]
    size: dict[str, list[float]]
    change: dict[str, list[float]]

    def slopes(self, scales: dict[str, list[float]]) -> dict[str, float]:
        """Exponent of width by which each layer's scale grows: 0 is flat, 1 proportional to the width."""
        x = torch.tensor(self.widths).double().log()
        x = x - x.mean()
        return {name: float(x @ torch.tensor(y).double().log() / (x @ x)) for name, y in scales.items()}


def coordinate_check(
    config: Config, widths: Sequence[int], images: Tensor, steps: int = 4, seeds: Sequence[int] = (0, 1, 2)
) -> Coordinates:
    """Train ``config`` at each width for some steps of one batch, and read every block's and readout's activations.

    Args:
        config: ``opt.lr`` is that of the base width, ``opt.mup_base_width``; 0 there checks the release's behaviour.
        widths: of encoder and decoder alike; the number of heads stays.
        images: b 3 h w in [−1, 1].
        seeds: scales are means over runs from these.
    """
    size: dict[str, list[float]] = {}
    change: dict[str, list[float]] = {}
    for width in widths:
        runs = [_one_run(config, width, images, steps, seed) for seed in seeds]
        for name in runs[0][0]:
            before, after = ([run[i][name] for run in runs] for i in (0, 1))
            size.setdefault(name, []).append(_mean(a.abs().mean() for a in after))
            change.setdefault(name, []).append(_mean((a - b).abs().mean() for b, a in zip(before, after, strict=True)))
    return Coordinates(tuple(widths), size, change)


def _mean(values: Iterable[Tensor]) -> float:
    numbers = [float(value) for value in values]
    return math.fsum(numbers) / len(numbers)


def _one_run(config: Config, width: int, images: Tensor, steps: int, seed: int) -> list[dict[str, Tensor]]:
    """Activations on the batch before and after ``steps`` steps."""
    config = config.override(f"model.hidden_size={width}", f"model.enc_hidden_size={width}")
    seed_global(seed, Stream.WEIGHTS)
    tokenizer = FlowMo(config)
    scale_initial_weights(tokenizer)
    (optimizer,) = build_optimizers(tokenizer)
    norms = NormControl(tokenizer.networks)
    draws = TrainingNoise.of(config, images, range(len(images)))
    states = []
    for step in range(steps + 1):
        activations: dict[str, Tensor] = {}
        hooks = _record(tokenizer, activations)
        optimizer.zero_grad()
        pretrain_loss(tokenizer, images, draws, tokenizer.config.opt, None).loss.backward()
        for hook in hooks:
            hook.remove()
        if step in (0, steps):
            states.append(activations)
        set_learning_rate(optimizer, config.opt.lr)
        optimizer.step()
        norms.apply(torch.ones(()))
    return states


def _record(tokenizer: FlowMo, activations: dict[str, Tensor]) -> list:
    """Hooks that keep the outputs of every block and of both readouts."""

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
            if isinstance(output, tuple):
                output = output[0] if name.startswith("encoder") else output[1]
            activations[name] = output.detach().float()

        return hook

    modules = {
        **{f"encoder block {i + 1}": block for i, block in enumerate(tokenizer.encoder.blocks)},
        "encoder code_out": tokenizer.encoder.code_out,
        **{f"decoder block {i + 1}": block for i, block in enumerate(tokenizer.decoder.blocks)},
        "decoder picture_out": tokenizer.decoder.picture_out,
    }
    return [module.register_forward_hook(keep(name)) for name, module in modules.items()]
