"""What a run is meant to do: what cannot be meant is refused before it starts, the rest is one line of the log."""

from __future__ import annotations

from pathlib import Path

from flowmo.config import FIELDS, Config, ConfigError
from flowmo.train.ema import RELEASE_EMA_STEPS, decay_per_step
from flowmo.train.optimizer import width_multipliers
from flowmo.train.schedule import Position, Schedule

STAGES = {
    "pretrain": "stage 1A, mode matching",
    "posttrain": "stage 1B, mode seeking",
    "distill": "stage 1C, distillation",
    "generator": "stage 2, generation",
}
POSTTRAIN_STEPS = 25_000
"""Length of the paper's stage 1B."""


def check_start(config: Config, started: bool) -> None:
    """Refuse an encoder that would stay as random as it is, and a length that belongs to another stage.

    Args:
        started: the run has weights to start from.

    Raises:
        ConfigError: with what to write instead.
    """
    never_learns = config.stage == "posttrain" or (
        config.stage == "pretrain" and not config.opt.freeze_encoder_after.amount
    )
    if never_learns and not started:
        why = "Stage 1B trains" if config.stage == "posttrain" else "opt.freeze_encoder_after=0 trains"
        raise ConfigError(f"{why} with a frozen encoder, which is random here. Add --resume-from-ckpt CHECKPOINT.")
    if config.stage != "pretrain" and config.trainer.duration == FIELDS["trainer.duration"].default:
        raise ConfigError(
            f"trainer.duration={config.trainer.duration} is the length of stage 1A. Name the length of this stage, "
            f"counted from the run's first image: the checkpoint's steps and {POSTTRAIN_STEPS} more are "
            "trainer.duration='STEPS steps'."
        )


def check_length(config: Config, path: Path, start: Position, times: Schedule) -> None:
    """Refuse a new run that would end where its checkpoint is.

    Raises:
        ConfigError: with a length that works.
    """
    if start.images >= times.duration:
        raise ConfigError(
            f"{path} is at step {start.step} ({start.images} images), where trainer.duration="
            f"{config.trainer.duration} has ended. For {POSTTRAIN_STEPS} steps more write "
            f"trainer.duration='{start.step + POSTTRAIN_STEPS} steps'."
        )


def describe(config: Config, start: Position, times: Schedule) -> str:
    """Stage, length, learning rate, EMA and perceptual loss, as they follow from the settings and the checkpoint."""
    opt, model = config.opt, config.model
    left = max(times.duration - start.images, 0)
    steps = -(-left // times.batch)
    rate = f"learning rate {opt.lr:g}"
    scales = {net: 1 / width for net, width in width_multipliers(config).items() if width != 1}
    if scales and config.stage != "generator":
        rate += f" (µP: wide matrices of the {' and the '.join(f'{n} × {s:.3g}' for n, s in scales.items())})"
    every = RELEASE_EMA_STEPS if model.ema_update == "release" else 1
    parts = [
        f"{STAGES[config.stage]}: {steps} steps from step {start.step} to step {start.step + steps}",
        rate,
        f"EMA decay {decay_per_step(config, times.batch):.6g} per step" + (f", every {every} steps" * (every > 1)),
    ]
    if config.stage != "generator":
        frozen = config.stage != "pretrain" or start.images >= times.freeze_encoder_after
        last = times.freeze_encoder_after
        parts.append("encoder frozen" if frozen else f"encoder frozen from image {last}" if last < times.duration else
                     "encoder learns")  # fmt: skip
        where = {"posttrain": f"samples of {model.posttrain_sample_k} steps", "distill": "jumps"}
        distance = (
            f"{opt.lpips_mode} distance × {opt.lpips_weight:g} of {where.get(config.stage, 'one-step estimates')}"
        )
        parts.append(distance if opt.lpips_weight else "no perceptual loss")
    else:
        parts.append(f"network {config.generator.network}, visible ids at weight {config.generator.visible_weight:g}")
    return "; ".join(parts)
