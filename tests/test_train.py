import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import open_gates
from torch.utils._python_dispatch import TorchDispatchMode

from flowmo import Config, FlowMo, load
from flowmo.checkpoint import CheckpointError, CheckpointReadError, reading_error
from flowmo.checkpoint import files as checkpoint
from flowmo.config import ConfigError
from flowmo.data import DataError, ImageDataset, batches, epoch_order, open_source
from flowmo.distributed import World
from flowmo.evaluate.metrics.pairs import psnr
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.stages import posttrain_loss, pretrain_loss
from flowmo.train.ema import EMA
from flowmo.train.muon import Muon, orthogonalize
from flowmo.train.optimizer import NormControl, build_optimizers
from flowmo.train.schedule import Schedule
from flowmo.train.task import autocast, lpips_dtype
from flowmo.train.trainer import Trainer, TrainingError


def quiet(_):
    pass


@pytest.fixture
def folder(tmp_path, picture_files):
    """Four real photographs."""
    target = tmp_path / "pictures"
    (target / "sub").mkdir(parents=True)
    for file in picture_files[:4]:
        shutil.copy(file, target / "sub")
    return target


@pytest.fixture
def config(tiny_config, folder):
    return tiny_config.override(
        f"data.train={folder}",
        "data.global_batch_size=4",
        "data.num_workers=0",
        "opt.lpips_weight=0",
        "opt.mup_base_width=0",
        "trainer.max_steps=6",
        "trainer.log_every=2",
        "trainer.sample_every=0",
        "trainer.checkpoint_every=3",
        "trainer.enable_bfloat16=false",
    )


@pytest.mark.parametrize("kind", ["lfq", "bsq", "fsq", "vq", "kl", "layernorm", "noop"])
def test_every_row_of_every_parameter_gets_a_gradient(tiny_config, images, kind):
    tokenizer = open_gates(FlowMo(tiny_config.override(f"model.quantization_type={kind}")))
    draws = TrainingNoise.of(tokenizer.config, images, range(5))._replace(cfg_keep=torch.ones(5, dtype=torch.bool))
    pretrain_loss(tokenizer, images, draws, tokenizer.config.opt, None).loss.backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        rows = parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad[:, None]
        assert rows.abs().sum(dim=1).gt(0).all(), f"{name} has rows without a gradient"


def test_the_log_is_in_float32(tiny_config, images):
    """A sum of bfloat16 numbers stops growing after some dozens of steps."""
    tokenizer = FlowMo(tiny_config)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pretrain_loss(
            tokenizer, images, TrainingNoise.of(tokenizer.config, images, range(5)), tokenizer.config.opt, half_distance
        )
    assert {name: value.dtype for name, value in loss.parts.items() if value.dtype != torch.float32} == {}
    assert abs(loss.parts["lpips"] - 0.123456) < 1e-3


@pytest.mark.parametrize("kind", ["lfq", "bsq", "vq", "kl"])
def test_the_logged_terms_add_up_to_the_loss(kind, tiny_config, images):
    """Each with its weight, the commitment among them; the same without its weight has another name."""
    config = tiny_config.override(
        f"model.quantization_type={kind}", "model.commit_loss_weight=0.03", "model.vq_commit_weight=0.03"
    )
    torch.manual_seed(0)
    tokenizer = FlowMo(config)
    parts = pretrain_loss(
        tokenizer, images, TrainingNoise.of(config, images, range(5)), tokenizer.config.opt, half_distance
    ).parts
    terms = [parts[name] for name in ("flow", "entropy", "commitment", "kl") if name in parts]
    assert float(parts["loss"]) == pytest.approx(float(sum(terms)) + 0.1 * float(parts["lpips"]), rel=1e-5)
    if kind == "lfq":
        code = tokenizer.encoder(images).detach()
        error = (code - torch.where(code > 0, 1.0, -1.0)).square().mean()
        assert float(parts["commitment"]) == pytest.approx(0.03 * float(error), rel=1e-5)
        assert float(parts["unweighted_commitment"]) == pytest.approx(float(error), rel=1e-5)


@pytest.mark.parametrize(("can", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_used_only_where_the_device_multiplies_it(can, dtype, tiny_config, monkeypatch):
    monkeypatch.setattr("flowmo.train.task.multiplies_bfloat16", lambda device: can)
    square = torch.eye(2)
    with autocast(tiny_config, torch.device("cpu")):
        assert (square @ square).dtype == dtype
    with autocast(tiny_config.override("trainer.enable_bfloat16=false"), torch.device("cpu")):
        assert (square @ square).dtype == torch.float32
    assert lpips_dtype(tiny_config.override("opt.lpips_bfloat16=true"), torch.device("cpu")) == dtype
    assert lpips_dtype(tiny_config, torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(("loss", "stage"), [(pretrain_loss, "false"), (posttrain_loss, "true")])
def test_the_perceptual_loss_sees_both_pictures_cut_alike(loss, stage, tiny_config, images):
    stage = (f"model.posttrain_sample={stage}", "model.posttrain_sample_k=1")
    config = tiny_config.override("opt.lpips_jitter=5", *stage)
    tokenizer, seen = FlowMo(config), []

    def distance(x, y):
        seen.append((x, y))
        return (x - y).square().mean(dim=(1, 2, 3))

    draws = TrainingNoise.of(config, images, range(5))
    for start, chunk in ((0, images[:2]), (2, images[2:])):
        noise = TrainingNoise.of(config, chunk, range(start, start + len(chunk)))
        loss(tokenizer, chunk, noise, tokenizer.config.opt, distance)
    corners = [(rows.start, columns.start) for rows, columns in draws.crops]
    assert len(set(corners)) > 1
    cut = torch.cat([x for x, _ in seen])
    assert cut.shape == torch.cat([y for _, y in seen]).shape == (5, 3, 27, 27)
    for image, part, (row, column) in zip(images, cut, corners, strict=True):
        assert torch.equal(image[:, row : row + 27, column : column + 27], part)
    plain = TrainingNoise.of(tiny_config.override(*stage), images, range(5))
    assert plain.crops is None
    assert torch.equal(plain.noise, draws.noise)
    assert torch.equal(plain.t, draws.t)


def half_distance(x, y):
    return torch.full((len(x),), 0.123456, dtype=torch.bfloat16)


def test_overfits_four_photographs(tiny_config, folder, tmp_path):
    """The whole of stage 1A: from files on disk through training to a sample from pure noise above 18 dB."""
    config = tiny_config.override(
        f"data.train={folder}",
        "data.global_batch_size=4",
        "data.num_workers=0",
        "data.random_crop=false",
        "model.hidden_size=128",
        "model.num_heads=2",
        "model.enc_hidden_size=64",
        "model.dec_depth=2",
        "model.initial_gate=1",
        "model.prediction=image",
        "model.ema_decay=0.66",
        "opt.loss_space=image",
        "opt.anchor=0.75",
        "opt.optimizer=muon",
        "opt.lr=3e-3",
        "opt.mup_base_width=0",
        "opt.warmup=20 steps",
        "opt.cooldown=0.5",
        "opt.lpips_weight=0",
        "trainer.max_steps=240",
        "trainer.log_every=100",
        "trainer.sample_every=0",
        "trainer.checkpoint_every=240",
        "trainer.enable_bfloat16=false",
    )
    run = Trainer(config, tmp_path / "run", report=quiet)
    run.train()
    tokenizer = load(run.checkpoints()[-1])
    source = ImageDataset(open_source(folder), 32)
    x = torch.stack([source[i, 0] for i in range(4)])
    codes = tokenizer.encode(x)
    quality = psnr(x, tokenizer.decode(codes.ids, seed=5))
    assert quality.mean() > 18, quality  # 19.2 to 22.7 dB for three seeds
    wrong = psnr(x, tokenizer.decode(codes.ids.roll(1, 0), seed=5))
    assert wrong.mean() < quality.mean() - 5, "the picture must come from the code"


def final_weights(run):
    content = checkpoint.read_pth(run.checkpoints()[-1])
    return {**content["model"], **{f"ema.{k}": v for k, v in content["ema"].items()}}


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_resumed_run_ends_like_an_unbroken_one(config, tmp_path, optimizer):
    config = config.override(f"opt.optimizer={optimizer}")
    whole = Trainer(config, tmp_path / "whole", report=quiet)
    whole.train()
    Trainer(config.override("trainer.max_steps=3"), tmp_path / "broken", report=quiet).train()
    rest = Trainer(config, tmp_path / "broken", report=quiet)
    assert rest.step == 3
    rest.train()
    expected = final_weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(rest).items())


def test_what_a_run_leaves(config, tmp_path, plots):
    pytest.importorskip("matplotlib")
    config = config.override("trainer.sample_every=3", "trainer.max_steps=9")
    run = Trainer(config, tmp_path / "run", report=quiet)
    (run.folder / "config.json").write_text("{}")
    with (run.folder / "config.json").open() as earlier:
        run.train()
        assert earlier.read() == "{}", "who reads it meanwhile sees a whole file"
    names = sorted(str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file())
    assert [name for name in names if not name.startswith("tensorboard/")] == [
        "checkpoints/00000006.pth",
        "checkpoints/00000009.pth",
        "config.json",
        "curves.png",
        "ended",
        "lock",
        "metrics.jsonl",
        "progress.png",
        "samples/00000003.png",
        "samples/00000006.png",
        "samples/00000009.png",
    ]
    assert (run.folder / "curves.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert {"flow", "entropy", "commitment", "images_per_second"} <= lines[0].keys()
    assert Config.from_dict(json.loads((run.folder / "config.json").read_text())) == config
    assert load(run.folder).identity() == load(run.folder / "checkpoints" / "00000009.pth").identity()


def test_weights_move_and_norms_stay(config, tmp_path):
    run = Trainer(config, tmp_path / "run", report=quiet)
    before = {name: p.detach().clone() for name, p in run.task.model.named_parameters()}
    run.train()
    after = dict(run.task.model.named_parameters())
    assert sum(not torch.equal(before[name], after[name]) for name in before) > 0.9 * len(before)
    for name, weight in run.norm_control.weights.items():
        torch.testing.assert_close(weight.norm(), before[name].norm(), rtol=1e-5, atol=0)


def test_frozen_encoder_stays(config, tmp_path):
    run = Trainer(config.override("opt.freeze_encoder_after=2 steps"), tmp_path / "run", report=quiet)
    seen = []
    for images in (next(batches(run.task.source, 4, 0, 0, 0)) for _ in range(4)):
        if run.images >= run.schedule.freeze_encoder_after:
            run.task.freeze_encoder()
        run._step(images, run.module)
        seen.append(run.task.model.encoder.code_out.weight.detach().clone())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[3])


def test_other_settings_in_the_same_folder_are_refused(config, tmp_path):
    Trainer(config, tmp_path / "run", report=quiet).train()
    with pytest.raises(TrainingError, match=r"model\.code_length 6 -> 7"):
        Trainer(config.override("model.code_length=7"), tmp_path / "run", report=quiet)


def test_losses_that_stay_not_finite_stop_the_run(config, tmp_path):
    run = Trainer(config.override("trainer.max_skipped_steps=3"), tmp_path / "run", report=quiet)
    with torch.no_grad():
        run.task.model.decoder.picture_out.bias[0] = torch.nan
    with pytest.raises(TrainingError, match=r"3 steps in a row .* lower opt\.lr"):
        run.train()
    assert not run.checkpoints()


def adam_state(run: Trainer) -> dict[str, torch.Tensor]:
    state = {p: s for one in run.optimizers for p, s in one.state.items()}
    return {f"{i}.{key}": value for i, part in enumerate(state.values()) for key, value in part.items()}


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host: what makes a GPU's queue run empty."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name()
        reads = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "bincount", "masked_select", "unique")
        masked = name == "aten::index.Tensor" and any(i is not None and i.dtype == torch.bool for i in arguments[1])
        if masked or name.removeprefix("aten::").split(".")[0] in reads:
            self.found.append(name)
        return function(*arguments, **(options or {}))

    def __enter__(self):
        self.tolist = torch.Tensor.tolist  # reads without an operator
        torch.Tensor.tolist = lambda tensor: self.found.append("tolist") or self.tolist(tensor)
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        super().__exit__(*error)


@pytest.mark.parametrize(
    ("stage", "optimizer", "quantizer"),
    [
        ("pretrain", "adam", "lfq"),
        ("pretrain", "muon", "lfq"),
        ("pretrain", "adam", "vq"),
        ("posttrain", "adam", "lfq"),
        ("posttrain", "muon", "lfq"),
    ],
)
def test_a_step_asks_the_host_for_nothing(config, tmp_path, stage, optimizer, quantizer, monkeypatch):
    """The random numbers of a step are drawn on the CPU beforehand; everything after them stays on the device."""
    config = config.override(
        f"model.posttrain_sample={str(stage == 'posttrain').lower()}",
        f"opt.optimizer={optimizer}",
        f"model.quantization_type={quantizer}",
    )
    run = Trainer(config, tmp_path / "run", report=quiet)
    images = next(batches(run.task.source, 4, 0, 0, 0))
    draw, reads = TrainingNoise.of, HostReads()
    prepared = draw(config, images, range(4))
    monkeypatch.setattr(TrainingNoise, "of", lambda *_: prepared)
    run._step(images, run.module)
    with reads:
        run._step(images, run.module)
    assert not reads.found
    with reads:
        run._check_skipped(0)
    assert reads.found  # the log does


@pytest.mark.parametrize("part", ["loss", "gradient"])
@pytest.mark.parametrize(
    "settings",
    [("opt.optimizer=adam",), ("opt.optimizer=muon",), ("model.quantization_type=vq", "model.vq_entries=16")],
)
def test_a_step_that_is_not_finite_changes_nothing(config, tmp_path, part, settings):
    lines = []
    config = config.override(*settings)
    run = Trainer(config, tmp_path / "run", report=lines.append)
    images = next(batches(run.task.source, 4, 0, 0, 0))

    def broken(*arguments):
        loss = run.module(*arguments)
        if part == "loss":
            return loss._replace(
                loss=loss.loss * torch.nan, parts={**loss.parts, "loss": loss.loss.detach() * torch.nan}
            )
        run.task.model.decoder.picture_out.bias.register_hook(lambda g: g * torch.inf)
        return loss

    run._step(images, run.module)
    before = {name: value.clone() for name, value in run.task.model.state_dict().items()}
    average = {name: value.clone() for name, value in run.ema.state.items()}
    optimizer = {name: value.clone() for name, value in adam_state(run).items()}
    assert run._step(images, broken)["finite"] == 0
    assert (run.step, run.skipped.read()) == (2, (1, 1))
    run._check_skipped(0)
    assert lines[-1] == "1 step up to step 2 skipped: loss or gradient is not finite"
    assert all(torch.equal(value, optimizer[name]) for name, value in adam_state(run).items())
    assert all(torch.equal(value, before[name]) for name, value in run.task.model.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in run.ema.state.items())


def test_checkpoints_that_are_kept(config, tmp_path):
    config = config.override(
        "trainer.checkpoint_every=1", "trainer.keep_every=2", "trainer.keep_last=1", "trainer.max_steps=5"
    )
    run = Trainer(config, tmp_path / "run", report=quiet)
    run.train()
    assert [int(path.stem) for path in run.checkpoints()] == [2, 4, 5]


@pytest.mark.parametrize(("batch", "every", "keep"), [(64, 100, 150), (8, 24, 48), (16, 10, 40), (32, 100, 250)])
def test_the_first_checkpoint_of_each_period_is_kept(config, tmp_path, monkeypatch, batch, every, keep):
    """Against a count, for periods that batches do not divide."""
    config = config.override(
        f"data.global_batch_size={batch}",
        f"trainer.checkpoint_every={every} images",
        f"trainer.keep_every={keep} images",
    )
    run = Trainer(config.override("trainer.duration=4000 images"), tmp_path / "run", report=quiet)
    monkeypatch.setattr("flowmo.train.state.save", lambda *_: None)
    steps = [step for step in range(1, 4000 // batch) if run.schedule.is_due(run.schedule.checkpoint, step * batch)]
    for step in steps:
        run.step, run.images = step, step * batch
        run.save()
    images = [step * batch for step in steps]
    first = [next(n for n in images if n >= multiple) for multiple in range(keep, images[-1] + 1, keep)]
    assert [step * batch for step in run.kept_steps] == sorted({*first})


def test_another_batch_keeps_the_checkpoints_that_were_kept(config, tmp_path):
    config = config.override(
        *("trainer.checkpoint_every=4 images", "trainer.keep_every=8 images", "trainer.keep_last=1"),
        "trainer.max_steps=3",
    )
    Trainer(config, tmp_path / "run", report=quiet).train()
    more = config.override("data.global_batch_size=2", "trainer.duration=20 images")
    run = Trainer(more, tmp_path / "run", report=quiet)
    run.train()
    assert [int(path.stem) for path in run.checkpoints()] == [2, 5, 7], "after 8, 16 and 20 images"


def test_a_run_that_started_elsewhere_is_not_resumed(config, tmp_path):
    """The weights that the command names would be ignored."""
    Trainer(config, tmp_path / "first", report=quiet).train()
    start = min((tmp_path / "first" / "checkpoints").glob("*.pth"))
    words = config.override("trainer.max_steps=8")
    Trainer(words, tmp_path / "run", resume_from=start, report=quiet).train()
    assert Trainer(words, tmp_path / "run", resume_from=start, report=quiet).step == 8
    assert Trainer(words, tmp_path / "run", report=quiet).step == 8
    elsewhere = start.parent / ".." / "checkpoints" / start.name
    assert Trainer(words, tmp_path / "run", resume_from=elsewhere, report=quiet).step == 8, "the same file"
    with pytest.raises(TrainingError, match=r"started from .*, not from nano\. Use another --experiment-name"):
        Trainer(words, tmp_path / "run", resume_from="nano", report=quiet)
    lines = []
    Trainer(config, tmp_path / "first", resume_from=start, report=lines.append)
    assert any("is not used: this run began without it" in line for line in lines)


def test_other_images_and_another_batch_are_reported_at_a_resume(config, folder, tmp_path, picture_files):
    Trainer(config.override("trainer.max_steps=1"), tmp_path / "run", report=quiet).train()
    shutil.copy(picture_files[0], folder / "new.jpg")
    lines = []
    Trainer(config.override("data.global_batch_size=2"), tmp_path / "run", report=lines.append)
    assert any(line.startswith("the training set has other files than at the checkpoint") for line in lines)
    assert "the batch differs from the checkpoint's: 4 -> 2 images" in lines


def test_a_moved_training_set_or_an_older_checkpoint_is_reported_in_nothing(config, folder, tmp_path):
    Trainer(config.override("trainer.max_steps=1"), tmp_path / "run", report=quiet).train()
    (path,) = (tmp_path / "run" / "checkpoints").glob("*.pth")
    shutil.copytree(folder, tmp_path / "moved")

    def differences(config):
        lines = []
        Trainer(config, tmp_path / "run", report=lines.append)
        return [line for line in lines if "than at the checkpoint" in line or line.startswith("the batch differs")]

    assert not differences(config.override(f"data.train={tmp_path / 'moved'}"))
    content = torch.load(path, weights_only=True)
    del content["source"], content["batch"]  # as before they were recorded
    torch.save(content, path)
    assert not differences(config.override("data.global_batch_size=2"))


def test_ranks_with_other_images_do_not_start(config, tmp_path, monkeypatch):
    monkeypatch.setattr(World, "gather", lambda self, value: [value, "another"] if isinstance(value, str) else [value])
    with pytest.raises(TrainingError, match=r"Process 1 finds other files in .*pictures than process 0"):
        Trainer(config, tmp_path / "run", report=quiet)


@pytest.mark.parametrize(
    ("error", "damaged"),
    [
        *((PermissionError(errno.EACCES, "no"), False), (OSError(errno.EIO, "no"), False), (MemoryError("no"), False)),
        *((FileNotFoundError(errno.ENOENT, "no"), True), (OSError(errno.EINVAL, "no"), True), (OSError("no"), True)),
    ],
)
def test_a_reading_error_blames_the_file_or_the_system(error, damaged):
    found = reading_error("a.pth", error, "damaged")
    assert isinstance(found, CheckpointReadError) == (not damaged)
    assert str(found).startswith("a.pth is damaged (" if damaged else "a.pth cannot be read (")


def test_a_checkpoint_that_the_system_cannot_read_is_not_called_damaged(config, tmp_path, monkeypatch):
    Trainer(config, tmp_path / "run", report=quiet).train()

    def broken(*arguments, **settings):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "load", broken)
    with pytest.raises(CheckpointError, match=r"cannot be read \(.*Input/output error\)\.$"):
        Trainer(config, tmp_path / "run", report=quiet)


def test_a_stop_file_made_while_a_run_starts_ends_it(config, tmp_path):
    run = Trainer(config, tmp_path / "run", report=quiet)
    (tmp_path / "run" / "stop").touch()
    run.train()
    assert run.step == 1


def test_the_logged_learning_rate_is_that_of_the_step(config, tmp_path, monkeypatch):
    """At the end of a cooldown the last step does not have the final rate yet."""
    used = []
    monkeypatch.setattr("flowmo.train.trainer.set_learning_rate", lambda _, rate: used.append(rate))
    words = config.override("opt.cooldown=0.7", "opt.final_lr=0", "trainer.log_every=1")
    Trainer(words, tmp_path / "run", report=quiet).train()
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    logged = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert len(set(logged)) > 3
    assert logged == used


def test_another_optimizer_does_not_resume(config, tmp_path):
    """The advice is to write the former one, not to delete the checkpoint."""
    config = config.override("trainer.max_steps=1")
    Trainer(config, tmp_path / "run", report=quiet).train()
    with pytest.raises(TrainingError, match=r"has another optimizer's state\. Write opt\.optimizer=adam\."):
        Trainer(config.override("opt.optimizer=muon"), tmp_path / "run", report=quiet)


def stop_by_a_process(command):
    """Run a training command, signal its whole group as a scheduler does at step 2, and return its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment
    ) as process:
        for line in process.stdout:
            if line.startswith("step 2 "):
                os.killpg(process.pid, signal.SIGTERM)
                break
        rest = process.stdout.read()
    assert process.returncode == 0, rest
    return rest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(config, tmp_path, number):
    """SIGTERM reaches a real process with a loading worker, SIGINT this one."""
    fixed = "data.max_microbatch=4"  # or the process would forecast it
    says_step_2 = "trainer.log_every=100000", "trainer.sample_every=2"  # a log line would forecast the FLOPs
    config = config.override("data.num_workers=1", *says_step_2, "trainer.max_steps=100000", fixed)
    folder = tmp_path / "run" / "checkpoints"
    if number == signal.SIGTERM:
        settings = tmp_path / "settings.yaml"
        settings.write_text(config.to_json())
        command = [sys.executable, "-u", "-m", "flowmo.train", "--config", settings, "--experiment-name", "run"]
        printed = stop_by_a_process([*command, "--results-dir", tmp_path, "--device", "cpu"])
    else:
        lines = []

        def report(line):
            lines.append(line)
            if line.startswith("step 2 "):
                signal.raise_signal(number)

        Trainer(config.override("data.num_workers=0"), tmp_path / "run", report=report).train()
        printed = "\n".join(lines)
    assert "Run the same command again to resume" in printed
    stopped = int(sorted(folder.glob("*.pth"))[-1].stem)
    assert 2 <= stopped < 100000
    resumed = config.override("data.num_workers=0", f"trainer.max_steps={stopped + 1}")
    for name in ("run", "unbroken"):
        Trainer(resumed, tmp_path / name, report=quiet).train()
    ours, theirs = (
        checkpoint.read_pth(tmp_path / name / "checkpoints" / f"{stopped + 1:08d}.pth") for name in ("run", "unbroken")
    )
    for part in ("model", "ema"):
        assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items())


def test_ranks_take_equally_many_microbatches(config, tmp_path, monkeypatch):
    """Another rank has memory for one image, this one for all."""
    monkeypatch.setattr(World, "gather", lambda self, value: [value, 1 if isinstance(value, int) else value])
    run = Trainer(config.override("data.max_microbatch=0"), tmp_path, report=quiet)
    assert (run.plan.microbatch, run.plan.accumulation_steps) == (1, 4)
    monkeypatch.undo()
    assert Trainer(run.config, tmp_path / "alone", report=quiet).plan.microbatch == 4


def test_learning_rate():
    config = Config().override("opt.lr=1", "opt.warmup=10 steps", "opt.cooldown=0.5", "trainer.max_steps=100")
    times = Schedule.of(config, batch=3, epoch=7)
    rates = [times.learning_rate(config.opt, 3 * step) for step in (0, 4, 9, 50, 75, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0.02])
    plain = Schedule.of(Config(), 128, 1000)
    assert plain.learning_rate(Config().opt, 10**8) == Config().opt.lr


def test_average_forgets_the_start(tiny_config):
    tokenizer = FlowMo(tiny_config.override("model.ema_decay=0.9"))
    average = EMA(tokenizer, batch=128)
    start = average.state["encoder.code_embedding"].clone()
    with torch.no_grad():
        tokenizer.encoder.code_embedding.add_(1)
    average.update(step=0)
    torch.testing.assert_close(average.state["encoder.code_embedding"], start + 0.9)
    average.update(step=1000)
    torch.testing.assert_close(average.state["encoder.code_embedding"], start + 0.91)


def test_average_decays_alike_at_every_batch(tiny_config):
    tokenizer = FlowMo(tiny_config)
    late = 10**6
    for batch in (16, 128, 512):
        kept = 1 - EMA(tokenizer, batch).weight(late)
        assert kept ** (512 / batch) == pytest.approx(0.9999**4)
        early = 1 - EMA(tokenizer, batch).weight(10 * 512 // batch)  # after 5 120 images, 40 steps of the paper
        assert early ** (512 / batch) == pytest.approx((41 / 50) ** 4)


def test_average_of_the_release(tiny_config):
    average = EMA(FlowMo(tiny_config.override("model.ema_update=release")), batch=128)
    assert [average.weight(step) for step in range(1, 10)] == [0] * 9
    assert average.weight(0) == average.weight(10) == pytest.approx(1 - 0.9999**10)


def test_norm_control_covers_every_matrix_of_the_blocks(tiny_config):
    tokenizer = FlowMo(tiny_config)
    matrices = {n for n, p in tokenizer.named_parameters() if ".blocks." in n and p.ndim == 2}
    assert NormControl(tokenizer.networks).weights.keys() == matrices


def test_muon_takes_the_matrices_that_tokens_meet_in_blocks(tiny_config):
    tokenizer = FlowMo(tiny_config.override("opt.optimizer=muon", "opt.lr=1e-3"))
    adam, muon = build_optimizers(tokenizer)
    names = {id(p): name for name, p in tokenizer.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    others = {names[id(p)] for group in adam.param_groups for p in group["params"]}
    assert taken.isdisjoint(others)
    assert len(taken) + len(others) == len(names)
    assert {name.rsplit(".", 2)[1] for name in taken} == {"qkv", "kv", "proj", "mlp_in", "mlp_out"}
    assert muon.param_groups[0]["scale"] == pytest.approx(20)


def test_muon_steps_are_of_one_size_in_every_direction(tiny_config):
    """What sets it apart: the change of a matrix has singular values near 1, whatever those of its gradient."""
    tokenizer = FlowMo(tiny_config.override("opt.optimizer=muon"))
    (_, muon), weight = build_optimizers(tokenizer), tokenizer.decoder.blocks[0].picture.proj.weight
    before = weight.detach().clone()
    for parameter in tokenizer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 64)
    muon.step()
    singular = torch.linalg.svdvals((before - weight.detach()) / 0.02)
    assert torch.linalg.cond(weight.grad) > 100
    assert singular.max() / singular.quantile(0.25) < 3


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_muon_orthogonalizes_by_its_polynomial(shape):
    """Five times 3.4445 s − 4.7750 s³ + 2.0315 s⁵ on the singular values, here by an SVD in float64."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert torch.allclose(orthogonalize(matrix).double(), left @ values.diag() @ right, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has a Muon since 2.9")
def test_muon_takes_the_steps_of_pytorchs(monkeypatch):
    """Where the device multiplies in bfloat16, to the bit; in float32 nearly."""
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in ((24, 64), (64, 24))]
    gradients = [[torch.randn(matrix.shape, generator=draw) for matrix in start] for _ in range(3)]

    def trained(build):
        weights = [torch.nn.Parameter(matrix.clone()) for matrix in start]
        optimizer = build(weights, lr=0.02, weight_decay=0.1)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
        return [weight.detach() for weight in weights]

    expected = trained(torch.optim.Muon)
    for bfloat16, tolerance in ((True, 0.0), (False, 2e-3)):
        monkeypatch.setattr("flowmo.train.muon.multiplies_bfloat16", lambda device, can=bfloat16: can)
        for mine, theirs in zip(trained(Muon), expected, strict=True):
            assert torch.allclose(mine, theirs, rtol=0, atol=tolerance)
    in_float32 = trained(Muon)
    monkeypatch.setattr("flowmo.train.muon.multiplies_bfloat16", lambda device: True)
    asked = trained(partial(Muon, bfloat16=False))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(asked, in_float32, strict=True))


def test_muon_needs_whole_matrices(tiny_config):
    with pytest.raises(ConfigError, match=r"trainer\.parallel=ddp"):
        tiny_config.override("opt.optimizer=muon", "trainer.parallel=fsdp")


def test_optimizer_is_the_papers(tiny_config):
    group = build_optimizers(FlowMo(tiny_config))[0].param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.9, 0.95), 0)


# Data


def test_every_picture_once_an_epoch():
    orders = [epoch_order(50, seed=1, epoch=e) for e in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] == epoch_order(50, seed=1, epoch=0)
    assert orders[0] != epoch_order(50, seed=2, epoch=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_continues_anywhere(folder, workers):
    source = ImageDataset(open_source(folder), 32, random_crop=True, random_flip=True)
    whole = batches(source, 2, seed=0, start=0, workers=workers)
    first = [next(whole) for _ in range(5)]
    later = batches(source, 2, seed=0, start=6, workers=0)
    assert torch.equal(next(later), first[3])
    assert torch.equal(next(later), first[4])


def test_processes_share_each_batch_without_overlap(folder):
    source = ImageDataset(open_source(folder), 32, random_crop=True)
    whole = batches(source, 6, seed=0, start=0, workers=0)
    parts = [batches(source, 2, seed=0, start=2 * rank, workers=0, global_batch=6) for rank in range(3)]
    for _ in range(3):
        assert torch.equal(next(whole), torch.cat([next(part) for part in parts]))


def test_crops_and_flips_follow_the_seed(folder):
    source = ImageDataset(open_source(folder), 32, random_crop=True, random_flip=True)
    views = torch.stack([source[0, seed] for seed in range(40)])
    assert torch.equal(views[7], source[0, 7])
    assert len({view.numpy().tobytes() for view in views}) > 20
    assert views.shape[1:] == (3, 32, 32)
    assert views.abs().max() <= 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_named_and_left_out(config, folder, tmp_path, workers):
    (folder / "text.jpg").write_text("this is no picture")
    lines = []
    config = config.override(f"data.num_workers={workers}", "trainer.max_steps=4")
    Trainer(config, tmp_path / "run", report=lines.append).train()
    assert sum("left out" in line and "text.jpg" in line for line in lines) == 1
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["unreadable_images"] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_pictures_end_the_run(config, folder, tmp_path, workers):
    for i in range(3):
        (folder / f"text{i}.jpg").write_text("this is no picture")
    run = Trainer(config.override(f"data.num_workers={workers}"), tmp_path / "run", report=quiet)
    with pytest.raises(TrainingError, match="of 7 images cannot be read") as error:
        run.train()
    assert "Traceback" not in str(error.value)
    assert multiprocessing.active_children() == []  # or Python would wait for them for ever when it ends


def test_ranks_count_unreadable_pictures_together(config, folder, tmp_path, monkeypatch):
    """Another rank has met two of the seven that this one has not."""
    gather = World.gather

    def with_another(self, value):
        return [value, {"b.jpg", "c.jpg"}] if isinstance(value, set) else gather(self, value)

    monkeypatch.setattr(World, "gather", with_another)
    run = Trainer(config.override("trainer.log_every=1 step"), tmp_path / "run", report=quiet)
    with pytest.raises(TrainingError, match=r"2 of 4 images cannot be read so far.* One is b\.jpg"):
        run.train()


def test_a_results_folder_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        Trainer(config, tmp_path / "file" / "run", report=quiet)


def test_nothing_readable_at_all(config, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "text.jpg").write_text("this is no picture")
    with pytest.raises(DataError, match=r"in a row cannot be read.*text\.jpg"):
        Trainer(config.override(f"data.train={folder}"), tmp_path / "run", report=quiet)
