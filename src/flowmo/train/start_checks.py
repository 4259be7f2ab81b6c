"""Checks a run's settings before training, and describes the run in a log line."""

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
PERCEPTUAL_INPUT = {"pretrain": "one-step estimates", "posttrain": "samples of {} steps", "distill": "jumps"}
POSTTRAIN_STEPS = 25_000
"""Length of the release's stage 1B. The paper's is about an epoch: 20 018 steps of 64 images."""


def check_start(config: Config, has_weights: bool, resumes: bool = False) -> None:
    """Refuse to train with a frozen random network, a stage that a model lacks, or for another stage's default length.

    Args:
        has_weights: the run starts from a checkpoint.
        resumes: the run has begun, perhaps with an earlier version.

    Raises:
        ConfigError: the settings contradict each other, or need a checkpoint.
    """
    if config.model.mean_velocity and config.stage in ("pretrain", "posttrain"):
        raise ConfigError("A distilled tokenizer is trained in stage 1C. Add opt.teacher=MODEL.")
    why, trained = "Stage 1B" if config.stage == "posttrain" else "", config.model.train
    if config.stage == "pretrain" and not config.opt.freeze_encoder_after.amount:
        why = "opt.freeze_encoder_after=0"
    if config.stage == "pretrain" and trained != "all":
        why = f"model.train={trained}"
    if why and not has_weights:
        frozen = "decoder" if trained == "encoder" else "encoder"
        raise ConfigError(
            f"{why} trains with a frozen {frozen}, which is random here. Add --resume-from-ckpt CHECKPOINT."
        )
    if config.stage != "pretrain" and config.trainer.duration == FIELDS["trainer.duration"].default:
        advice = "Set it, such as trainer.duration='10 epochs'."
        if config.stage == "posttrain":
            advice = (
                "Set it to the total length, including the checkpoint's steps: trainer.duration='STEPS steps', "
                f"STEPS = those + {POSTTRAIN_STEPS}."
            )
        raise ConfigError(f"trainer.duration={config.trainer.duration} is the length of stage 1A. {advice}")
    if config.trainer.patience and not config.trainer.best_metric and not resumes:
        raise ConfigError(
            f"trainer.patience={config.trainer.patience} needs a metric. "
            "Set trainer.best_metric, or write trainer.patience=0."
        )


def describe(config: Config, start: Position, schedule: Schedule) -> str:
    """Describe stage, length, learning rate, EMA and perceptual loss in one line."""
    opt, stage = config.opt, config.stage
    steps = -(-max(schedule.duration - start.images, 0) // schedule.batch)
    scales = [f"{net} × {1 / width:.3g}" for net, width in width_multipliers(config).items() if width != 1]
    mup = f" (µP: wide matrices of the {' and the '.join(scales)})" if scales and stage != "generator" else ""
    every = f", every {RELEASE_EMA_STEPS} steps" if config.model.ema_update == "release" else ""
    parts = [
        f"{STAGES[stage]}: {steps} steps from step {start.step} to step {start.step + steps}",
        f"learning rate {opt.lr:g}{mup}" + f", of Muon's matrices {opt.muon_lr:g}" * (opt.optimizer == "muon"),
        f"EMA decay {decay_per_step(config, schedule.batch):.6g} per step{every}",
    ]
    if stage == "generator":
        generator = config.generator
        return "; ".join([*parts, f"network {generator.network}, visible ids at weight {generator.visible_weight:g}"])
    freeze = schedule.freeze_encoder_after
    if config.model.train == "encoder":
        parts.append("decoder frozen")
    elif stage != "pretrain" or config.model.train == "decoder" or start.images >= freeze:
        parts.append("encoder frozen")
    else:
        parts.append(f"encoder frozen from image {freeze}" if freeze < schedule.duration else "encoder learns")
    target = PERCEPTUAL_INPUT[stage].format(config.model.posttrain_sample_k)
    distance = f"{opt.lpips_mode} distance × {opt.lpips_weight:g} of {target}"
    parts.append(distance if opt.lpips_weight else "no perceptual loss")
    guidance = config.eval.sampling.guidance
    if stage == "pretrain" and guidance != 1 and not config.model.enable_cfg:
        parts.append(
            f"samples have guidance {guidance:g}, but the null code does not learn: set model.enable_cfg=true or "
            "eval.sampling.guidance=1"
        )
    return "; ".join(parts)
