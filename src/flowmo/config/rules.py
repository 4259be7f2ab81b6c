"""Ranges of settings and rules between them. Each function yields a sentence per broken rule: what to write instead."""

import math
from collections.abc import Iterator

from flowmo.config.fields import shown
from flowmo.config.sections import CELL, FIELDS, Sections, flatten


def broken(config: Sections) -> Iterator[str]:
    for rules in (_ranges, _images, _channels, _network, _bottleneck, _training, _generator):
        yield from rules(config)


def _ranges(config: Sections) -> Iterator[str]:
    for name, value in flatten(config).items():
        allowed, default = FIELDS[name].metadata["allowed"], str(FIELDS[name].default)
        if allowed and not allowed.contains(value):
            advice = f" The default is {default}." if default else ""
            yield f"{name}={shown(value)} must be {allowed.words}.{advice}"


def _images(config: Sections) -> Iterator[str]:
    data, opt, patch = config.data, config.opt, config.model.patch_size
    size, sides = data.image_size, [side for crop in data.crops for side in crop]
    lower, smallest, largest = max(size // patch, 1) * patch, min(sides, default=size), max(sides, default=size)
    if size % patch:
        advice = f"Write data.image_size={lower} or data.image_size={lower + patch}."
        yield f"data.image_size={size} is not a multiple of model.patch_size={patch}. {advice}"
    if largest > size:
        yield f"data.crop_sizes={data.crop_sizes!r} must fit into data.image_size={size}."
    if any(side % patch for side in sides):
        yield f"data.crop_sizes={data.crop_sizes!r} has a side that is not a multiple of model.patch_size={patch}."
    if not 0 <= opt.lpips_jitter <= smallest // 2:
        yield f"opt.lpips_jitter={opt.lpips_jitter} must be from 0 to half of the crops' side, {smallest}."
    if not 0 <= opt.lpips_crop <= smallest:
        yield f"opt.lpips_crop={opt.lpips_crop} must be from 0 to the crops' side, {smallest}."


def _channels(config: Sections) -> Iterator[str]:
    channels, named = config.model.channels, config.opt.perceptual_channels
    if max(config.perceptual_channels) >= channels:
        yield f"opt.perceptual_channels={named} must be from 0 to {channels - 1}, since model.channels={channels}."
    depth, (low, high) = config.data.bit_depth, config.data.value_limits or (0, 1)
    if low >= high:
        yield f"data.value_range={config.data.value_range}: the first number must be the smaller one."
    if depth < 32 and not (low >= 0 and high < 2**depth):
        yield f"data.value_range={config.data.value_range} does not fit into {depth} bits. Write data.bit_depth=32."


def _network(config: Sections) -> Iterator[str]:
    m, windowed = config.model, config.model.network == "windowed"
    for prefix, width, heads in (("", m.hidden_size, m.num_heads), ("enc_", m.enc_hidden_size, m.enc_num_heads)):
        # 1/8, 7/16 and 7/16 of a head, the rotary axes, must be even numbers
        name, step = f"model.{prefix}hidden_size", math.lcm(4, heads) if windowed else 32 * heads
        if width % step:
            near = [f"{name}={w}" for w in (width // step * step, (width // step + 1) * step) if w]
            yield f"{name}={width} must be a multiple of {step} with {heads} heads. Write {' or '.join(near)}."
    if m.nested_dropout and not (windowed and m.quantization_type in ("fsq", "lfq")):
        yield "model.nested_dropout needs model.network=windowed and model.quantization_type=fsq or lfq."
    if m.nested_dropout and m.quantization_type == "fsq" and m.fsq_levels % 2:
        yield f"model.fsq_levels={m.fsq_levels} has a level 0, which nested dropout sets. Write an even number."
    if windowed:
        size = config.data.image_size
        cells = (size // CELL) ** 2
        if m.window not in (1, 2, 4, 8):  # the parts of a large image begin at multiples of 8 cells
            yield f"model.window={m.window} does not divide 8. Write 1, 2, 4 or 8."
        if m.patch_size != CELL:
            yield f"model.network=windowed has cells of {CELL} pixels. Write model.patch_size={CELL}."
        if m.code_length != cells:
            yield (
                f"A windowed network has one code token per cell. Write model.code_length={cells} for "
                f"data.image_size={size}."
            )
        if m.mean_velocity or config.opt.teacher:
            yield "Stage 1C has no windowed decoder. Write model.network=double_stream."


def _bottleneck(config: Sections) -> Iterator[str]:
    m = config.model
    dim, kind, group = m.context_dim, m.quantization_type, m.codebook_size_for_entropy
    share, meaning, base = {
        "lfq": (group, "model.codebook_size_for_entropy", 2),
        "bsq": (group, "model.codebook_size_for_entropy", 2),
        "fsq": (m.id_channels, "the channels of an id", m.fsq_levels),
        "vq": (m.vq_sub_tokens, "model.vq_sub_tokens", 1),
    }.get(kind, (1, "", 1))
    if base ** min(share, 17) > 2**16:
        yield "An id has at most 16 bits. Write a smaller model.codebook_size_for_entropy or model.fsq_levels."
    if dim % share:
        advice = f"Write model.context_dim={max(dim // share, 1) * share}."
        yield f"model.context_dim={dim} must be a multiple of {share}, {meaning}. {advice}"
    if kind == "vq" and m.entropy_statistics != "batch":
        yield "vq has one codebook, which all ranks change alike. Write model.entropy_statistics=batch."


def _training(config: Sections) -> Iterator[str]:
    m, opt, trainer, sampling = config.model, config.opt, config.trainer, config.eval.sampling
    if opt.optimizer == "muon" and trainer.parallel != "ddp":
        yield "opt.optimizer=muon needs whole matrices, which fsdp splits. Write trainer.parallel=ddp."
    if m.posttrain_sample and trainer.activation_checkpointing and trainer.checkpoint_keeps != "inputs":
        yield (
            "In stage 1B the chain recomputes its steps anyway, and activations that blocks keep come on top. "
            "Write trainer.checkpoint_keeps=inputs."
        )
    if opt.teacher and not m.mean_velocity:
        yield "opt.teacher trains a student whose decoder gives mean velocities. Add model.mean_velocity=true."
    if m.train == "encoder" and (opt.teacher or m.posttrain_sample):
        yield "Stages 1B and 1C train the decoder. Write model.train=decoder."
    if opt.teacher and m.posttrain_sample:
        yield "opt.teacher belongs to stage 1C and model.posttrain_sample to stage 1B. Set one of them."
    if m.mean_velocity and not (sampling.guidance == 1 and sampling.solver == "euler"):
        yield (
            "A decoder of mean velocities has guidance folded in and makes Euler steps. "
            "Write eval.sampling.guidance=1 and eval.sampling.solver=euler."
        )
    low, high = sampling.guidance_low, sampling.guidance_high
    if not 0 <= low <= high <= 1:
        yield (
            f"Guidance from t = {low} to {high} is not an interval. "
            "Write 0 <= eval.sampling.guidance_low <= eval.sampling.guidance_high <= 1."
        )


def _generator(config: Sections) -> Iterator[str]:
    g, metric = config.generator, config.trainer.best_metric
    if metric and (metric == "cross_entropy") != g.train:
        trained, metrics = ("generator", "cross_entropy") if g.train else ("tokenizer", "psnr, lpips or rfid")
        yield f"trainer.best_metric={metric!r} is not a metric of a {trained}. Write {metrics}."
    if g.hidden_size % g.num_heads:
        yield f"generator.hidden_size={g.hidden_size} is not divisible by generator.num_heads={g.num_heads}."
    if g.network == "uvit" and g.depth % 2:
        yield f"generator.depth={g.depth} must be even: uvit has as many blocks after its middle as before."
    if g.network == "uvit" and g.bit_tokens:
        yield "generator.bit_tokens belongs to generator.network=maskgit. Write generator.bit_tokens=false for uvit."
