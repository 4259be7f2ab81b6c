"""Exponential moving average (EMA) of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowmo.config import Config
from flowmo.train.optimizer import local
from flowmo.train.schedule import PAPER_BATCH

RELEASE_EMA_STEPS = 10


def decay_per_step(config: Config, batch: int) -> float:
    """Decay of the EMA in one step of ``batch`` images.

    In stage 1B, and with ``model.ema_update=release``, it is ``model.ema_decay`` itself, as in the release. Elsewhere
    that setting counts over 128 images, so that the decay per image is the same at any batch.
    """
    settings = config.model
    per_step = settings.ema_update == "release" or config.stage == "posttrain"
    return settings.ema_decay if per_step else settings.ema_decay ** (batch / PAPER_BATCH)


class EMA:
    """Exponential moving average of the weights, the ones that are evaluated and shipped.

    ``every_step`` updates after each step. Outside stage 1B it forgets faster early on, so that the random start is
    soon gone; stage 1B starts from trained weights. ``release`` updates after every 10th step with the decay of ten.
    """

    def __init__(self, model: nn.Module, batch: int):
        self.release = model.config.model.ema_update == "release"
        self.forgets_start = model.config.stage != "posttrain"
        self.decay = decay_per_step(model.config, batch)
        self.batch = batch
        self.model = model
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def weight(self, step: int) -> float:
        """Share of the current weights in the average after step number ``step``, counted from 0."""
        if self.release:
            return 0.0 if step % RELEASE_EMA_STEPS else 1 - self.decay**RELEASE_EMA_STEPS
        if not self.forgets_start:
            return 1 - self.decay
        steps = math.floor(step * self.batch / PAPER_BATCH)
        return 1 - min(self.decay, ((1 + steps) / (10 + steps)) ** (self.batch / PAPER_BATCH))

    @torch.no_grad()
    def update(self, step: int, finite: Tensor | None = None) -> None:
        """Move the average after step number ``step``; leave it where ``finite``, a number on the device, is 0."""
        weight = self.weight(step)
        if weight:
            current = self.model.state_dict()
            averages = [local(value) for value in self.state.values()]
            weights: float | list[Tensor] = weight
            if finite is not None:
                weights = [(weight * finite).to(value.dtype).expand_as(value) for value in averages]
            torch._foreach_lerp_(averages, [local(current[name]) for name in self.state], weights)

    @torch.no_grad()
    def restart(self, from_average: bool = False) -> None:
        """Start afresh at the model's weights; with ``from_average`` the model first takes the average's."""
        current = self.model.state_dict()
        for name, value in self.state.items():
            source, target = (value, current[name]) if from_average else (current[name], value)
            local(target).copy_(local(source))
