"""What a run does when: how a batch is cut over processes and passes, and where in the run its events lie.

Everything is counted in images, so that neither the number of processes nor the memory of a device changes a recipe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowmo.config import Config, ConfigError, OptConfig, Span

PAPER_BATCH = 128


@dataclass(frozen=True)
class BatchPlan:
    """How ``total`` images a step are shared: ``processes`` × ``passes`` × ``microbatch``."""

    processes: int
    passes: int
    microbatch: int

    @property
    def per_process(self) -> int:
        return self.passes * self.microbatch

    @property
    def total(self) -> int:
        return self.processes * self.per_process

    @classmethod
    def of(cls, config: Config, processes: int, most: int | None = None) -> BatchPlan:
        """The plan with the fewest passes that the settings and the memory allow.

        Args:
            most: images of one pass that the device's memory holds, where that is known.

        Raises:
            ConfigError: the batch cannot be shared evenly; the message says which batch can.
        """
        data = config.data
        total = data.global_batch_size or data.batch_size * processes or PAPER_BATCH
        if total % processes:
            below, above = total // processes * processes, (total // processes + 1) * processes
            near = " or ".join(f"data.global_batch_size={n}" for n in (below, above) if n)
            raise ConfigError(f"a batch of {total} does not divide among {processes} processes; write {near}")
        share = total // processes
        wanted = config.opt.n_grad_acc or 1
        if share % wanted:
            fits = [n for n in range(1, share + 1) if share % n == 0]
            raise ConfigError(
                f"opt.n_grad_acc={wanted} does not divide the {share} pictures of a process; write one of {fits}"
            )
        limit = data.max_microbatch or most or share
        passes = next(n for n in range(wanted, share + 1) if share % n == 0 and share // n <= max(limit, 1))
        return cls(processes, passes, share // passes)


@dataclass(frozen=True)
class Position:
    """Where a run is: optimizer steps taken (skipped ones too) and images seen."""

    step: int = 0
    images: int = 0


@dataclass(frozen=True)
class Schedule:
    """The settings' lengths and periods in images, 0 for what is switched off.

    A length in steps is converted from where the run started or goes on: ``trainer.max_steps=1325000`` after a
    checkpoint at step 1 300 000 is 25 000 steps more, whatever the batch was before it.
    """

    batch: int
    duration: int
    warmup: int
    freeze_encoder_after: int
    log: int
    sample: int
    checkpoint: int
    keep: int

    @classmethod
    def of(cls, config: Config, batch: int, epoch: int, start: Position = Position()) -> Schedule:
        def place(span: Span) -> int:
            if span.unit != "steps" or not span.amount:
                return span.images(batch, epoch)
            return max(start.images + round((span.amount - start.step) * batch), 0)

        opt, trainer = config.opt, config.trainer
        return cls(
            batch=batch,
            duration=place(trainer.duration),
            warmup=opt.warmup.images(batch, epoch),
            freeze_encoder_after=place(opt.freeze_encoder_after),
            log=trainer.log_every.images(batch, epoch),
            sample=trainer.sample_every.images(batch, epoch),
            checkpoint=trainer.checkpoint_every.images(batch, epoch),
            keep=trainer.keep_every.images(batch, epoch),
        )

    def due(self, period: int, images: int) -> bool:
        """Whether the step that ended at ``images`` reached or passed a multiple of ``period``."""
        return bool(period) and images // period > (images - self.batch) // period

    def rate(self, opt: OptConfig, images: int) -> float:
        """Learning rate of the step that starts at ``images``.

        It rises over ``opt.warmup``, stays at ``opt.lr``, and falls to ``opt.final_lr`` over the last ``opt.cooldown``
        of the run: evenly, or as half a cosine, which begins no sooner than the warm-up ends.
        """
        rise = min(1.0, (images + self.batch) / self.warmup) if self.warmup else 1.0
        length = opt.cooldown * self.duration
        if opt.cooldown_shape == "cosine":
            length = min(length, self.duration - self.warmup)
        left = min(1.0, max((self.duration - images) / length, 0.0)) if length > 0 else 1.0
        if opt.cooldown_shape == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return rise * (opt.final_lr + (opt.lr - opt.final_lr) * left)
