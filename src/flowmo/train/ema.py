"""Exponential moving average (EMA) of the weights."""

import math

import torch
from torch import Tensor, nn

from flowmo.config import Config
from flowmo.train.parallel import local
from flowmo.train.schedule import PAPER_BATCH

RELEASE_EMA_STEPS = 10


def decay_per_step(config: Config, batch: int) -> float:
    """Return the EMA's decay per step of ``batch`` images.

    It is ``model.ema_decay`` in stage 1B and with ``model.ema_update=release``. Otherwise ``model.ema_decay`` applies
    per 128 images, so that the decay per image does not depend on the batch.
    """
    per_step = config.model.ema_update == "release" or config.stage == "posttrain"
    return config.model.ema_decay if per_step else config.model.ema_decay ** (batch / PAPER_BATCH)


class EMA:
    """Exponential moving average of a model's weights and buffers, which is evaluated and shipped.

    ``every_step`` updates after each step and, except in stage 1B, decays faster early on, to forget the start.
    ``release`` updates after every 10th step with the decay of ten steps. ``torch.optim.swa_utils.AveragedModel`` does
    not serve: each update reads its step count on the host, and a device flag cannot skip an update.
    """

    def __init__(self, model: nn.Module, batch: int):
        config = model.config
        self.model, self.batch, self.decay = model, batch, decay_per_step(config, batch)
        self.release = config.model.ema_update == "release"
        self.warms_up = config.stage != "posttrain"
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def weight(self, step: int) -> float:
        """Return the weight of the current weights in the update after step ``step``, counted from 0."""
        if self.release:
            return 0.0 if step % RELEASE_EMA_STEPS else 1 - self.decay**RELEASE_EMA_STEPS
        if not self.warms_up:
            return 1 - self.decay
        steps = math.floor(step * self.batch / PAPER_BATCH)
        return 1 - min(self.decay, ((1 + steps) / (10 + steps)) ** (self.batch / PAPER_BATCH))

    @torch.no_grad()
    def update(self, step: int, finite: Tensor | None = None) -> None:
        """Update after step ``step``, unless ``finite``, a scalar on the device, is 0."""
        weight = self.weight(step)
        if weight:
            current = self.model.state_dict()
            averages = [local(value) for value in self.state.values()]
            weights: float | list[Tensor] = weight
            if finite is not None:
                weights = [(weight * finite).to(value.dtype).expand_as(value) for value in averages]
            torch._foreach_lerp_(averages, [local(current[name]) for name in self.state], weights)

    @torch.no_grad()
    def restart(self, from_ema: bool = False) -> None:
        """Set the EMA to the model's weights. With ``from_ema``, first set the model to the EMA."""
        current = self.model.state_dict()
        for name, value in self.state.items():
            source, target = (value, current[name]) if from_ema else (current[name], value)
            local(target).copy_(local(source))
