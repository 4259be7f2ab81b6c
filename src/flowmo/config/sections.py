"""Every setting: its type, default, meaning and range stand together. Rules between settings are in ``rules.py``."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, cast

from flowmo.config.fields import (
    BIT_DEPTHS,
    CHANNELS,
    IDENTITIES,
    LONGER_THAN_0,
    SIZES,
    VALUES,
    Duration,
    above,
    at_least,
    below,
    between,
    one_of,
    setting,
    training,
)

PREDICTIONS = ("velocity", "image")
SOLVERS = ("euler", "midpoint", "heun", "multistep")
MASK_SCHEDULES = ("arccos", "cosine", "linear")
UNMASKING_ORDERS = ("confidence", "halton", "random")
CELL = 16
"""Side of a cell of a windowed network, in pixels."""
MAX_CHANNELS = 1024
MAX_STEPS = 10_000
"""Most sampling steps: a file's own settings decide how long its decoding takes."""


def rotary_axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with (code index, row, column): 1/8, 7/16 and 7/16 of ``head_dim``."""
    return head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str = setting("", "training images: folder, .tar, shards (shard-{000..099}.tar) or hf:OWNER/NAME:SPLIT")
    train_index: str = setting("", "index of the training tar; empty is the file beside it")
    val: str = setting("", "held-out images, likewise")
    val_index: str = setting("", "index of the held-out tar")
    bit_depth: int = setting(8, "bits per value of the files that are written; 32 is floating point", BIT_DEPTHS)
    value_range: str = setting("", "file values of black and white, as 0,4095; empty is the type's range", VALUES)
    image_size: int = setting(256, "side of the square training images, in pixels", between(1, 10_000))
    global_batch_size: int = setting(0, "images per step over all ranks; 0 is data.batch_size, or 128", at_least(0))
    batch_size: int = setting(0, "images per step and rank; ignored if data.global_batch_size is set, too", at_least(0))
    max_microbatch: int = setting(0, "largest micro-batch of a rank; 0: the most that fits in memory", at_least(0))
    num_workers: int = setting(2, "processes that decode images; 0 decodes in the training process", at_least(0))
    max_bad_share: float = setting(0.01, "share of unreadable images that ends the run if exceeded", between(0, 1))
    read_timeout: float = setting(120.0, "seconds before an image counts as unreadable; 0 disables", at_least(0))
    draft: bool = setting(True, "decode JPEGs of more than four times the training size at a reduced one, for speed")
    random_crop: bool = setting(True, "crop training images at a random position instead of the centre")
    random_flip: bool = setting(False, "mirror half of the training images; the release does not")
    crop_sizes: str = setting("", "heights x widths of random training crops, one per step; empty is the square", SIZES)

    @property
    def value_limits(self) -> tuple[float, float] | None:
        """The two values of ``value_range``."""
        low, comma, high = self.value_range.partition(",")
        return (float(low), float(high)) if comma else None

    @property
    def crops(self) -> list[tuple[int, int]]:
        """Height and width of each of ``crop_sizes``."""
        sizes = (size.split("x") for size in self.crop_sizes.replace(",", " ").split())
        return [(int(height), int(width)) for height, width in sizes]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    network: str = setting("double_stream", "windowed takes any image size", one_of("double_stream", "windowed"))
    channels: int = setting(3, "channels of the images: 1 is grey, 3 is colour", between(1, MAX_CHANNELS))
    conv_depth: int = setting(3, "windowed network: convolution blocks at each of two resolutions", at_least(1))
    window: int = setting(8, "windowed network: side of an attention window, in cells", at_least(1))
    patch_size: int = setting(4, "side of an image token, in pixels, in encoder and decoder", at_least(1))
    hidden_size: int = setting(1152, "width of the decoder", at_least(1))
    num_heads: int = setting(12, "attention heads of the decoder", at_least(1))
    dec_depth: int = setting(16, "blocks of the decoder", at_least(1))
    enc_hidden_size: int = setting(768, "width of the encoder", at_least(1))
    enc_num_heads: int = setting(12, "attention heads of the encoder", at_least(1))
    enc_depth: int = setting(8, "blocks of the encoder", at_least(1))
    mlp_ratio: float = setting(4.0, "hidden width of an MLP over the width of its stream", above(0))
    code_length: int = setting(256, "code tokens per image", at_least(1))
    context_dim: int = setting(18, "channels of a code token; with lfq and bsq, its bits", at_least(1))
    quantization_type: str = setting(
        "lfq", "bottleneck", one_of("lfq", "fsq", "bsq", "vq", "kl", "layernorm", "noop", "qwen2.5-coder-0.5b")
    )
    language_model: str = training("", "infill bottleneck: Hub name or folder of another language model")
    codebook_size_for_entropy: int = setting(9, "bits per sub-token, the group of lfq's entropies", between(1, 2**16))
    fsq_levels: int = setting(8, "fsq: levels per channel", at_least(2))
    vq_entries: int = setting(512, "vq: entries of the codebook, ids of a sub-token", between(2, 2**16))
    vq_sub_tokens: int = setting(2, "vq: ids per code token, each of an equal share of its channels", at_least(1))
    vq_decay: float = training(0.99, "vq: decay of the codebook's moving averages, per step", between(0, 1))
    vq_commit_weight: float = training(0.25, "vq: weight of the commitment loss", at_least(0))
    entropy_loss_weight: float = training(0.0025, "lfq, bsq: weight of the entropy loss (the paper prints 0.1)")
    commit_loss_weight: float = training(0.000625, "lfq, bsq: weight of the commitment loss (the paper prints 0.0025)")
    entropy_statistics: str = training("batch", "where lfq's mean distribution is taken", one_of("batch", "process"))
    enable_cfg: bool = training(True, "train the null code of classifier-free guidance on a tenth of the images")
    nested_dropout: float = setting(0.0, "share of images with a random prefix of each token's ids", between(0, 1))
    code_layout: str = setting("diagonal", "rotary positions of code tokens", one_of("diagonal", "lattice"))
    prediction: str = setting("velocity", "output of the decoder's last layer", one_of(*PREDICTIONS))
    mean_velocity: bool = setting(False, "the decoder sees where its step ends and gives the mean velocity (1C)")
    initial_gate: float = training(0.0, "residual gates of a fresh double-stream decoder; windowed ones start at 1")
    enable_mup: bool = setting(
        True, "scale attention logits by 8 / head size, else by 1 / sqrt(head size); windowed: 8 / sqrt(head size)"
    )
    fix_initial_norms: bool = training(True, "reset the norms of the blocks' weight matrices after each step")
    posttrain_sample: bool = training(False, "stage 1B: perceptual loss on samples of the whole chain, frozen encoder")
    posttrain_sample_k: int = training(8, "random steps of that chain", at_least(1))
    posttrain_sample_enable_cfg: bool = training(False, "drop the code in a tenth of its steps, as the release can")
    ema_decay: float = training(
        0.9999, "decay of the EMA, per 128 images; in stage 1B and with ema_update=release, per step", between(0, 1)
    )
    ema_update: str = training("every_step", "when the EMA is updated", one_of("every_step", "release"))
    train: str = training(
        "all", "networks that a run trains; ids stay only with decoder", one_of("all", "encoder", "decoder")
    )
    base: str = training("", "identity and encoder of the tokenizer that a run started from; runs write it", IDENTITIES)

    @property
    def id_channels(self) -> int:
        """Channels of one fsq id: as many as ``codebook_size_for_entropy`` bits hold."""
        return max(int(self.codebook_size_for_entropy / math.log2(self.fsq_levels) + 1e-9), 1)

    @property
    def ids_per_token(self) -> tuple[int, int] | None:
        """Sub-tokens of a code token and number of ids of each; ``None`` for a continuous bottleneck."""
        group = self.codebook_size_for_entropy
        binary = self.context_dim // group, 2**group
        discrete = {
            "lfq": binary,
            "bsq": binary,
            "fsq": (self.context_dim // self.id_channels, self.fsq_levels**self.id_channels),
            "vq": (self.vq_sub_tokens, self.vq_entries),
        }
        return discrete.get(self.quantization_type)


@dataclass(frozen=True, kw_only=True)
class OptConfig:
    optimizer: str = setting("adam", "muon trains the blocks' matrices, adam the rest", one_of("adam", "muon"))
    lr: float = setting(1e-4, "learning rate", above(0))
    muon_lr: float = setting(0.02, "learning rate of muon's matrices at any width; opt.lr is the rest's", above(0))
    beta1: float = setting(0.9, "Adam's decay of the mean gradient", below(1))
    beta2: float = setting(0.95, "Adam's decay of the mean squared gradient", below(1))
    weight_decay: float = setting(0.0, "decoupled weight decay", at_least(0))
    mup_base_width: int = setting(0, "width from which muP scales opt.lr and initial weights; 0 is none", at_least(0))
    warmup: Duration = setting(Duration(0), "length over which the learning rate of a stage rises from 0")
    cooldown: float = setting(0.0, "last share of the stage over which the learning rate falls", between(0, 1))
    cooldown_shape: str = setting("linear", "shape of that fall", one_of("linear", "cosine"))
    final_lr: float = setting(0.0, "learning rate at the end of the cooldown", at_least(0))
    max_grad_norm: float = setting(0.0, "clip gradients to this norm; 0 does not clip", at_least(0))
    schedule: str = setting("fat_lognormal", "training timesteps", one_of("fat_lognormal", "lognormal", "uniform"))
    anchor: float = setting(0.0, "share of the training timesteps at exactly t = 1", between(0, 1))
    loss_space: str = setting("velocity", "error that the flow loss squares", one_of(*PREDICTIONS))
    lpips_weight: float = setting(0.1, "weight of the perceptual loss; 0 disables", at_least(0))
    lpips_mode: str = setting(
        "vgg", "perceptual loss: LPIPS or the logits of resnet", one_of("vgg", "alex", "vgg+alex", "resnet")
    )
    lpips_bfloat16: bool = setting(False, "convolutions of LPIPS in bfloat16; metrics and resnet stay in float32")
    perceptual_channels: str = setting(
        "", "three channels for LPIPS and rFID, or one for all three; empty is 0,1,2, or 0 below three", CHANNELS
    )
    lpips_jitter: int = setting(0, "pixels that a random crop takes off both images of the perceptual loss")
    lpips_crop: int = setting(0, "side of the random square that this loss sees, without jitter; 0 is the whole image")
    perceptual_weights: str = setting("", "folder to look for perceptual weights in, before FLOWMO_WEIGHTS")
    n_grad_acc: int = setting(0, "gradient-accumulation steps of a rank; 0 is as few as fit", at_least(0))
    freeze_encoder_after: Duration = setting(Duration("25.6M images"), "when the encoder stops learning")
    teacher: str = setting("", "stage 1C: preset or file of the tokenizer whose samples are distilled")
    teacher_steps: int = setting(0, "Euler steps of the teacher's path; 0 is its own number", at_least(0))
    jumps: int = setting(4, "stage 1C: jumps along each path; the first two end in the sample", at_least(2))
    distill_towards: str = setting("sample", "target of the jumps' perceptual loss", one_of("sample", "image"))


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    duration: Duration = setting(Duration("166.4M images"), "length of a run; the default is stage 1A's", LONGER_THAN_0)
    start_weights: str = setting(
        "",
        "weights that a new stage takes; empty is ema for model.train=decoder and bare weights, else model",
        one_of("", "model", "ema"),
    )
    parallel: str = setting("ddp", "how several ranks share the work", one_of("ddp", "fsdp"))
    activation_checkpointing: bool = setting(False, "recompute blocks in the backward pass: less memory, more time")
    checkpoint_keeps: str = setting(
        "inputs",
        "activations that are kept; each choice includes the ones before it",
        one_of("inputs", "attention", "products"),
    )
    enable_bfloat16: bool = setting(True, "matrix products in bfloat16 if the device can; the rest stays float32")
    compile: bool = setting(False, "torch.compile the blocks; pays off on a GPU, and on a CPU with a C++ compiler")
    log_every: Duration = setting(Duration("12.8k images"), "period of log lines", LONGER_THAN_0)
    sample_every: Duration = setting(Duration("640k images"), "period of sample grids and held-out metrics; 0 for none")
    checkpoint_every: Duration = setting(Duration("640k images"), "period of checkpoints", LONGER_THAN_0)
    keep_last: int = setting(2, "newest checkpoints that are kept", at_least(1))
    keep_every: Duration = setting(Duration("25.6M images"), "period of checkpoints kept for good; 0 keeps none")
    tensorboard: bool = setting(True, "write TensorBoard files beside metrics.jsonl, if it is installed")
    wandb_project: str = setting("", "Weights & Biases project to send the metrics to; empty sends nothing")
    best_metric: str = setting(
        "",
        "metric on data.val by which the best checkpoint is kept, cross_entropy for a generator; empty is none",
        one_of("", "psnr", "lpips", "rfid", "cross_entropy"),
    )
    patience: int = setting(0, "checkpoints in a row without a better one that end the run; 0 never does", at_least(0))
    max_skipped_steps: int = setting(10, "non-finite steps in a row that end the run", at_least(1))
    seed: int = setting(0, "seed of the weights, the order of the images and the noise", between(0, 2**63 - 1))


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    sample_steps: int = setting(25, "steps from noise to image", between(1, MAX_STEPS))
    solver: str = setting("euler", "ODE solver", one_of(*SOLVERS))
    rho: float = setting(4.0, "shift of the sampler, equation 14: t = (i/n)^rho; 1 is linear", above(0))
    guidance: float = setting(1.5, "classifier-free guidance; 1 is none")
    guidance_low: float = setting(0.17 / 1.17, "lowest timestep with guidance")
    guidance_high: float = setting(1.02 / 2.02, "highest timestep with guidance")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    images: int = setting(200, "held-out images, evenly spread, on which a checkpoint is evaluated", at_least(1))
    eval_dir: str = setting("", "folder of a training run whose checkpoints are evaluated")
    continuous: bool = setting(False, "evaluate every checkpoint of eval.eval_dir as it comes, not only the newest")
    force_ckpt_path: str = setting("", "evaluate this checkpoint and no other")
    subsample_rate: int = setting(1, "evaluate every n-th held-out image", at_least(1))
    batch_size: int = setting(16, "images evaluated at a time; does not change any metric", at_least(1))
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    train: bool = training(False, "stage 2: train a generator, on data.train=TOKENS from flowmo tokenize")
    network: str = setting("maskgit", "ours, or TiTok's UViTBert, whose size is the paper's", one_of("maskgit", "uvit"))
    hidden_size: int = setting(1024, "width of the generator", at_least(1))
    depth: int = setting(28, "blocks of the generator", at_least(1))
    num_heads: int = setting(16, "attention heads", at_least(1))
    mlp_ratio: float = setting(4.0, "hidden width of an MLP over the width", above(0))
    dropout: float = training(0.1, "dropout rate of each branch", below(1))
    bit_tokens: bool = setting(False, "embed the bits of an id by one matrix, instead of a table of ids")
    schedule: str = training("arccos", "share of masked ids over time", one_of(*MASK_SCHEDULES))
    label_drop: float = training(0.1, "share of training images without their class, for guidance", below(1))
    label_smoothing: float = training(0.1, "share of the target spread over all ids", below(1))
    visible_weight: float = training(0.0, "weight of an unmasked id in the loss; a masked one has 1", between(0, 1))
    tokenizer: str = training("", "preset or file of the tokenizer, to show samples while training")
    sample_steps: int = training(64, "steps that unmask all ids of an image", between(1, MAX_STEPS))
    guidance: float = training(1.5, "classifier-free guidance g of the logits, see guided_from")
    guided_from: str = training(
        "null",
        "guidance g adds g (class - null) to this; null: none at 1; class, as TiTok: none at 0",
        one_of("null", "class"),
    )
    drawing: str = training(
        "categorical",
        "draw ids by probability, or, as TiTok, the largest logit with Gumbel noise of choice_temperature",
        one_of("categorical", "gumbel"),
    )
    temperature: float = training(1.3, "softmax temperature of the first step", above(0))
    last_temperature: float = training(0.5, "softmax temperature of the last step; it falls linearly", above(0))
    choice_temperature: float = training(4.5, "noise in the choice of ids that are kept, falling to 0", at_least(0))
    order: str = training("confidence", "which ids are unmasked first", one_of(*UNMASKING_ORDERS))


@dataclass(frozen=True, kw_only=True)
class Sections:
    """All sections, each by its defaults."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    opt: OptConfig = field(default_factory=OptConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)

    @property
    def perceptual_channels(self) -> list[int]:
        """Three channels of an image that networks trained on colour images take as red, green and blue."""
        default = "0,1,2" if self.model.channels > 2 else "0"
        channels = [int(channel) for channel in (self.opt.perceptual_channels or default).split(",")]
        return channels * 3 if len(channels) == 1 else channels


def _fields(sections: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    for f in dataclasses.fields(sections):
        if f.default_factory is dataclasses.MISSING:
            yield prefix + f.name, f
        else:
            yield from _fields(cast(type, f.default_factory), f"{prefix}{f.name}.")


FIELDS: dict[str, dataclasses.Field] = dict(_fields(Sections))
"""Every setting by its full name; ``metadata["doc"]`` is its meaning."""


def flatten(config: Sections) -> dict[str, Any]:
    """Every setting by its full name."""
    return {name: attrgetter(name)(config) for name in FIELDS}
