"""Batch split and training schedule.

Everything is counted in images, so that neither the number of ranks nor a device's memory changes a recipe.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

from flowmo.config import Config, ConfigError, Duration, OptConfig

PAPER_BATCH = 128


@dataclass(frozen=True)
class BatchPlan:
    """Global batch = ranks × gradient-accumulation steps × micro-batch."""

    world_size: int
    accumulation_steps: int
    microbatch: int

    @property
    def per_rank(self) -> int:
        return self.accumulation_steps * self.microbatch

    @property
    def total(self) -> int:
        return self.world_size * self.per_rank

    @classmethod
    def of(cls, config: Config, world_size: int, max_microbatch: int | None = None) -> Self:
        """Choose the fewest accumulation steps that settings and memory allow.

        Args:
            max_microbatch: images that fit in the device's memory, used if ``data.max_microbatch`` is not set.

        Raises:
            ConfigError: the batch cannot be split evenly.
        """
        data = config.data
        total = data.global_batch_size or data.batch_size * world_size or PAPER_BATCH
        if total % world_size:
            below, above = total // world_size * world_size, (total // world_size + 1) * world_size
            near = " or ".join(f"data.global_batch_size={n}" for n in (below, above) if n)
            raise ConfigError(f"A batch of {total} cannot be split over {world_size} processes. Write {near}.")
        per_rank = total // world_size
        divisors = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
        wanted = config.opt.n_grad_acc or 1
        if wanted not in divisors:
            raise ConfigError(
                f"opt.n_grad_acc={wanted} does not divide the {per_rank} images of a process. Write one of {divisors}."
            )
        limit = max(data.max_microbatch or max_microbatch or per_rank, 1)
        steps = next(n for n in divisors if n >= wanted and per_rank // n <= limit)
        return cls(world_size, steps, per_rank // steps)


class Position(NamedTuple):
    """Progress of a run: optimizer steps, skipped ones included, and images seen."""

    step: int = 0
    images: int = 0


@dataclass(frozen=True)
class Schedule:
    """Lengths and periods of a run in images; 0 is off.

    A length in steps counts from where the run starts or resumes: ``trainer.max_steps=1325000`` after a checkpoint at
    step 1 300 000 means 25 000 more steps, even if the earlier batch size was another.

    Attributes:
        begin: images at which the stage began, with a fresh optimizer. Warm-up and cool-down are parts of the stage.
    """

    batch: int
    duration: int
    warmup: int
    freeze_encoder_after: int
    log: int
    sample: int
    checkpoint: int
    keep: int
    begin: int = 0

    @classmethod
    def of(cls, config: Config, batch: int, epoch: int, start: Position = Position(), begin: int = 0) -> Self:
        """Convert the settings for a global batch and an epoch of so many images."""

        def length(duration: Duration) -> int:
            if duration.unit != "steps" or not duration.amount:
                return duration.images(batch, epoch)
            return max(start.images + round((duration.amount - start.step) * batch), 0)

        opt, trainer = config.opt, config.trainer
        periods = (opt.warmup, trainer.log_every, trainer.sample_every, trainer.checkpoint_every, trainer.keep_every)
        warmup, log, sample, checkpoint, keep = (period.images(batch, epoch) for period in periods)
        duration, freeze = length(trainer.duration), length(opt.freeze_encoder_after)
        return cls(batch, duration, warmup, freeze, log, sample, checkpoint, keep, begin)

    def is_due(self, period: int, images: int) -> bool:
        """Return whether the step that ended at ``images`` crossed a multiple of ``period``."""
        return bool(period) and images // period > (images - self.batch) // period

    def learning_rate(self, opt: OptConfig, images: int) -> float:
        """Return the learning rate of the step that starts at ``images``.

        It rises linearly over ``opt.warmup``, and falls from ``opt.lr`` to ``opt.final_lr`` over the last
        ``opt.cooldown`` of the stage, linearly or as half a cosine. A cosine starts after the warm-up at the earliest.
        """
        stage = self.duration - self.begin
        rise = min(1.0, (images - self.begin + self.batch) / self.warmup) if self.warmup else 1.0
        length = opt.cooldown * stage
        if opt.cooldown_shape == "cosine":
            length = min(length, stage - self.warmup)
        left = min(1.0, max((self.duration - images) / length, 0.0)) if length > 0 else 1.0
        if opt.cooldown_shape == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return rise * (opt.final_lr + (opt.lr - opt.final_lr) * left)
