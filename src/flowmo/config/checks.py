"""Settings that cannot work together, and what would."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flowmo.config.overrides import shown
from flowmo.config.sections import (
    BEST_METRICS,
    CHECKPOINTED,
    CODE_LAYOUTS,
    COOLDOWN_SHAPES,
    DISTILLED,
    DRAWING_RULES,
    EMA_UPDATES,
    GENERATOR_NETWORKS,
    GUIDED_FROM,
    HIDING_SCHEDULES,
    LPIPS_MODES,
    NETWORKS,
    OPTIMIZERS,
    PARALLEL,
    PREDICTIONS,
    QUANTIZATION_TYPES,
    REVEALING_ORDERS,
    SOLVERS,
    START_WEIGHTS,
    STATISTICS,
    ConfigError,
)
from flowmo.model.flow import DISTRIBUTIONS
from flowmo.model.transformer import rotary_axes
from flowmo.model.windowed import CELL

if TYPE_CHECKING:
    from flowmo.config import Config

MAX_SIDE = 10_000
"""Of a training picture, in pixels; beyond it a tile has more than ``pictures.MAX_PIXELS``."""
MAX_STEPS = 10_000
"""Of sampling: a file's own settings decide how long its decoding takes."""


def check(config: Config) -> None:
    """Refuse what cannot work, naming what would."""
    m, d, o, t, s = config.model, config.data, config.opt, config.trainer, config.eval.sampling

    def require(condition: bool, sentence: str) -> None:
        if not condition:
            raise ConfigError(sentence)

    positive = {
        "data": ("image_size",),
        "model": ("patch_size", "hidden_size", "num_heads", "dec_depth", "enc_hidden_size", "enc_num_heads"),
        "trainer": ("keep_last", "max_skipped_steps"),
        "opt": ("lr",),
    }
    for section, names in positive.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            require(
                value > 0, f"{section}.{name}={value} must be at least 1" if section != "opt" else "opt.lr must be > 0"
            )
    for name in ("enc_depth", "code_length", "context_dim", "codebook_size_for_entropy", "posttrain_sample_k"):
        require(getattr(m, name) > 0, f"model.{name}={getattr(m, name)} must be at least 1")
    choose("model.network", m.network, NETWORKS)
    for prefix in ("", "enc_") if m.network == "double_stream" else ():
        check_width(prefix, getattr(m, f"{prefix}hidden_size"), getattr(m, f"{prefix}num_heads"))
    if m.network == "windowed":
        check_windowed(config)
    require(0 <= m.nested_dropout <= 1, f"model.nested_dropout={m.nested_dropout} must lie between 0 and 1")
    require(
        m.nested_dropout == 0 or (m.quantization_type in ("fsq", "lfq") and m.network == "windowed"),
        "model.nested_dropout needs model.network=windowed and model.quantization_type=fsq or lfq",
    )
    for height, width in d.crops:
        require(
            m.patch_size <= min(height, width) and max(height, width) <= d.image_size,
            f"data.crop_sizes={d.crop_sizes}: {height}x{width} must fit into data.image_size={d.image_size}",
        )
        require(
            height % m.patch_size == 0 == width % m.patch_size,
            f"data.crop_sizes={d.crop_sizes}: {height}x{width} is no multiple of model.patch_size={m.patch_size}",
        )
    require(d.image_size <= MAX_SIDE, f"data.image_size={d.image_size} must be at most {MAX_SIDE}")
    require(m.mlp_ratio > 0, f"model.mlp_ratio={m.mlp_ratio} must be above 0; the paper uses 4")
    lower = max(d.image_size // m.patch_size, 1) * m.patch_size
    require(
        d.image_size % m.patch_size == 0,
        f"data.image_size={d.image_size} is not a multiple of model.patch_size={m.patch_size}; "
        f"write data.image_size={lower} or data.image_size={lower + m.patch_size}",
    )
    choose("model.quantization_type", m.quantization_type, QUANTIZATION_TYPES)
    choose("model.code_layout", m.code_layout, CODE_LAYOUTS)
    choose("model.prediction", m.prediction, PREDICTIONS)
    choose("opt.loss_space", o.loss_space, PREDICTIONS)
    choose("opt.schedule", o.schedule, DISTRIBUTIONS)
    choose("opt.optimizer", o.optimizer, OPTIMIZERS)
    require(o.muon_lr > 0, f"opt.muon_lr={o.muon_lr} must be > 0")
    require(
        o.optimizer != "muon" or t.parallel == "ddp",
        "opt.optimizer=muon needs whole matrices, which trainer.parallel=fsdp cuts up; write trainer.parallel=ddp",
    )
    choose("opt.lpips_mode", o.lpips_mode, LPIPS_MODES)
    choose("model.entropy_statistics", m.entropy_statistics, STATISTICS)
    choose("model.ema_update", m.ema_update, EMA_UPDATES)
    choose("trainer.parallel", t.parallel, PARALLEL)
    choose("trainer.start_weights", t.start_weights, START_WEIGHTS)
    choose("trainer.checkpoint_keeps", t.checkpoint_keeps, CHECKPOINTED)
    choose("trainer.best_metric", t.best_metric, BEST_METRICS)
    check_generator(config)
    for name in ("subsample_rate", "batch_size"):
        value = getattr(config.eval, name)
        require(value > 0, f"eval.{name}={value} must be at least 1")
    require(config.eval.pictures > 0, f"eval.pictures={config.eval.pictures} must be at least 1")
    for name in ("duration", "log_every", "checkpoint_every"):
        span = getattr(t, name)
        require(span.amount > 0, f"trainer.{name}={span} must be longer than nothing")
    if m.quantization_type == "fsq":
        require(m.fsq_levels >= 2, f"model.fsq_levels={m.fsq_levels} must be at least 2")
        group = max(int(m.codebook_size_for_entropy / math.log2(m.fsq_levels) + 1e-9), 1)
        require(
            m.context_dim % group == 0 and m.fsq_levels**group <= 2**16,
            f"model.context_dim={m.context_dim} channels of {m.fsq_levels} levels do not split into ids of {group} "
            f"channels; write model.context_dim={max(m.context_dim // group, 1) * group}",
        )
    if m.quantization_type == "vq":
        require(2 <= m.vq_entries <= 2**16, f"model.vq_entries={m.vq_entries} must be from 2 to 65536")
        require(m.vq_sub_tokens > 0, f"model.vq_sub_tokens={m.vq_sub_tokens} must be at least 1")
        require(
            m.context_dim % m.vq_sub_tokens == 0,
            f"model.context_dim={m.context_dim} channels do not split into model.vq_sub_tokens={m.vq_sub_tokens}; "
            f"write model.context_dim={max(m.context_dim // m.vq_sub_tokens, 1) * m.vq_sub_tokens}",
        )
        require(
            m.entropy_statistics == "batch",
            "vq has one codebook, which all processes must change alike; write model.entropy_statistics=batch",
        )
    if m.quantization_type in ("lfq", "bsq"):
        group = m.codebook_size_for_entropy
        fits = [g for g in range(min(m.context_dim, 16), 0, -1) if m.context_dim % g == 0]
        require(
            m.context_dim % group == 0 and group <= 16,
            f"model.context_dim={m.context_dim} does not split into groups of at most 16 bits with "
            f"model.codebook_size_for_entropy={group}; write model.codebook_size_for_entropy={fits[0]}",
        )
    for name, value in (
        ("ema_decay", m.ema_decay),
        ("vq_decay", m.vq_decay),
        ("beta1", o.beta1),
        ("beta2", o.beta2),
        ("cooldown", o.cooldown),
        ("anchor", o.anchor),
        ("max_bad_share", d.max_bad_share),
    ):
        require(0 <= value <= 1, f"{name}={value} must lie between 0 and 1")
    require(m.vq_commit_weight >= 0, f"model.vq_commit_weight={m.vq_commit_weight} must not be negative")
    choose("opt.cooldown_shape", o.cooldown_shape, COOLDOWN_SHAPES)
    for name in ("weight_decay", "final_lr", "max_grad_norm", "lpips_weight", "mup_base_width", "n_grad_acc"):
        require(getattr(o, name) >= 0, f"opt.{name}={getattr(o, name)} must not be negative")
    for name, value in (
        ("data.num_workers", d.num_workers),
        ("data.global_batch_size", d.global_batch_size),
        ("data.batch_size", d.batch_size),
        ("data.max_microbatch", d.max_microbatch),
        ("data.read_timeout", d.read_timeout),
        ("trainer.patience", t.patience),
    ):
        require(value >= 0, f"{name}={value} must not be negative; 0 switches it off")
    require(
        0 <= o.lpips_jitter <= d.image_size // 2,
        f"opt.lpips_jitter={o.lpips_jitter} must be from 0 to half of data.image_size={d.image_size}",
    )
    smallest = min((side for crop in d.crops for side in crop), default=d.image_size)
    require(
        0 <= o.lpips_crop <= smallest, f"opt.lpips_crop={o.lpips_crop} must be from 0 to the crops' side, {smallest}"
    )
    require(0 <= t.seed < 2**63, f"trainer.seed={t.seed} must be a whole number from 0 to 2^63 − 1")
    require(
        0 < s.sample_steps <= MAX_STEPS,
        f"eval.sampling.sample_steps={s.sample_steps} must be from 1 to {MAX_STEPS}; the paper uses 25",
    )
    choose("eval.sampling.solver", s.solver, SOLVERS)
    require(s.rho > 0, f"eval.sampling.rho={s.rho} must be above 0; the paper uses 4, linear steps are 1")
    choose("opt.distill_towards", o.distill_towards, DISTILLED)
    require(o.teacher_steps >= 0, f"opt.teacher_steps={o.teacher_steps} must not be negative; 0 is the teacher's own")
    require(o.jumps >= 2, f"opt.jumps={o.jumps} must be at least 2")
    require(
        not (m.posttrain_sample and t.activation_checkpointing and t.checkpoint_keeps != "inputs"),
        "in stage 1B the chain computes its steps again as it is, and what blocks keep comes on top; "
        "write trainer.checkpoint_keeps=inputs",
    )
    require(
        m.mean_velocity or not o.teacher,
        "opt.teacher trains a student in stage 1C, whose decoder gives mean velocities; add model.mean_velocity=true",
    )
    require(
        not (o.teacher and m.posttrain_sample),
        "opt.teacher is of stage 1C and model.posttrain_sample of stage 1B; set one of them",
    )
    require(
        not m.mean_velocity or (s.guidance == 1 and s.solver == "euler"),
        "a decoder of mean velocities has guidance folded in and makes Euler's steps; "
        "write eval.sampling.guidance=1 and eval.sampling.solver=euler",
    )
    require(
        0 <= s.guidance_low <= s.guidance_high <= 1,
        f"guidance from t = {s.guidance_low} to {s.guidance_high} is no interval; "
        "write 0 <= eval.sampling.guidance_low <= eval.sampling.guidance_high <= 1",
    )


def check_windowed(config: Config) -> None:
    """What networks of windows and convolutions need."""
    m, side = config.model, config.data.image_size
    if m.patch_size != CELL:
        raise ConfigError(f"model.network=windowed has cells of {CELL} pixels; write model.patch_size={CELL}")
    if m.code_length != (side // CELL) ** 2:
        raise ConfigError(
            f"a windowed network has one code token per cell; write model.code_length={(side // CELL) ** 2} for "
            f"data.image_size={side}"
        )
    if m.mean_velocity or config.opt.teacher:
        raise ConfigError("stage 1C has no windowed decoder; write model.network=double_stream")
    for prefix in ("", "enc_"):
        width, heads = getattr(m, f"{prefix}hidden_size"), getattr(m, f"{prefix}num_heads")
        if width % 4 or width % heads:
            raise ConfigError(
                f"model.{prefix}hidden_size={width} must be a multiple of 4 and of model.{prefix}num_heads={heads}"
            )
    for name in ("conv_depth", "window"):
        if getattr(m, name) < 1:
            raise ConfigError(f"model.{name}={getattr(m, name)} must be at least 1")


def check_generator(config: Config) -> None:
    g, metric = config.generator, config.trainer.best_metric

    def require(condition: bool, name: str, sentence: str) -> None:
        if not condition:
            raise ConfigError(f"generator.{name}={getattr(g, name)} {sentence}")

    choose("generator.schedule", g.schedule, HIDING_SCHEDULES)
    choose("generator.order", g.order, REVEALING_ORDERS)
    choose("generator.network", g.network, GENERATOR_NETWORKS)
    choose("generator.guided_from", g.guided_from, GUIDED_FROM)
    choose("generator.drawing", g.drawing, DRAWING_RULES)
    for name in ("hidden_size", "depth", "num_heads", "sample_steps"):
        require(getattr(g, name) > 0, name, "must be at least 1")
    require(g.sample_steps <= MAX_STEPS, "sample_steps", f"must be at most {MAX_STEPS}")
    require(g.hidden_size % g.num_heads == 0, "hidden_size", f"is not divisible by generator.num_heads={g.num_heads}")
    for name in ("mlp_ratio", "temperature", "last_temperature"):
        require(getattr(g, name) > 0, name, "must be above 0")
    require(g.choice_temperature >= 0, "choice_temperature", "must not be negative")
    require(0 <= g.visible_weight <= 1, "visible_weight", "must lie between 0 and 1")
    if g.network == "uvit":
        require(g.depth % 2 == 0, "depth", "must be even: uvit has as many blocks after its middle as before")
        require(not g.bit_tokens, "bit_tokens", "is of generator.network=maskgit; uvit has a table of ids")
    for name in ("dropout", "label_drop", "label_smoothing"):
        require(0 <= getattr(g, name) < 1, name, "must be at least 0 and below 1")
    if metric and (metric == "cross_entropy") != g.train:
        good = "cross_entropy" if g.train else "psnr, lpips or rfid"
        raise ConfigError(f"trainer.best_metric={metric!r} is no figure of what is trained; write {good}")


def check_width(prefix: str, width: int, heads: int) -> None:
    """A head needs an even number of channels on each rotary axis (1/8, 7/16 and 7/16 of it)."""
    below = max(width // (16 * heads), 1) * 16 * heads
    good = [
        w for w in (below - 16 * heads, below, below + 16 * heads, below + 32 * heads) if w > 0 and _even_axes(w, heads)
    ]
    name = f"model.{prefix}hidden_size"
    advice = f"write {' or '.join(f'{name}={w}' for w in good)}"
    if width % heads:
        raise ConfigError(f"{name}={width} is not divisible by model.{prefix}num_heads={heads}; {advice}")
    if not _even_axes(width, heads):
        axes = rotary_axes(width // heads)
        raise ConfigError(
            f"{name}={width} over {heads} heads of {width // heads} channels gives rotary axes of {axes} channels, "
            f"which must be even and add up to a head; {advice}"
        )


def _even_axes(width: int, heads: int) -> bool:
    axes = rotary_axes(width // heads)
    return width % heads == 0 and sum(axes) == width // heads and all(axis > 0 and axis % 2 == 0 for axis in axes)


def choose(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={shown(value)} is not known; write {' or '.join(known)}")
