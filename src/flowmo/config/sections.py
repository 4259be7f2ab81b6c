"""The settings, by section: types, defaults, and a line about each."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from flowmo.errors import FlowMoError
from flowmo.model.flow import DISTRIBUTIONS

QUANTIZATION_TYPES = ("lfq", "fsq", "bsq", "vq", "kl", "layernorm", "noop", "qwen2.5-coder-0.5b")
LPIPS_MODES = ("vgg", "alex", "resnet")
PREDICTIONS = ("velocity", "picture")
CODE_LAYOUTS = ("diagonal", "lattice")
NETWORKS = ("double_stream", "windowed")
STATISTICS = ("batch", "process")
EMA_UPDATES = ("every_step", "release")
START_WEIGHTS = ("model", "ema")
PARALLEL = ("ddp", "fsdp")
OPTIMIZERS = ("adam", "muon")
BEST_METRICS = ("", "psnr", "lpips", "rfid", "cross_entropy")
HIDING_SCHEDULES = ("arccos", "cosine", "linear")
DISTILLED = ("sample", "picture")
CHECKPOINTED = ("inputs", "attention", "products")
SOLVERS = ("euler", "midpoint", "heun", "multistep")
GENERATOR_NETWORKS = ("maskgit", "uvit")
GUIDED_FROM = ("null", "class")
DRAWING_RULES = ("categorical", "gumbel")
COOLDOWN_SHAPES = ("linear", "cosine")
REVEALING_ORDERS = ("confidence", "halton", "random")


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
        "training pictures: a folder, searched through its sub-folders, a .tar, WebDataset shards "
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
    crop_sizes: str = setting(
        "",
        "heights and widths of training crops in pixels, '128x128 96x192'; each step draws one of them and cuts it at "
        "random from the square of data.image_size; empty trains on the whole square",
    )

    @property
    def crops(self) -> list[tuple[int, int]]:
        """Height and width of each of ``crop_sizes``."""
        sizes = self.crop_sizes.replace(",", " ").split()
        if not all(re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) for size in sizes):
            raise ConfigError(f"data.crop_sizes={self.crop_sizes!r} is no list of sizes; write it as '128x128 96x192'")
        return [(int(height), int(width)) for height, width in (size.split("x") for size in sizes)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    network: str = setting(
        "double_stream",
        "encoder and decoder: double_stream, the paper's, or windowed, for any image size, whose code tokens describe "
        "one cell of patch_size pixels each: " + ", ".join(NETWORKS),
    )
    conv_depth: int = setting(3, "of a windowed network: residual convolution blocks at each of two resolutions")
    window: int = setting(8, "of a windowed network: side of an attention window, in cells")
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
    nested_dropout: float = setting(
        0.0,
        "share of the training images whose code tokens keep a random prefix of their sub-tokens, so that one model "
        "serves every rate (Rippel et al. 2014)",
    )
    code_layout: str = setting("diagonal", "rotary positions of code tokens: " + ", ".join(CODE_LAYOUTS))
    prediction: str = setting("velocity", "what the decoder's last layer estimates: " + ", ".join(PREDICTIONS))
    mean_velocity: bool = setting(
        False, "the decoder is told where its step ends and gives the mean velocity up to there; what stage 1C trains"
    )
    initial_gate: float = setting(
        0.0,
        "residual gates of a fresh double-stream decoder, at 0 its blocks start as the identity; windowed ones are 1",
        training=True,
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
        0.9999,
        "decay of the EMA: over 128 images, a step of the paper; per step in stage 1B and with ema_update=release",
        training=True,
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
        0,
        "width from which muP scales learning rates and initial weights, so that opt.lr transfers between widths, "
        "such as 768; 0, as the release, gives every weight opt.lr",
    )
    warmup: Span = setting(Span(0), "length over which the learning rate rises from 0")
    cooldown: float = setting(0.0, "last share of the run over which the learning rate falls; 0 keeps it")
    cooldown_shape: str = setting(
        "linear", "how it falls, a cosine's from the warm-up's end: " + ", ".join(COOLDOWN_SHAPES)
    )
    final_lr: float = setting(0.0, "learning rate at the end of the cooldown")
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
    lpips_crop: int = setting(
        0, "side of the random square, in pixels, that the perceptual loss on the one-step estimate sees; 0 is all"
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
    duration: Span = setting(
        Span("166.4M images"), "length of the whole run; the default is stage 1A's, other stages name their own"
    )
    start_weights: str = setting(
        "model",
        "weights that a new stage takes from --resume-from-ckpt, the trained ones, as the release, or their EMA: "
        + ", ".join(START_WEIGHTS),
    )
    parallel: str = setting("ddp", "how several processes share the work: " + ", ".join(PARALLEL))
    activation_checkpointing: bool = setting(
        False, "compute each block again in the backward pass rather than keep its activations: less memory, more time"
    )
    checkpoint_keeps: str = setting(
        "inputs",
        "what activation checkpointing keeps all the same, each with those before it: a block's inputs, the results of "
        "attention, those of all matrix products: " + ", ".join(CHECKPOINTED),
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
        "figure on data.val by which checkpoints are judged and the best is kept: psnr, lpips or rfid, of a generator "
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
    network: str = setting(
        "maskgit", "maskgit, ours, or uvit, TiTok's UViTBert, the paper's: " + ", ".join(GENERATOR_NETWORKS)
    )
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
    visible_weight: float = setting(
        0.0, "weight in the loss of an id that is not hidden, of a hidden one 1", training=True
    )
    tokenizer: str = setting("", "preset or file of the tokenizer, to show samples while training", training=True)
    sample_steps: int = setting(64, "steps from hidden ids to a picture's", training=True)
    guidance: float = setting(1.5, "classifier-free guidance g of the logits, see guided_from", training=True)
    guided_from: str = setting(
        "null",
        "convention of guidance: null, null + g (class - null), none at 1; class, class + g (class - null), as TiTok "
        "and the paper, none at 0: " + ", ".join(GUIDED_FROM),
        training=True,
    )
    drawing: str = setting(
        "categorical",
        "how ids are drawn: categorical, of their probabilities; gumbel, as TiTok, the logit that is largest with "
        "Gumbel noise of choice_temperature: " + ", ".join(DRAWING_RULES),
        training=True,
    )
    temperature: float = setting(1.3, "softmax temperature of the first step", training=True)
    last_temperature: float = setting(0.5, "and of the last, between which it falls evenly", training=True)
    choice_temperature: float = setting(4.5, "noise in which ids are kept, falling to 0 (confidence)", training=True)
    order: str = setting("confidence", "which ids are revealed first: " + ", ".join(REVEALING_ORDERS), training=True)


def _fields(section: type, prefix: str = "") -> Iterable[tuple[str, dataclasses.Field]]:
    hints = typing.get_type_hints(section)
    for f in dataclasses.fields(section):
        f.type = hints[f.name]
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            yield from _fields(f.type, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "opt": OptConfig,
    "trainer": TrainerConfig,
    "eval": EvalConfig,
    "generator": GeneratorConfig,
}
FIELDS: dict[str, dataclasses.Field] = {
    name: field for section, kind in SECTIONS.items() for name, field in _fields(kind, f"{section}.")
}
"""Every setting by its full name; ``metadata["doc"]`` says what it does."""
