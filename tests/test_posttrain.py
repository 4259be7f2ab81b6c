"""Stage 1B: the chain of random steps, its gradients and its memory, and the command that trains it."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import WEIGHTS, open_gates
from test_checkpoint import release_file

import flowmo
from flowmo import ConfigError, FlowMo, load
from flowmo.checkpoint import CheckpointError
from flowmo.checkpoint import files as checkpoint
from flowmo.checkpoint.run_folder import BEST
from flowmo.data import evenly_spread, open_source
from flowmo.evaluate.metrics.features import Features
from flowmo.evaluate.reconstruction import FlowMoReconstructor, Reconstruction, read_crops
from flowmo.losses.noise import Chain, TrainingNoise
from flowmo.losses.stages import posttrain_loss, sample_chain
from flowmo.model import flow
from flowmo.train.early_stopping import EarlyStopping
from flowmo.train.start_checks import check_start
from flowmo.train.trainer import Trainer, TrainingError


def quiet(_):
    pass


def squared_distance(x, y):
    return (x - y).square().mean(dim=(1, 2, 3))


@pytest.fixture
def posttrained(tiny_config):
    return tiny_config.override("model.posttrain_sample=true", "model.posttrain_sample_k=3", "opt.lpips_weight=0.01")


def test_the_chain_is_the_sampler(tiny, images):
    """With its steps all equal, the chain draws what the linear sampler without guidance draws."""
    codes = tiny.encode(images)
    noise = torch.stack([torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    code = tiny.quantizer.code_from_ids(codes.ids)
    chain = Chain(noise, flow.random_steps(torch.ones(5, 4)), torch.ones(5, 4, dtype=torch.bool))
    drawn = sample_chain(tiny, code, chain)
    from flowmo.model.sampler import euler

    def velocity(x, t):
        return tiny.decoder(x, tiny.decoder.embed_code(code), torch.tensor([t]))

    torch.testing.assert_close(drawn, euler(velocity, noise, [1, 0.75, 0.5, 0.25, 0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance_drop", [False, True])
def test_recomputed_gradients_equal_kept_ones(posttrained, images, guidance_drop, monkeypatch):
    config = posttrained.override(f"model.posttrain_sample_enable_cfg={guidance_drop}".lower())
    tokenizer = open_gates(FlowMo(config))
    draws = TrainingNoise.of(config, images, range(5))
    assert draws.chain.cfg_keep.all() or guidance_drop
    code = tokenizer.quantizer.quantize(tokenizer.encoder(images))[0].detach()
    gradients = []
    for recompute in (True, False):
        if not recompute:
            monkeypatch.setattr("flowmo.losses.stages.checkpoint", lambda step, *inputs, **_: step(*inputs))
        tokenizer.zero_grad()
        squared_distance(images, sample_chain(tokenizer, code, draws.chain)).mean().backward()
        gradients.append({name: p.grad.clone() for name, p in tokenizer.decoder.named_parameters()})
    assert all(value.abs().sum() > 0 for name, value in gradients[0].items() if "key_norm" not in name)
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-5, atol=1e-8, msg=name)


def test_the_loss_is_its_parts(posttrained, images):
    tokenizer = open_gates(FlowMo(posttrained))
    draws = TrainingNoise.of(posttrained, images, range(5))
    loss = posttrain_loss(tokenizer, images, draws, tokenizer.config.opt, squared_distance)
    loss.loss.backward()
    parts = loss.parts
    assert parts["codebook_entropy"] > 0
    with torch.no_grad():
        quantized = tokenizer.quantizer(tokenizer.encoder(images))
        drawn = sample_chain(tokenizer, quantized.code, draws.chain)
    distance = squared_distance(images, drawn).mean()
    torch.testing.assert_close(parts["sample_distance"], distance)
    expected = parts["flow"] + 0.01 * distance  # the bottleneck's losses train nothing here
    torch.testing.assert_close(loss.loss.detach(), expected)
    assert all(p.grad is None for p in tokenizer.encoder.parameters())
    assert all(p.grad is not None for p in tokenizer.decoder.parameters())


@pytest.mark.parametrize("kind", ["layernorm", "kl"])
def test_the_code_of_a_frozen_encoder_has_no_noise(posttrained, images, kind):
    """Inference has none, so the chain must learn from codes without."""
    tokenizer = open_gates(FlowMo(posttrained.override(f"model.quantization_type={kind}")))
    noise = TrainingNoise.of(tokenizer.config, images, range(5))
    first, second = (
        posttrain_loss(tokenizer, images, noise, tokenizer.config.opt, squared_distance).parts for _ in range(2)
    )
    assert first == second
    with torch.no_grad():
        sample = sample_chain(tokenizer, tokenizer.quantizer.quantize(tokenizer.encoder(images))[0], noise.chain)
    torch.testing.assert_close(first["sample_distance"], squared_distance(images, sample).mean())


def test_dropped_steps_do_not_see_the_code(posttrained, images):
    tokenizer = open_gates(FlowMo(posttrained))
    chain = TrainingNoise.of(posttrained, images, range(5)).chain
    codes = [torch.ones(5, 6, 8), -torch.ones(5, 6, 8)]
    blind = chain._replace(cfg_keep=torch.zeros_like(chain.cfg_keep))
    with torch.no_grad():
        assert torch.equal(*(sample_chain(tokenizer, code, blind) for code in codes))
        assert not torch.allclose(*(sample_chain(tokenizer, code, chain) for code in codes), atol=1e-3)


@pytest.fixture
def settings(tiny_config, tmp_path, picture_files):
    (tmp_path / "pictures").mkdir()
    for file in picture_files[:4]:
        shutil.copy(file, tmp_path / "pictures")
    return tiny_config.override(
        f"data.train={tmp_path / 'pictures'}",
        "data.global_batch_size=4",
        "data.num_workers=0",
        "opt.lpips_weight=0",
        "trainer.max_steps=4",
        "trainer.log_every=1",
        "trainer.checkpoint_every=2",
        "trainer.sample_every=0",
        "trainer.enable_bfloat16=false",
        "trainer.tensorboard=false",
    )


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="needs a trained ResNet-50 (FLOWMO_WEIGHTS)")
def test_posttraining_goes_on_from_pretraining(settings, tmp_path, monkeypatch):
    """The command's two stages: the second counts on from the first, resumes exactly, and moves the decoder only."""
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(WEIGHTS))
    first = Trainer(settings, tmp_path / "first", report=quiet)
    first.train()
    second = settings.override(
        "model.posttrain_sample=true",
        "model.posttrain_sample_k=2",
        "opt.lpips_mode=resnet",
        "opt.lpips_weight=0.01",
        "data.global_batch_size=2",
        "trainer.max_steps=8",
    )
    lines = []
    whole = Trainer(second, tmp_path / "whole", resume_from=first.checkpoints()[-1], report=lines.append)
    assert (whole.step, whole.images) == (4, 16)
    assert whole.schedule.begin == 16, "warm-up and cool-down are stage 1B's"
    assert not any(name.startswith("optimizer.encoder") for name in whole.tensors()), "it is frozen"
    whole.train()
    assert (whole.step, whole.images) == (8, 16 + 4 * 2)
    assert any("resnet50" in line for line in lines)
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all("sample_distance" in record for record in records)
    before, after = load(first.checkpoints()[-1], ema=False), load(whole.checkpoints()[-1], ema=False)
    assert all(torch.equal(a, b) for a, b in zip(before.encoder.parameters(), after.encoder.parameters(), strict=True))
    assert not torch.equal(before.decoder.picture_out.weight, after.decoder.picture_out.weight)
    broken = second.override("trainer.max_steps=6")
    Trainer(broken, tmp_path / "broken", resume_from=first.checkpoints()[-1], report=quiet).train()
    Trainer(second, tmp_path / "broken", resume_from=first.checkpoints()[-1], report=quiet).train()
    ours = checkpoint.read(sorted((tmp_path / "broken" / "checkpoints").glob("*.pth"))[-1], ema=False)[1]
    assert all(torch.equal(value, ours[name]) for name, value in after.state_dict().items())


def test_starting_from_a_checkpoint_of_the_authors(settings, tmp_path):
    """It has no optimizer; weights, average, step and norms come from it."""
    tiny = (
        "model.mup_width=2",
        "model.enc_mup_width=2",
        "model.enc_depth=1",
        "model.dec_depth=2",
        "model.patch_size=4",
    )
    code = ("model.code_length=12", "model.context_dim=18", "model.codebook_size_for_entropy=9")
    config = settings.override(*tiny, *code, "trainer.max_steps=7")
    state = release_file(tmp_path / "flowmo_lo.pth", config)
    run = Trainer(config, tmp_path / "run", resume_from=tmp_path / "flowmo_lo.pth", report=quiet)
    assert (run.step, run.images) == (5, 5 * 128)
    assert run.schedule.begin == run.images, "its optimizer is fresh"
    weight = state["decoder.time_in.in_layer.weight"]
    assert torch.equal(run.task.model.decoder.time_in.weight, weight)
    assert torch.equal(run.ema.state["decoder.time_in.weight"], weight + 1)
    qkv = run.task.model.decoder.blocks[0].picture.qkv.weight
    torch.testing.assert_close(run.norm_control.state["decoder.blocks.0.picture.qkv.weight"], qkv.detach().norm())
    run.train()
    assert run.step == 7
    with pytest.raises(TrainingError, match="other settings"):
        Trainer(config.override("model.dec_depth=3"), tmp_path / "other", resume_from=tmp_path / "flowmo_lo.pth")


def test_starting_from_nothing_is_refused(settings, tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth: No weights found under this name"):
        Trainer(settings, tmp_path / "run", resume_from=tmp_path / "none.pth", report=quiet)


# The guard against reward hacking


@pytest.mark.parametrize(("metric", "values", "best"), [("psnr", [1, 3, 2, 3, 1], 1), ("lpips", [3, 1, 2, 1, 4], 1)])
def test_the_best_is_remembered(metric, values, best):
    guard = EarlyStopping(metric, patience=3)
    assert [guard.update(step, value) for step, value in enumerate(values)] == [True, True, False, False, False]
    assert (guard.step, guard.value) == (best, values[best])
    assert guard.exhausted
    again = EarlyStopping(metric, patience=4)
    again.load_state_dict(guard.state_dict())
    assert (again.step, again.since, again.exhausted) == (best, 3, False)
    other = EarlyStopping("psnr" if metric == "lpips" else "lpips")
    other.load_state_dict(guard.state_dict())
    assert other.step is None


def test_a_number_beats_one_that_is_not():
    guard = EarlyStopping("psnr")
    assert [guard.update(step, value) for step, value in enumerate([math.nan, 20.0, math.nan])] == [True, True, False]
    assert (guard.step, guard.value) == (1, 20.0)


def test_a_run_that_gets_worse_ends_and_keeps_its_best(settings, tmp_path):
    """A learning rate that destroys the model: the first checkpoint stays the best, and patience runs out."""
    config = settings.override(
        f"data.val={settings.data.train}",
        "eval.images=2",
        "eval.sampling.sample_steps=2",
        "trainer.best_metric=psnr",
        "trainer.patience=2",
        "trainer.keep_last=1",
        "trainer.checkpoint_every=1",
        "trainer.max_steps=40",
        "model.ema_decay=0",
        "opt.lr=1e-9",
    )
    lines = []
    Trainer(config.override("trainer.max_steps=1"), tmp_path / "run", report=quiet).train()
    (tmp_path / "run" / BEST).unlink()  # as after a kill between the checkpoint and this file
    worse = config.override("opt.lr=0.3", "opt.mup_base_width=0")
    run = Trainer(worse, tmp_path / "run", report=lines.append)
    run.train()
    assert run.step < 40
    assert "ended early, best checkpoint" in lines[-1]
    kept = [int(path.stem) for path in run.checkpoints()]
    assert kept == [run.early_stopping.step, run.step]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    judged = {record["step"]: record["eval_psnr"] for record in records if "eval_psnr" in record}
    assert max(judged, key=judged.get) == run.early_stopping.step
    assert run.step == run.early_stopping.step + 2
    again = Trainer(worse, tmp_path / "run", report=quiet)
    again.train()
    assert again.step == run.step, "an ended run stays ended"
    best, chosen = load(run.checkpoints()[0]), load(tmp_path / "run")
    assert chosen.identity() == best.identity() != load(run.checkpoints()[-1]).identity()
    # Another stage in the same folder counts from its own start, and keeps the first one's best checkpoint.
    longer = ("model.train=decoder", f"trainer.max_steps={run.step + 2}")
    new = Trainer(worse.override(*longer), tmp_path / "run", report=quiet)
    assert not new.early_stopping.exhausted
    new.train()
    assert new.step == run.step + 2
    assert new.early_stopping.step > run.step
    assert {run.early_stopping.step, new.early_stopping.step} <= {int(path.stem) for path in new.checkpoints()}


def test_reconstructions_that_all_equal_their_originals_are_the_best(settings, tmp_path, monkeypatch):
    """Their PSNR is infinite: there is no mean of finite values to tell."""

    def perfect(self, images, indices):
        return Reconstruction(images, torch.ones(len(images)))

    monkeypatch.setattr(FlowMoReconstructor, "reconstruct", perfect)
    held_out = (f"data.val={settings.data.train}", "eval.images=2", "trainer.best_metric=psnr")
    run = Trainer(settings.override(*held_out, "trainer.max_steps=1"), tmp_path / "run", report=quiet)
    run.train()
    assert (run.early_stopping.step, run.early_stopping.value) == (1, float("inf"))
    assert Trainer(run.config, tmp_path / "run", report=quiet).early_stopping.value == float("inf"), (
        "kept in the checkpoint"
    )


class Colours(torch.nn.Module):
    """Stands in for FID's Inception: mean and spread of each colour."""

    name, is_fid = "colours", True

    def forward(self, images):
        return Features(torch.cat((images.mean((2, 3)), images.std((2, 3))), dim=1))


def test_checkpoints_are_judged_by_rfid(settings, tmp_path, monkeypatch):
    """The paper stops stage 1B by rFID: here by SciPy's root over the same features, and the least one wins."""
    linalg = pytest.importorskip("scipy.linalg")
    asked = []
    monkeypatch.setattr("flowmo.train.tokenizer.build_features", lambda *words: asked.append(words) or Colours())
    held_out = (f"data.val={settings.data.train}", "eval.images=5", "trainer.best_metric=rfid")
    held_out += ("opt.perceptual_weights=/some/folder",)
    run = Trainer(settings.override(*held_out, "trainer.max_steps=1"), tmp_path / "run", report=quiet)
    run.train()
    assert asked == [("inception", "/some/folder")], "no stand-in is called rFID"
    source = open_source(settings.data.train)
    chosen = evenly_spread(5, len(source))
    x = read_crops(source, chosen, settings.data.image_size, enlarge=True)
    with torch.no_grad():
        y = FlowMoReconstructor(flowmo.load(run.checkpoints()[-1])).reconstruct(x, chosen).images
    features = [Colours()(z).pooled.double().numpy() for z in (x, y)]
    (mean, mean_2), (first, second) = zip(*((f.mean(0), np.cov(f, rowvar=False)) for f in features), strict=True)
    root = linalg.sqrtm(first @ second).real
    expected = ((mean - mean_2) ** 2).sum() + np.trace(first + second - 2 * root)
    assert run.early_stopping.value == pytest.approx(expected, rel=0.02)
    assert not run.early_stopping.update(2, run.early_stopping.value + 1)
    assert run.early_stopping.update(3, run.early_stopping.value - 1)
    with pytest.raises(TrainingError, match="needs 4 held-out images, not 3"):
        Trainer(run.config.override("eval.images=3"), tmp_path / "few", report=quiet)


def test_a_guard_needs_held_out_pictures(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"needs held-out images\. Write data\.val"):
        Trainer(settings.override("trainer.best_metric=psnr"), tmp_path / "run", report=quiet)


def test_patience_needs_a_metric(settings):
    impatient = settings.override("trainer.patience=3")
    with pytest.raises(ConfigError, match=r"trainer\.patience=3 needs a metric\. Set trainer\.best_metric"):
        check_start(impatient, has_weights=True)
    check_start(impatient.override("trainer.best_metric=psnr"), has_weights=True)
    check_start(impatient, has_weights=True, resumes=True)  # of an earlier version
