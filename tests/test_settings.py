"""Every setting changes what it says it changes.

Each row of ``CASES`` gives a setting another value and names the quantity that must differ then. Quantities are read
from the networks, from a short run, or from the files that it wrote, never from the settings themselves. A setting
without a row, and without a reason in ``ELSEWHERE``, fails ``test_every_setting_has_a_row``.
"""

import hashlib
import json
import shutil
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import CLASSES, TINY, open_gates
from PIL import Image
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flowmo import Config, FlowMo, save
from flowmo.config import FIELDS
from flowmo.data import build_index, open_source
from flowmo.data.tokens import Vocabulary
from flowmo.errors import FlowMoError
from flowmo.evaluate import comparison
from flowmo.evaluate.follow import LOG, Follower
from flowmo.evaluate.reconstruction import Evaluators, measure
from flowmo.evaluate.speed import UNCOUNTED
from flowmo.generate.generator import Generator
from flowmo.generate.tokenize import tokenize
from flowmo.images.pixels import PixelFormat
from flowmo.losses.noise import TrainingNoise
from flowmo.train.tokenizer import TokenizerTask
from flowmo.train.trainer import Trainer

BASE = (
    *("data.train={pictures}", "data.global_batch_size=4", "data.num_workers=0", "opt.lpips_weight=0", "opt.lr=1e-2"),
    "data.max_microbatch=4",
    *("trainer.duration=3 steps", "trainer.log_every=1 step", "trainer.checkpoint_every=3 steps", "trainer.seed=5"),
    *("trainer.sample_every=0", "trainer.keep_every=0", "trainer.enable_bfloat16=false", "trainer.tensorboard=false"),
)
GENERATOR = (
    *("generator.train=true", "data.train={tokens}", "generator.hidden_size=32", "generator.depth=2"),
    *("generator.num_heads=2", "generator.sample_steps=4"),
)
POSTTRAIN = ("model.posttrain_sample=true", "model.posttrain_sample_k=2", "trainer.duration=7 steps")
DISTILL = (
    *("opt.teacher={teacher}", "model.mean_velocity=true", "eval.sampling.guidance=1", "eval.sampling.sample_steps=1"),
    *("opt.teacher_steps=2", "opt.jumps=2"),
)
JUDGED = (
    *("data.val={other}", "eval.images=2", "eval.sampling.sample_steps=1", "trainer.best_metric=psnr"),
    "trainer.checkpoint_every=1 step",
)
LPIPS = ("opt.lpips_weight=0.5",)
FOLLOW = ("data.val={other}", "eval.eval_dir={run}", "eval.sampling.sample_steps=1")
WINDOWED = ("model.network=windowed", "model.patch_size=16", "model.code_length=4")
MEAN = ("eval.sampling.guidance=1",)


# Quantities


def digest(tensors):
    """Of names, shapes and values."""
    total = hashlib.sha256()
    for name, value in tensors.items():
        total.update(f"{name} {tuple(value.shape)}".encode() + value.detach().float().numpy().tobytes())
    return total.hexdigest()


class Distance(torch.nn.Module):
    """Stands for the perceptual networks: another function of two images for each mode and folder of weights."""

    def __init__(self, mode, weights=None, pretrained=True, channels=None, dtype=torch.float32):
        super().__init__()
        self.channels, self.dtype = channels, dtype
        self.power = {"vgg": 2, "alex": 3, "resnet": 4}[mode]
        self.scale = 1 + len(weights or "")
        self.name = f"{mode} {weights}"

    def forward(self, x, y):
        x, y = x.to(self.dtype).float(), y.to(self.dtype).float()
        return ((x - y)[:, self.channels].abs() ** self.power).mean(dim=(1, 2, 3)) * self.scale


@contextmanager
def stand_ins():
    """No trained networks, no counting of FLOPs, no wandb, and a CPU that multiplies bfloat16 if a run asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowmo.train.tokenizer.build_distance", Distance)
        patch.setattr("flowmo.train.task.multiplies_bfloat16", bool)
        patch.setattr(Trainer, "_utilisation", lambda run, rate: 0.0)
        patch.setitem(sys.modules, "wandb", None)
        yield


def finished(config, workspace, start=None):
    """A run of ``config`` at its end, in a new folder."""
    workspace.runs += 1
    run = Trainer(config, workspace.folder / f"run{workspace.runs}", resume_from=start, report=lambda line: None)
    run.train()
    return run


def written(config, workspace):
    """A file of an image in the middle of its range."""
    pixels = PixelFormat.of(config)
    return pixels.to_file(torch.zeros(pixels.channels, 2, 2), ".npy")


def weights(config, workspace):
    return digest(finished(config, workspace).task.model.state_dict())


def weights_after_a_start(config, workspace):
    return digest(finished(config, workspace, workspace.start).task.model.state_dict())


def ema(config, workspace):
    return digest(finished(config, workspace).ema.state)


def ema_after_a_start(config, workspace):
    return digest(finished(config, workspace, workspace.start).ema.state)


def fresh(config, workspace):
    """Weights before training; for a generator with a tokenizer's vocabulary."""
    torch.manual_seed(0)
    if config.generator.train:
        return digest(Generator(config, VOCABULARY).state_dict())
    return digest(FlowMo(config).state_dict())


def function(config, workspace):
    """Ids, and what they decode to."""
    torch.manual_seed(0)
    tokenizer = open_gates(FlowMo(config)).eval()
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    codes = tokenizer.encode(images)
    return digest({"codes": codes.ids if codes.ids is not None else codes.code, "images": tokenizer.decode(codes)})


def ids(config, workspace):
    """What a generator of random weights draws."""
    torch.manual_seed(0)
    generator = Generator(config, VOCABULARY)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return digest({"ids": generator.eval().sample([0, 1, 2, 2])})


def logits(config, workspace):
    """Of a generator of random weights, for ids that are all masked."""
    torch.manual_seed(0)
    network = Generator(config, VOCABULARY).eval().network
    mask = torch.ones(1, VOCABULARY.ids, dtype=torch.bool)
    return digest({"logits": network(torch.zeros(mask.shape, dtype=torch.int64), mask, torch.tensor([1]))})


def draws(config, workspace):
    """Random numbers of 64 images: timesteps, noise, dropped codes and those of a stage's samples."""
    found = TrainingNoise.of(config, torch.zeros(64, 3, 1, 1), range(64))
    return digest({str(i): t for i, t in enumerate(tree_leaves(tuple(found))) if t is not None})


def plan(config, workspace):
    return Trainer(config, workspace.folder / "plan", report=lambda line: None).plan


def shown(config, workspace):
    """Images of the sample grids."""
    return digest({"held out": Trainer(config, workspace.folder / "shown", report=lambda line: None).task.held_out})


def products(config, workspace):
    """FLOPs of a run, of what backward passes compute again too."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        finished(config, workspace)
    return counter.get_total_flops()


def files(config, workspace):
    folder = finished(config, workspace).folder
    return sorted({str(p.relative_to(folder)).partition(".out.")[0] for p in folder.rglob("*")} - {"config.json"})


def metrics(config, workspace):
    """Steps and names of the logged values, and those that belong to held-out images."""
    lines = (finished(config, workspace).folder / "metrics.jsonl").read_text().splitlines()
    return [(sorted(line), line["step"], line.get("eval_psnr")) for line in map(json.loads, lines)]


def outcome(config, workspace):
    """Whether a run ends well, or the error it ends with."""
    try:
        return finished(config, workspace).step
    except FlowMoError as error:
        return str(error)


def steps_while_it_gets_worse(config, workspace):
    with mock.patch.object(TokenizerTask, "evaluate", side_effect=[{"psnr": -step} for step in range(9)]):
        return finished(config, workspace).step


def reader(config, workspace):
    """How the loader reads: worker processes, and the time that one item may take."""
    with mock.patch("flowmo.data.loader.DataLoader", side_effect=FlowMoError("read")) as loader:
        run = Trainer(config, workspace.folder / "reader", report=lambda line: None)
        with pytest.raises(FlowMoError, match="read"):
            run.train()
    return loader.call_args.kwargs["num_workers"], loader.call_args.kwargs["timeout"]


def compiled(config, workspace):
    with mock.patch.object(torch.nn.Module, "compile", autospec=True) as compile_block:
        Trainer(config, workspace.folder / "compiled", report=lambda line: None)
    return compile_block.call_count


def followed(config, workspace):
    """Checkpoints that an evaluation of a run measures, on how many images, and how many at a time."""
    workspace.runs += 1
    folder, asked = workspace.folder / f"evaluation{workspace.runs}", []
    settings = [f"eval.{name}={getattr(config.eval, name)}" for name in EVALUATION]
    settings += [f"data.val={config.data.val}", f"data.val_index={config.data.val_index}"]
    settings += ["eval.sampling.sample_steps=1"]

    def spy(*arguments, **named):
        asked.append(named["batch_size"])
        return measure(*arguments, **named)

    with mock.patch.object(comparison, "measure", spy):
        Follower(
            [s for s in settings if not s.endswith("=")], folder, Evaluators(), report=lambda line: None
        ).evaluate()
    rows = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [(row["checkpoint"], row["images"], row["psnr"]) for row in rows], asked


EVALUATION = ("eval_dir", "continuous", "force_ckpt_path", "subsample_rate", "batch_size")
VOCABULARY = Vocabulary(
    tokenizer="00" * 8, model="tiny", image_size=32, tokens=6, sub_tokens=2, id_bits=4, classes=CLASSES
)

# Rows: the other value, the quantity that differs, and the settings that the setting needs to matter

CASES = {
    "data.train": ("{other}", weights),
    "data.train_index": ("{index}", weights, "data.train={tar}"),
    "data.val": ("{other}", shown),
    "data.val_index": ("{index}", shown, "data.val={tar}"),
    "data.bit_depth": ("16", written),
    "data.value_range": ("0,100", weights),
    "data.image_size": ("64", weights),
    "data.global_batch_size": ("2", plan),
    "data.batch_size": ("2", plan, "data.global_batch_size=0"),
    "data.max_microbatch": ("1", plan),
    "data.num_workers": ("1", reader),
    "data.max_bad_share": ("0.9", outcome, "data.train={damaged}"),
    "data.read_timeout": ("7", reader, "data.num_workers=1"),
    "data.draft": ("false", weights, "data.train={large}"),
    "data.random_crop": ("false", weights),
    "data.random_flip": ("true", weights),
    "data.crop_sizes": ("16x24", weights),
    "model.network": ("windowed", fresh, "model.patch_size=16", "model.code_length=4"),
    "model.channels": ("4", fresh),
    "model.conv_depth": ("2", fresh, *WINDOWED),
    "model.window": ("1", function, *WINDOWED),
    "model.nested_dropout": ("1", weights, *WINDOWED),
    "model.patch_size": ("4", fresh),
    "model.hidden_size": ("128", fresh),
    "model.num_heads": ("4", fresh, "model.hidden_size=128"),
    "model.dec_depth": ("2", fresh),
    "model.enc_hidden_size": ("64", fresh),
    "model.enc_num_heads": ("2", fresh, "model.enc_hidden_size=64"),
    "model.enc_depth": ("1", fresh),
    "model.mlp_ratio": ("2", fresh),
    "model.code_length": ("8", function),
    "model.context_dim": ("12", fresh),
    "model.quantization_type": ("fsq", function),
    "model.language_model": (
        *("{missing}/b", outcome),
        *("model.quantization_type=qwen2.5-coder-0.5b", "model.language_model={missing}/a"),
    ),
    "model.codebook_size_for_entropy": ("2", function),
    "model.fsq_levels": ("4", function, "model.quantization_type=fsq"),
    "model.vq_entries": ("16", fresh, "model.quantization_type=vq"),
    "model.vq_sub_tokens": ("4", fresh, "model.quantization_type=vq"),
    "model.vq_decay": ("0.5", weights, "model.quantization_type=vq"),
    "model.vq_commit_weight": ("9", weights, "model.quantization_type=vq"),
    "model.entropy_loss_weight": ("9", weights),
    "model.commit_loss_weight": ("9", weights),
    "model.entropy_statistics": ("process", weights, "data.max_microbatch=1", "model.entropy_loss_weight=9"),
    "model.enable_cfg": ("false", draws),
    "model.code_layout": ("lattice", function),
    "model.prediction": ("image", function),
    "model.mean_velocity": ("true", fresh, *MEAN),
    "model.initial_gate": ("1", fresh),
    "model.enable_mup": ("false", function),
    "model.fix_initial_norms": ("false", weights),
    "model.posttrain_sample": ("true", weights_after_a_start, "trainer.duration=7 steps", *LPIPS),
    "model.posttrain_sample_k": ("3", draws, *POSTTRAIN),
    "model.posttrain_sample_enable_cfg": ("true", draws, *POSTTRAIN),
    "model.ema_decay": ("0.01", ema),
    "model.ema_update": ("release", ema),
    "model.train": ("decoder", weights),
    "opt.optimizer": ("muon", weights),
    "opt.lr": ("1e-3", weights),
    "opt.muon_lr": ("0.1", weights, "opt.optimizer=muon"),
    "opt.beta1": ("0.5", weights),
    "opt.beta2": ("0.5", weights),
    "opt.weight_decay": ("0.5", weights),
    "opt.mup_base_width": ("16", weights),
    "opt.warmup": ("2 steps", weights),
    "opt.cooldown": ("0.9", weights),
    "opt.cooldown_shape": ("cosine", weights, "opt.cooldown=0.9"),
    "opt.final_lr": ("5e-3", weights, "opt.cooldown=0.9"),
    "opt.max_grad_norm": ("1e-6", weights),
    "opt.schedule": ("uniform", draws),
    "opt.anchor": ("0.5", draws),
    "opt.loss_space": ("image", weights),
    "opt.lpips_weight": ("0.5", weights),
    "opt.lpips_mode": ("alex", weights, *LPIPS),
    "opt.lpips_jitter": ("4", weights, *LPIPS),
    "opt.lpips_crop": ("16", weights, *LPIPS),
    "opt.lpips_bfloat16": ("true", weights, *LPIPS),
    "opt.perceptual_channels": ("2", weights, *LPIPS),
    "opt.perceptual_weights": ("{other}", weights, *LPIPS),
    "opt.n_grad_acc": ("2", plan),
    "opt.freeze_encoder_after": ("4 images", weights),
    "opt.teacher": ("{other_teacher}", weights, *DISTILL),
    "opt.teacher_steps": ("3", weights, *DISTILL),
    "opt.jumps": ("3", weights, *DISTILL),
    "opt.distill_towards": ("image", weights, *DISTILL, *LPIPS),
    "trainer.duration": ("2 steps", files),
    "trainer.start_weights": ("ema", ema_after_a_start, *POSTTRAIN),
    "trainer.activation_checkpointing": ("true", products),
    "trainer.checkpoint_keeps": ("products", products, "trainer.activation_checkpointing=true"),
    "trainer.enable_bfloat16": ("true", weights),
    "trainer.compile": ("true", compiled),
    "trainer.log_every": ("2 steps", metrics),
    "trainer.sample_every": ("1 step", files, "eval.sampling.sample_steps=1"),
    "trainer.checkpoint_every": ("1 step", files),
    "trainer.keep_last": ("1", files, "trainer.checkpoint_every=1 step"),
    "trainer.keep_every": ("1 step", files, "trainer.checkpoint_every=1 step", "trainer.keep_last=1"),
    "trainer.tensorboard": ("true", files),
    "trainer.wandb_project": ("mine", outcome),
    "trainer.best_metric": ("psnr", files, "data.val={other}", "eval.images=1", "eval.sampling.sample_steps=1"),
    "trainer.patience": ("1", steps_while_it_gets_worse, *JUDGED),
    "trainer.max_skipped_steps": (
        "1",
        outcome,
        "opt.lr=1e30",
        "trainer.max_skipped_steps=3",
        "trainer.duration=9 steps",
    ),
    "trainer.seed": ("6", weights),
    "eval.images": ("1", metrics, *JUDGED),
    "eval.eval_dir": ("{other_run}", followed, *FOLLOW),
    "eval.continuous": ("true", followed, *FOLLOW),
    "eval.force_ckpt_path": ("{run}/checkpoints/00000001.pth", followed, *FOLLOW),
    "eval.subsample_rate": ("2", followed, *FOLLOW),
    "eval.batch_size": ("1", followed, *FOLLOW),
    "eval.sampling.sample_steps": ("3", function),
    "eval.sampling.solver": ("heun", function),
    "eval.sampling.rho": ("1", function),
    "eval.sampling.guidance": ("3", function),
    "eval.sampling.guidance_low": ("0.5", function),
    "eval.sampling.guidance_high": ("0.9", function),
    "generator.train": ("true", fresh),
    "generator.network": ("uvit", fresh, *GENERATOR),
    "generator.hidden_size": ("64", fresh, *GENERATOR),
    "generator.depth": ("1", fresh, *GENERATOR),
    "generator.num_heads": ("4", logits, *GENERATOR),
    "generator.mlp_ratio": ("2", fresh, *GENERATOR),
    "generator.dropout": ("0.5", weights, *GENERATOR),
    "generator.bit_tokens": ("true", fresh, *GENERATOR),
    "generator.schedule": ("linear", weights, *GENERATOR),
    "generator.label_drop": ("0.9", weights, *GENERATOR),
    "generator.label_smoothing": ("0.5", weights, *GENERATOR),
    "generator.tokenizer": ("{tokenizer}", files, *GENERATOR, "trainer.sample_every=1 step"),
    "generator.sample_steps": ("2", ids, *GENERATOR),
    "generator.guidance": ("4", ids, *GENERATOR),
    "generator.guided_from": ("class", ids, *GENERATOR),
    "generator.drawing": ("gumbel", ids, *GENERATOR),
    "generator.visible_weight": ("0.5", weights, *GENERATOR),
    "generator.temperature": ("9", ids, *GENERATOR),
    "generator.last_temperature": ("9", ids, *GENERATOR),
    "generator.choice_temperature": ("0", ids, *GENERATOR),
    "generator.order": ("random", ids, *GENERATOR),
}

ELSEWHERE = {
    "model.base": "says where weights come from: test_fine_tuning shows that identities follow it",
    "trainer.parallel": "needs several processes: test_distributed runs ddp and fsdp, whose checkpoints differ in form",
}
"""Settings that a test elsewhere changes, and why they have no row here."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The sources, models and runs that rows name, made once."""
    folder = tmp_path_factory.mktemp("settings")
    examples = sorted((Path(__file__).parent.parent / "examples" / "pictures").glob("*.jpg"))
    photos = [Image.open(file).convert("RGB") for file in examples[:6]]
    for name, chosen, size in (("pictures", photos[:4], (60, 48)), ("other", photos[4:], (60, 48))):
        for i, photo in enumerate(chosen):
            target = folder / name / CLASSES[i % 2] / f"{i}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            photo.resize(size).save(target)
    (folder / "large").mkdir()
    photos[0].resize((400, 400)).save(folder / "large" / "0.jpg")
    shutil.copytree(folder / "pictures", folder / "damaged")
    for i in range(2):
        (folder / "damaged" / f"broken{i}.jpg").write_bytes(b"no picture")
    with tarfile.open(folder / "all.tar", "w") as tar:
        tar.add(folder / "pictures", "pictures")
    entries = build_index(folder / "all.tar")[0]
    (folder / "all.index.json").write_text(json.dumps(entries))
    (folder / "two.json").write_text(json.dumps(entries[:2] if isinstance(entries, list) else entries))
    names = {name: folder / name for name in ("pictures", "other", "large", "damaged", "missing", "tokens")}
    names |= {"tar": folder / "all.tar", "index": folder / "two.json", "run": folder / "run"}
    names |= {"other_run": folder / "other_run", "teacher": folder / "teacher.safetensors"}
    names |= {"other_teacher": folder / "other_teacher.safetensors", "tokenizer": folder / "teacher.safetensors"}
    made = SimpleNamespace(folder=folder, names=names, runs=0, start=None, known={})
    for i, name in enumerate(("teacher", "other_teacher")):
        torch.manual_seed(i)
        tokenizer = open_gates(FlowMo(Config.from_dict(TINY))).eval()
        save(tokenizer, names[name])
        if name == "teacher":
            tokenize(tokenizer, open_source(names["pictures"]), names["tokens"], model="tiny")
    with stand_ins():
        config = settings_of(made, "trainer.checkpoint_every=1 step", "trainer.duration=2 steps", "model.ema_decay=0.1")
        for name, seed in (("run", 1), ("other_run", 2)):
            Trainer(config.override(f"trainer.seed={seed}"), names[name], report=lambda line: None).train()
    made.start = names["run"] / "checkpoints" / "00000002.pth"
    return made


def settings_of(workspace, *settings):
    return Config.from_dict(TINY).override(*(s.format(**workspace.names) for s in (*BASE, *settings)))


def test_every_setting_has_a_row():
    assert CASES.keys().isdisjoint(ELSEWHERE)
    assert CASES.keys() | ELSEWHERE.keys() == set(FIELDS)


@pytest.mark.parametrize("name", CASES)
def test_a_setting_changes_what_it_says(name, workspace):
    value, quantity, *context = CASES[name]
    found = []
    with stand_ins():
        for settings in ((*context,), (*context, f"{name}={value}")):
            config = settings_of(workspace, *settings)
            key = quantity, config.to_json()
            if key not in workspace.known:
                workspace.known[key] = quantity(config, workspace)
            found.append(workspace.known[key])
    assert found[0] != found[1]


def test_quantities_are_the_same_for_the_same_settings(workspace):
    """Or a difference would say nothing of a setting."""
    with stand_ins():
        for quantity in (weights, ema, fresh, function, draws, files, metrics, products, ids):
            context = GENERATOR if quantity is ids else ()
            config = settings_of(workspace, *context)
            assert quantity(config, workspace) == quantity(config, workspace), quantity.__name__
        distilled = settings_of(workspace, *DISTILL, *LPIPS)
        assert weights(distilled, workspace) == weights(distilled, workspace)
        followed_twice = [followed(settings_of(workspace, *FOLLOW), workspace) for _ in range(2)]
        assert followed_twice[0] == followed_twice[1]
