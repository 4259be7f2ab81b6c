"""Every setting: typed, with one documented default each, named presets, YAML files and ``section.name=value``.

A ``Config`` is immutable and always valid: building one with an unknown name, a wrong type or an impossible value
raises ``ConfigError`` with a sentence that says what to write instead. The names are those of the authors' release
where it has one; its other spellings (``model.mup_width``, ``eval.sampling.cfg`` …) are translated by ``ALIASES``.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flowmo.errors import FlowMoError
from flowmo.flow import DISTRIBUTIONS
from flowmo.transformer import Shape, rotary_axes

QUANTIZATION_TYPES = ("lfq", "fsq", "bsq", "vq", "kl", "layernorm", "noop", "qwen2.5-coder-0.5b")
LPIPS_MODES = ("vgg", "alex", "resnet")
PREDICTIONS = ("velocity", "picture")
CODE_LAYOUTS = ("diagonal", "lattice")
STATISTICS = ("batch", "process")
EMA_UPDATES = ("every_step", "release")
PARALLEL = ("ddp", "fsdp")
OPTIMIZERS = ("adam", "muon")
BEST_METRICS = ("", "psnr", "lpips", "cross_entropy")
HIDING_SCHEDULES = ("arccos", "cosine", "linear")
DISTILLED = ("sample", "picture")
SOLVERS = ("euler", "midpoint", "heun", "multistep")
REVEALING_ORDERS = ("confidence", "halton", "random")
MAX_YAML_BYTES = 1 << 20
MAX_DIGITS = 400
MAX_SIDE = 10_000
"""Of a training picture, in pixels; beyond it a tile has more than ``pictures.MAX_PIXELS``."""
MAX_STEPS = 10_000
"""Of sampling: a file's own settings decide how long its decoding takes."""


class ConfigError(FlowMoError, ValueError):
    """A setting that does not exist, has the wrong type or cannot work; the message says what to write instead."""


def setting(default: Any, doc: str, training: bool = False) -> Any:
    """A field with its line of documentation; ``training`` marks what changes how a model learns, not what it is."""
    return field(default=default, metadata={"doc": doc, "training": training})


class Span(str):
    """A length or period of training: ``"25.6M images"``, ``"200k steps"``, ``"40 epochs"``; a bare number is steps.

    Training counts in images. Steps, the authors' unit, are converted with the global batch of the run; epochs with
    the number of its training pictures. ``"0 images"`` switches a period off.

    Raises:
        ValueError: text of another form.
    """

    amount: float
    unit: str

    def __new__(cls, text: str | int | float) -> Span:
        match = re.fullmatch(r"([\d_.]+(?:e\d+)?) *([kM]?) *(step|image|epoch|)s?", str(text).strip().replace("+", ""))
        if match is None:
            raise ValueError(f"{text!r} is no length of training")
        number, scale, unit = match.groups()
        amount = float(number) * {"": 1, "k": 1_000, "M": 1_000_000}[scale]
        if not math.isfinite(amount):
            raise ValueError(f"{text!r} is no finite length")
        shown = int(amount) if amount == int(amount) else amount
        span = super().__new__(cls, f"{shown} {unit or 'step'}s")
        span.amount, span.unit = shown, f"{unit or 'step'}s"
        return span

    def images(self, batch: int, epoch: int) -> int:
        """Whole images, with ``batch`` images a step and ``epoch`` of them an epoch; at least 1 unless it is 0."""
        images = round(self.amount * {"images": 1, "steps": batch, "epochs": epoch}[self.unit])
        return max(images, 1) if self.amount else 0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str = setting(
        "",
        "training pictures: a folder, searched through its sub-folders, a .tar with an index, WebDataset shards "
        "(shard-{000..099}.tar), or a Hugging Face dataset (hf:OWNER/NAME:SPLIT)",
    )
    train_index: str = setting("", "index of the training tar; empty is the one beside it")
    val: str = setting("", "held-out pictures, likewise")
    val_index: str = setting("", "index of the held-out tar")
    image_size: int = setting(256, "side of the square training pictures, in pixels")
    global_batch_size: int = setting(0, "pictures a step, over all processes; 0 is 128 unless data.batch_size is set")
    batch_size: int = setting(
        0, "pictures a step and process, as the authors count; data.global_batch_size wins over it"
    )
    max_microbatch: int = setting(
        0, "most pictures in one pass of a process, larger batches accumulate gradients; 0 is what the memory holds"
    )
    num_workers: int = setting(2, "processes that decode pictures; 0 decodes in the training process")
    max_bad_share: float = setting(
        0.01, "share of unreadable pictures, replaced by others, that ends a run if exceeded"
    )
    read_timeout: float = setting(
        120.0, "seconds after which a picture that is still being read counts as unreadable; 0 waits for ever"
    )
    draft: bool = setting(True, "decode training JPEGs of more than four times the size at a reduced one, for speed")
    random_crop: bool = setting(True, "crop training pictures at a random place rather than at their centre")
    random_flip: bool = setting(False, "mirror half of the training pictures; the paper does not")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    patch_size: int = setting(4, "side of a picture token, in pixels, in encoder and decoder")
    hidden_size: int = setting(1152, "width of the decoder")
    num_heads: int = setting(12, "attention heads of the decoder")
    dec_depth: int = setting(16, "blocks of the decoder")
    enc_hidden_size: int = setting(768, "width of the encoder")
    enc_num_heads: int = setting(12, "attention heads of the encoder")
    enc_depth: int = setting(8, "blocks of the encoder")
    mlp_ratio: float = setting(4.0, "hidden width of an MLP over the width of its stream")
    code_length: int = setting(256, "code tokens a picture")
    context_dim: int = setting(18, "channels of a code token; with lfq, its bits")
    quantization_type: str = setting("lfq", "bottleneck: " + ", ".join(QUANTIZATION_TYPES))
    language_model: str = setting(
        "",
        "of an infill bottleneck: name on the Hub or folder of another language model than it is named after",
        training=True,
    )
    codebook_size_for_entropy: int = setting(9, "bits of a sub-token, the group over which lfq's entropies are taken")
    fsq_levels: int = setting(8, "levels of a channel of fsq")
    vq_entries: int = setting(512, "entries of vq's codebook, ids of a sub-token")
    vq_sub_tokens: int = setting(2, "ids of a code token with vq, each of an equal share of its channels")
    vq_decay: float = setting(0.99, "decay of the moving averages that vq's codebook follows, a step", training=True)
    vq_commit_weight: float = setting(0.25, "weight of vq's commitment loss", training=True)
    entropy_loss_weight: float = setting(
        0.0025, "weight of lfq's entropy loss (the release's; the paper prints 0.1)", training=True
    )
    commit_loss_weight: float = setting(
        0.000625, "weight of lfq's commitment loss (the paper prints 0.0025)", training=True
    )
    entropy_statistics: str = setting(
        "batch", "pictures over which lfq's mean distribution is taken: " + ", ".join(STATISTICS), training=True
    )
    enable_cfg: bool = setting(
        True, "train the null code of classifier-free guidance on a tenth of the pictures", training=True
    )
    code_layout: str = setting("diagonal", "rotary positions of code tokens: " + ", ".join(CODE_LAYOUTS))
    prediction: str = setting("velocity", "what the decoder's last layer estimates: " + ", ".join(PREDICTIONS))
    mean_velocity: bool = setting(
        False, "the decoder is told where its step ends and gives the mean velocity up to there; what stage 1C trains"
    )
    initial_gate: float = setting(
        0.0, "residual gates of a fresh decoder; at 0 its blocks start as the identity", training=True
    )
    enable_mup: bool = setting(True, "attention logits scaled by 8 / head size; otherwise 1 / sqrt(head size)")
    fix_initial_norms: bool = setting(
        True, "reset the norm of every block's weight matrices after each step", training=True
    )
    posttrain_sample: bool = setting(
        False, "stage 1B: the perceptual loss on samples through the whole chain, the encoder frozen", training=True
    )
    posttrain_sample_k: int = setting(8, "random steps of that chain", training=True)
    posttrain_sample_enable_cfg: bool = setting(
        False, "drop the code in a tenth of the chain's steps, as the release can", training=True
    )
    ema_decay: float = setting(
        0.9999, "decay of the averaged weights over 128 images, a step of the paper", training=True
    )
    ema_update: str = setting("every_step", "when they are updated: " + ", ".join(EMA_UPDATES), training=True)


@dataclass(frozen=True, kw_only=True)
class OptConfig:
    optimizer: str = setting(
        "adam",
        "adam, the paper's, or muon for the matrices of the blocks and adam for the rest: " + ", ".join(OPTIMIZERS),
    )
    lr: float = setting(1e-4, "learning rate")
    muon_lr: float = setting(0.02, "learning rate of muon's matrices, at any width, while that of the rest is opt.lr")
    beta1: float = setting(0.9, "Adam's decay of the mean gradient")
    beta2: float = setting(0.95, "Adam's decay of the mean squared gradient")
    weight_decay: float = setting(0.0, "decoupled weight decay")
    mup_base_width: int = setting(
        768, "width at which lr and the initial weights are as set, from which muP scales them; 0 scales nothing"
    )
    warmup: Span = setting(Span(0), "length over which the learning rate rises from 0")
    cooldown: float = setting(0.0, "last share of the run over which the learning rate falls to 0; 0 keeps it")
    max_grad_norm: float = setting(0.0, "longest gradient, longer ones are scaled down to it; 0 leaves them")
    schedule: str = setting("fat_lognormal", "training timesteps: " + ", ".join(DISTRIBUTIONS))
    anchor: float = setting(0.0, "share of the training timesteps at exactly t = 1")
    loss_space: str = setting("velocity", "error that the flow loss squares: " + ", ".join(PREDICTIONS))
    lpips_weight: float = setting(0.1, "weight of the perceptual loss on the one-step estimate; 0 switches it off")
    lpips_mode: str = setting(
        "vgg", "perceptual loss, LPIPS on vgg or alex, or resnet's logits: " + ", ".join(LPIPS_MODES)
    )
    lpips_jitter: int = setting(
        0,
        "pixels by which both pictures are cut at a random place before the perceptual loss on the one-step estimate "
        "sees them, so that its network's own grid cannot be played to",
    )
    perceptual_weights: str = setting("", "folder to look for its weights in, before FLOWMO_WEIGHTS")
    n_grad_acc: int = setting(0, "passes that a process cuts its part of a batch into; 0 is as few as fit")
    freeze_encoder_after: Span = setting(Span("25.6M images"), "when the encoder stops to learn")
    teacher: str = setting("", "stage 1C: preset or file of the tokenizer whose samples are distilled")
    teacher_steps: int = setting(0, "Euler steps of the teacher's path; 0 is its own")
    jumps: int = setting(4, "jumps along each path that the student learns; the first two end in the sample")
    distill_towards: str = setting("sample", "what jumps' ends should look like: " + ", ".join(DISTILLED))


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    duration: Span = setting(Span("166.4M images"), "length of the whole run")
    parallel: str = setting("ddp", "how several processes share the work: " + ", ".join(PARALLEL))
    activation_checkpointing: bool = setting(
        False, "keep only each block's input and compute the block again in the backward pass: less memory, more time"
    )
    enable_bfloat16: bool = setting(True, "matrix products in bfloat16, if the device can; the rest stays float32")
    compile: bool = setting(False, "torch.compile the blocks; pays off on a GPU, and on a CPU that has a C++ compiler")
    log_every: Span = setting(Span("12.8k images"), "period of the lines of the log")
    sample_every: Span = setting(Span("640k images"), "period of sample grids and held-out figures; 0 makes none")
    checkpoint_every: Span = setting(Span("640k images"), "period of the checkpoints")
    keep_last: int = setting(2, "newest checkpoints that are kept")
    keep_every: Span = setting(Span("25.6M images"), "period of checkpoints that are kept for good; 0 keeps none")
    tensorboard: bool = setting(True, "write TensorBoard's files beside metrics.jsonl, where it is installed")
    wandb_project: str = setting("", "Weights & Biases project to send the metrics to; empty sends nothing")
    best_metric: str = setting(
        "",
        "figure on data.val by which checkpoints are judged and the best is kept: psnr or lpips, of a generator "
        "cross_entropy; empty judges none",
    )
    patience: int = setting(0, "checkpoints in a row without a better one that end the run; 0 never does")
    max_skipped_steps: int = setting(10, "steps in a row without a finite loss and gradient that end the run")
    seed: int = setting(0, "seed of the weights, the order of the pictures and the noise")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    sample_steps: int = setting(25, "steps from noise to picture")
    solver: str = setting("euler", "how a step is made: " + ", ".join(SOLVERS))
    rho: float = setting(4.0, "shift of the sampler, equation 14: t = (i/n)^rho; 1 is linear")
    guidance: float = setting(1.5, "classifier-free guidance; 1 is none")
    guidance_low: float = setting(0.17 / 1.17, "lowest timestep with guidance")
    guidance_high: float = setting(1.02 / 2.02, "highest timestep with guidance")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    pictures: int = setting(200, "held-out pictures, spread over all, that a checkpoint is judged on while training")
    eval_dir: str = setting("", "folder of a training run whose checkpoints are evaluated")
    continuous: bool = setting(False, "evaluate every checkpoint of eval.eval_dir as it comes, not just the newest")
    force_ckpt_path: str = setting("", "evaluate this checkpoint and no other")
    subsample_rate: int = setting(1, "evaluate every so many-th held-out picture")
    batch_size: int = setting(16, "pictures evaluated at a time, which changes no figure")
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    train: bool = setting(False, "stage 2: train a generator, on data.train=TOKENS from flowmo tokenize", training=True)
    hidden_size: int = setting(1024, "width of the generator")
    depth: int = setting(28, "blocks of the generator")
    num_heads: int = setting(16, "its attention heads")
    mlp_ratio: float = setting(4.0, "hidden width of its MLPs over its width")
    dropout: float = setting(0.1, "share of each branch's numbers that training drops", training=True)
    bit_tokens: bool = setting(False, "ids enter as their bits, through one matrix, rather than through a table")
    schedule: str = setting(
        "arccos", "share of ids that are hidden over time: " + ", ".join(HIDING_SCHEDULES), training=True
    )
    label_drop: float = setting(0.1, "share of training pictures without their class, for guidance", training=True)
    label_smoothing: float = setting(0.1, "share of the target spread over all ids", training=True)
    tokenizer: str = setting("", "preset or file of the tokenizer, to show samples while training", training=True)
    sample_steps: int = setting(64, "steps from hidden ids to a picture's", training=True)
    guidance: float = setting(1.5, "classifier-free guidance of the logits; 1 is none", training=True)
    temperature: float = setting(1.3, "softmax temperature of the first step", training=True)
    last_temperature: float = setting(0.5, "and of the last, between which it falls evenly", training=True)
    choice_temperature: float = setting(4.5, "noise in which ids are kept, falling to 0 (confidence)", training=True)
    order: str = setting("confidence", "which ids are revealed first: " + ", ".join(REVEALING_ORDERS), training=True)


def _architecture(section: Any) -> dict[str, Any]:
    return {f.name: getattr(section, f.name) for f in dataclasses.fields(section) if not f.metadata["training"]}


def _width(prefix: str) -> Callable[[Any], dict[str, Any]]:
    return lambda w: {f"model.{prefix}hidden_size": 192 * int(w), f"model.{prefix}num_heads": 12}


def _schedule(value: Any) -> dict[str, Any]:
    if value == "linear":
        return {"eval.sampling.rho": 1.0}
    return {"eval.sampling.rho": 1 / float(str(value).removeprefix("pow_"))}


def _interval(value: Any) -> dict[str, Any]:
    """The release gives EDM noise levels σ, (low, high); timesteps are t = σ / (1 + σ)."""
    low, high = (0.0, math.inf) if value is None else ast.literal_eval(str(value))
    return {
        "eval.sampling.guidance_low": low / (1 + low),
        "eval.sampling.guidance_high": 1.0 if math.isinf(high) else high / (1 + high),
    }


ALIASES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "model.mup_width": _width(""),
    "model.enc_mup_width": _width("enc_"),
    "global_seed": lambda value: {"trainer.seed": value},
    "trainer.max_steps": lambda value: {"trainer.duration": value},
    "opt.warmup_steps": lambda value: {"opt.warmup": value},
    "opt.freeze_encoder": lambda value: {"opt.freeze_encoder_after": 0} if value else {},
    "data.imagenet_train_tar": lambda value: {"data.train": value},
    "data.imagenet_train_index": lambda value: {"data.train_index": value},
    "data.imagenet_val_tar": lambda value: {"data.val": value},
    "data.imagenet_val_index": lambda value: {"data.val_index": value},
    "data.eval_batch_size": lambda value: {"eval.batch_size": value},
    "eval.sampling.cfg": lambda value: {"eval.sampling.guidance": value},
    "eval.sampling.schedule": _schedule,
    "eval.sampling.cfg_interval": _interval,
}
"""The release's spellings of settings that have another name or form here."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a tokenizer or a generator and its training.

    Raises:
        ConfigError: on construction, where a value cannot work.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    opt: OptConfig = field(default_factory=OptConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)

    def __post_init__(self) -> None:
        check(self)

    @property
    def encoder_shape(self) -> Shape:
        m = self.model
        return Shape(
            m.enc_hidden_size, m.enc_num_heads, m.enc_depth, m.patch_size, m.mlp_ratio, m.code_layout, m.enable_mup
        )

    @property
    def decoder_shape(self) -> Shape:
        m = self.model
        return Shape(
            m.hidden_size,
            m.num_heads,
            m.dec_depth,
            m.patch_size,
            m.mlp_ratio,
            m.code_layout,
            m.enable_mup,
            m.prediction,
            mean_velocity=m.mean_velocity,
        )

    @property
    def stage(self) -> str:
        """Of training: ``pretrain`` (1A), ``posttrain`` (1B), ``distill`` (1C) or ``generator`` (2)."""
        if self.generator.train:
            return "generator"
        if self.opt.teacher:
            return "distill"
        return "posttrain" if self.model.posttrain_sample else "pretrain"

    def architecture(self) -> dict[str, Any]:
        """The model's settings that make it the function that it is; two models of other training can share them."""
        return _architecture(self.model)

    def generator_architecture(self) -> dict[str, Any]:
        """The same of a generator."""
        return _architecture(self.generator)

    @property
    def bits_per_picture(self) -> float | None:
        """Bits of one picture's ids, or ``None`` for a continuous bottleneck."""
        m = self.model
        bits_per_token = {
            "lfq": m.context_dim,
            "bsq": m.context_dim,
            "fsq": m.context_dim * math.log2(max(m.fsq_levels, 2)),
            "vq": m.vq_sub_tokens * math.log2(max(m.vq_entries, 2)),
        }
        bits = bits_per_token.get(m.quantization_type)
        return None if bits is None else float(m.code_length * bits)

    @property
    def bits_per_pixel(self) -> float | None:
        bits = self.bits_per_picture
        return None if bits is None else bits / self.data.image_size**2

    def override(self, *assignments: str, **_: Any) -> Config:
        """A copy with ``section.name=value`` assignments applied, e.g. ``config.override("opt.lr=3e-4")``."""
        values = {}
        for assignment in assignments:
            name, equals, value = assignment.partition("=")
            if not equals:
                raise ConfigError(
                    f"{shown(assignment)} is not a setting; write it as section.name=value, e.g. opt.lr=1e-4"
                )
            values[name] = parse_value(name, value)
        return self.updated(values)

    def updated(self, values: Mapping[str, Any]) -> Config:
        """A copy with the settings of a flat mapping ``{"section.name": value}`` replaced."""
        flat = flatten(self)
        for name, value in values.items():
            for real, translated in translate(name, value).items():
                flat[real] = convert(real, translated, FIELDS[real].type)
        return build(flat)

    def to_dict(self) -> dict[str, Any]:
        """Nested sections of plain values, as ``from_dict`` takes them."""

        def plain(tree: dict[str, Any]) -> dict[str, Any]:
            return {
                name: plain(v) if isinstance(v, dict) else str(v) if isinstance(v, Span) else v
                for name, v in tree.items()
            }

        return plain(dataclasses.asdict(self))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Config:
        """From nested sections, as in a YAML file; what is not named keeps its default."""
        if not isinstance(tree, Mapping):
            raise ConfigError(f"settings are sections with names and values, not a {type(tree).__name__}")
        return cls().updated(dict(leaves(tree)))

    @classmethod
    def from_yaml(cls, path: str | Path, base: Config | None = None) -> Config:
        """From a YAML file over ``base``; a top-level ``preset: NAME`` starts from that preset instead.

        Raises:
            ConfigError: the file cannot be read, is no mapping, or holds a setting that does not work.
        """
        try:
            raw = Path(path).read_bytes()
            if len(raw) > MAX_YAML_BYTES:
                raise ConfigError(f"{path} has {len(raw)} bytes; a settings file has at most {MAX_YAML_BYTES}")
            tree = load_yaml(raw) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read settings from {path}: {shorten(error)}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} holds no settings; write sections such as 'model:' with 'name: value' below")
        name = tree.pop("preset", None)
        start = preset(str(name)) if name is not None else base or cls()
        return start.updated(dict(leaves(tree)))


def preset(name: str) -> Config:
    """A named configuration: of a tokenizer ``nano``, ``small``, ``lo`` or ``hi``, of a generator ``maskgit`` or
    ``maskgit_nano``.

    Raises:
        ConfigError: no preset of that name.
    """
    presets = PRESETS | GENERATOR_PRESETS
    if name not in presets:
        raise ConfigError(f"no preset {shown(name)}; the presets are {', '.join(presets)}")
    return Config.from_dict(presets[name])


PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        "data": {"image_size": 128},
        "model": {
            "patch_size": 8,
            "hidden_size": 256,
            "num_heads": 4,
            "dec_depth": 6,
            "enc_hidden_size": 256,
            "enc_num_heads": 4,
            "enc_depth": 3,
            "code_length": 64,
            "context_dim": 36,
            "code_layout": "lattice",
            "prediction": "picture",
            "initial_gate": 1.0,
        },
        "eval": {"sampling": {"sample_steps": 1}},
    },
    "small": {"model": {"patch_size": 8, "hidden_size": 768}},
    "lo": {},
    "hi": {"model": {"context_dim": 56, "codebook_size_for_entropy": 14}},
}
"""``small``, ``lo`` and ``hi`` are the paper's (table 6); ``nano`` is sized to train and decode on a CPU: 288 bytes a
128 × 128 picture. Its decoder predicts the picture, is trained mostly at t = 1, and decodes in one pass."""

GENERATOR_PRESETS: dict[str, dict[str, Any]] = {
    "maskgit": {
        "generator": {"train": True},
        "data": {"global_batch_size": 128},
        "opt": {"lr": 1e-4, "mup_base_width": 0, "max_grad_norm": 1.0, "warmup": "640k images"},
        "trainer": {"duration": "300 epochs"},
    },
    "maskgit_nano": {
        "generator": {"train": True, "hidden_size": 256, "depth": 8, "num_heads": 4},
        "data": {"global_batch_size": 32},
        "model": {"ema_decay": 0.99},
        "opt": {"lr": 1e-3, "mup_base_width": 0, "max_grad_norm": 1.0, "warmup": "6400 images", "cooldown": 0.5},
        "trainer": {"duration": "40 epochs"},
    },
}
"""``maskgit`` has the paper's width, depth, batch, rate and length; ``maskgit_nano`` trains on a CPU."""


def _fields(section: type, prefix: str = "") -> Iterable[tuple[str, dataclasses.Field]]:
    hints = typing.get_type_hints(section)
    for f in dataclasses.fields(section):
        f.type = hints[f.name]
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            yield from _fields(f.type, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f


FIELDS: dict[str, dataclasses.Field] = dict(_fields(Config))
"""Every setting by its full name; ``metadata["doc"]`` says what it does."""


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping):
            if not any(known.startswith(f"{full}.") for known in (*FIELDS, *ALIASES)):
                raise ConfigError(f"there is no section {shown(full)}{nearest(full, sections())}")
            yield from leaves(value, f"{full}.")
        else:
            yield full, value


def sections() -> list[str]:
    return sorted({name.rpartition(".")[0] for name in FIELDS})


def flatten(config: Config) -> dict[str, Any]:
    return dict(leaves(dataclasses.asdict(config)))


def build(flat: Mapping[str, Any]) -> Config:
    def make(section: type, prefix: str) -> Any:
        values = {}
        for f in dataclasses.fields(section):
            if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
                values[f.name] = make(f.type, f"{prefix}{f.name}.")
            else:
                values[f.name] = flat[f"{prefix}{f.name}"]
        return section(**values)

    return make(Config, "")


class _Loader(yaml.SafeLoader):
    """Plain values alone, and no aliases: a few lines of them can stand for more values than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "it has an alias (*name); settings have none")
        return super().compose_node(parent, index)

    def construct_number(self, node: Any) -> int | float:
        if len(node.value) > MAX_DIGITS:  # reading it takes the square of its length
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} digits", node.start_mark
            )
        kind = node.tag.rpartition(":")[2]
        return super().construct_yaml_int(node) if kind == "int" else super().construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def load_yaml(text: str | bytes) -> Any:
    """The value of a YAML document of plain values.

    Raises:
        yaml.YAMLError: it is none.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, MemoryError) as error:
        # What PyYAML's constructors raise for dates, numbers and words that are none, and for deep nesting.
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def shorten(value: object) -> str:
    """One line of at most 200 characters."""
    line = " ".join(str(value).split())
    return line if len(line) <= 200 else f"{line[:199]}…"


def shown(value: object) -> str:
    """A value in a message. A whole number can have more digits than Python prints."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


def nearest(name: str, known: Iterable[str]) -> str:
    if len(name) > 100:
        return ""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


def translate(name: str, value: Any) -> dict[str, Any]:
    """Real name and value of a setting that may be spelt as in the release."""
    if name in FIELDS:
        return {name: value}
    if name in ALIASES:
        try:
            return ALIASES[name](value)
        except (ValueError, TypeError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
            raise ConfigError(f"{name}={shown(value)} is not a value that {name} takes") from None
    section, _, last = name.rpartition(".")
    elsewhere = [known for known in FIELDS if known.rpartition(".")[2] == last]
    if elsewhere:
        raise ConfigError(f"there is no setting {shown(name)}; did you mean {' or '.join(map(repr, elsewhere))}?")
    siblings = [known for known in (*FIELDS, *ALIASES) if known.rpartition(".")[0] == section]
    raise ConfigError(f"there is no setting {shown(name)}{nearest(name, siblings or sections())}")


def parse_value(name: str, text: str) -> Any:
    """The value of an assignment on the command line; text fields take it as it stands."""
    known = FIELDS.get(name)
    if known is not None and known.type is str:
        return text.strip("'\"")
    try:
        return load_yaml(text) if len(text) < 1000 else text
    except yaml.YAMLError:
        return text


def convert(name: str, value: Any, kind: Any) -> Any:
    """``value`` as the setting's type, where that loses nothing.

    Raises:
        ConfigError: the value is of another type.
    """
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if kind is Span and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return Span(value)
        except ValueError:
            raise ConfigError(
                f"{name}={shown(value)} does not work; write a length such as {name}='{FIELDS[name].default}', "
                "in images, steps or epochs"
            ) from None
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-4 as text
            number = float(value)
            number = value if isinstance(value, int) and kind is int else number
        except (ValueError, OverflowError):
            number = math.nan
        if kind is float and math.isfinite(number):
            return float(number)
        if kind is int and math.isfinite(number) and number == int(number):
            return int(number)
    wanted = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", Span: "a length"}[
        kind
    ]
    raise ConfigError(f"{name}={shown(value)} does not work; write {wanted}, for example {name}={FIELDS[name].default}")


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
    for prefix in ("", "enc_"):
        check_width(prefix, getattr(m, f"{prefix}hidden_size"), getattr(m, f"{prefix}num_heads"))
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
    for name in ("weight_decay", "max_grad_norm", "lpips_weight", "mup_base_width", "n_grad_acc"):
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


def check_generator(config: Config) -> None:
    g, metric = config.generator, config.trainer.best_metric

    def require(condition: bool, name: str, sentence: str) -> None:
        if not condition:
            raise ConfigError(f"generator.{name}={getattr(g, name)} {sentence}")

    choose("generator.schedule", g.schedule, HIDING_SCHEDULES)
    choose("generator.order", g.order, REVEALING_ORDERS)
    for name in ("hidden_size", "depth", "num_heads", "sample_steps"):
        require(getattr(g, name) > 0, name, "must be at least 1")
    require(g.sample_steps <= MAX_STEPS, "sample_steps", f"must be at most {MAX_STEPS}")
    require(g.hidden_size % g.num_heads == 0, "hidden_size", f"is not divisible by generator.num_heads={g.num_heads}")
    for name in ("mlp_ratio", "temperature", "last_temperature"):
        require(getattr(g, name) > 0, name, "must be above 0")
    require(g.choice_temperature >= 0, "choice_temperature", "must not be negative")
    for name in ("dropout", "label_drop", "label_smoothing"):
        require(0 <= getattr(g, name) < 1, name, "must be at least 0 and below 1")
    if metric and (metric == "cross_entropy") != g.train:
        good = "cross_entropy" if g.train else "psnr or lpips"
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
