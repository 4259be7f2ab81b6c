"""The convolutional peer: its bits, its match with a FlowMo, its losses, and training that can be interrupted."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import PICTURES
from torch import nn

from flowmo import FlowMo
from flowmo.distributed import World
from flowmo.streams import Stream, seed_global
from flowmo.train.cost import training_flops
from flowmo.train.trainer import Trainer
from reproduce import StudyError
from reproduce.bases import SMOKE_BASE
from reproduce.peer import SCALES, match
from reproduce.runner import Study

pytest.importorskip("diffusers")

from reproduce.adversarial import STATE, PeerTrainer, train_adversarial, train_peer, weights_after
from reproduce.convolutional import (
    AdversarialModel,
    ConvolutionalReconstructor,
    ConvolutionalTokenizer,
    fitting_width,
    step_flops,
)

CONFIG = SMOKE_BASE.override("opt.lpips_weight=0", "trainer.enable_bfloat16=false", "opt.warmup=0")
WIDTH = 8


def test_bits_and_ids():
    torch.manual_seed(0)
    tokenizer = ConvolutionalTokenizer(CONFIG, WIDTH)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    candidate = ConvolutionalReconstructor(tokenizer, torch.device("cpu"))
    made = candidate.reconstruct(images, range(2))
    assert made.ids.shape == (2, 4, 1)
    assert made.ids.max() < candidate.id_count == 512
    assert made.bits.tolist() == [CONFIG.bits_per_image] * 2
    assert torch.equal(made.images, tokenizer.decode(made.ids))
    assert made.images.shape == images.shape
    signs, ids = tokenizer.quantizer.quantize(tokenizer.encode_continuous(images))
    assert torch.equal(tokenizer.quantizer.code_from_ids(ids), signs)
    with pytest.raises(StudyError, match="do not reach"):
        ConvolutionalTokenizer(CONFIG.override("model.code_length=6"), WIDTH)


def test_the_fight_that_is_reported_is_of_equal_parameters():
    config = SCALES["cpu"].base

    def count(width):
        return sum(p.numel() for p in ConvolutionalTokenizer(config, width).parameters())

    ours = sum(p.numel() for p in FlowMo(config).parameters())
    width = fitting_width(config, ours)
    assert count(width) == pytest.approx(ours, rel=0.1)
    assert abs(count(width) - ours) <= min(abs(count(width + step) - ours) for step in (-4, 4))


def test_several_processes_are_refused(study):
    with pytest.raises(StudyError, match="without torchrun"):
        match(CONFIG, replace(study, world=World(size=2)))


def test_flops_by_hand(monkeypatch):
    """Convolutions of known size in the place of all networks: forward, and backward to weights and inputs."""

    class Plain(nn.Module):
        def __init__(self, config, width):
            super().__init__()
            self.config, self.decoder = config, nn.Conv2d(3, 3, 1, bias=False)
            self.quantizer = lambda code: type("Quantized", (), {"code": code, "losses": {"none": code.sum() * 0}})
            self.last_layer = self.decoder.weight

        def encode_continuous(self, images):
            return images

        def decode_continuous(self, code):
            return self.decoder(code)

    monkeypatch.setattr("reproduce.convolutional.Discriminator", lambda: nn.Conv2d(3, 1, 1, bias=False))
    one = 2 * 3 * 32 * 32  # a 1 × 1 convolution to one channel
    without = 3 * one * 2  # forward, and the weights' gradient
    # Adapting the weight: both losses back to the last layer; the tokenizer's loss through the discriminator; then the
    # discriminator on both pictures, forward and its weights' gradient.
    pleased = one + (3 * one) + (one + 3 * one) + one
    judging = 2 * one * 2
    assert step_flops(Plain(CONFIG, WIDTH), None) == pytest.approx(0.5 * without + 0.5 * (without + pleased + judging))


def test_both_learn_what_is_theirs():
    torch.manual_seed(0)
    both = AdversarialModel(ConvolutionalTokenizer(CONFIG, WIDTH), None)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert len(both.losses(images, adversarial=False)) == 1
    loss, other = both.losses(images, adversarial=True)
    other.backward(retain_graph=True)
    assert all(p.grad is None for p in both.tokenizer.parameters())
    idle = {name for name, p in both.discriminator.named_parameters() if not p.grad.abs().sum() > 0}
    assert idle <= {"8.bias"}, "real and made pictures pull the last bias in opposite ways, at first as much"
    loss.backward()
    without = {name for name, p in both.tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # A softmax over keys does not see what all keys have in common.
    assert without <= {f"{net}.mid_block.attentions.0.to_k.bias" for net in ("encoder", "decoder")}


@pytest.fixture
def study(tmp_path):
    return Study("peer", "smoke", str(PICTURES), str(PICTURES), tmp_path / "results", tmp_path / "out", report=str)


def train(kind, config, run, study):
    """A tokenizer of the kind that has been trained with a discriminator."""
    if kind == "convolutional":
        tokenizer, seconds = train_peer(config, WIDTH, run, study)
    else:
        seed_global(0, Stream.WEIGHTS)
        tokenizer = FlowMo(config)
        seconds = train_adversarial(tokenizer, run, study)
    assert seconds > 0
    return tokenizer


@pytest.mark.parametrize("kind", ["convolutional", "flowmo"])
def test_an_interrupted_training_ends_like_an_unbroken_one(kind, study, monkeypatch):
    config = CONFIG.override("trainer.duration=4 steps", "trainer.checkpoint_every=2 steps", "opt.cooldown=0")
    whole, saves = train(kind, config, "whole", study), []

    real = PeerTrainer.save

    def save_and_die(trainer):
        real(trainer)
        saves.append(trainer.path)
        raise KeyboardInterrupt

    monkeypatch.setattr(PeerTrainer, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(kind, config, "broken", study)
    monkeypatch.setattr(PeerTrainer, "save", real)
    for settings, told in (
        ("opt.lr=0.5", r"opt\.lr=0\.\d+\. Remove it"),
        ("trainer.duration=8 steps", r"trainer\.duration=4 steps"),  # the discriminator would join later
    ):
        with pytest.raises(StudyError, match=rf"peer\.pt was trained with {told}"):
            train(kind, config.override(settings), "broken", study)
    tokenizer = FlowMo(config) if kind == "flowmo" else ConvolutionalTokenizer(config, WIDTH)
    with pytest.raises(StudyError, match=r"a discriminator's rate of 1\.0"):
        train_adversarial(tokenizer, "broken", study, discriminator_rate=0.5)
    again = train(kind, config, "broken", study)
    assert saves == [study.folder("broken") / STATE]
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)
    shutil.rmtree(study.folder("broken"))


def test_without_a_discriminator_a_flowmo_trains_as_ever(study):
    """Its weights are those of ``flowmo train``, and its FLOPs those that are forecast."""
    config = CONFIG.override(f"data.train={PICTURES}", "trainer.duration=4 steps", "trainer.checkpoint_every=2 steps")
    config = config.override("opt.optimizer=muon", "opt.lr=1e-3", "trainer.tensorboard=false")
    trainer = Trainer(config, study.folder("plain"), report=str)
    trainer.train()
    seed_global(config.trainer.seed, Stream.WEIGHTS)
    tokenizer = FlowMo(config)
    train_adversarial(tokenizer, "ours", study, adversarial=False, lengths=[8])
    for name, value in trainer.ema.state.items():
        torch.testing.assert_close(tokenizer.state_dict()[name], value, msg=name)
    half = torch.load(weights_after(8, "ours", study), weights_only=True)
    assert half.keys() == trainer.ema.state.keys()
    assert any(not torch.equal(half[name], value) for name, value in trainer.ema.state.items())
    assert step_flops(FlowMo(config), None, adversarial=False) == pytest.approx(training_flops(config), rel=0.05)


@pytest.mark.parametrize("kind", ["convolutional", "flowmo"])
def test_microbatches_give_the_gradient_of_the_batch(kind, tmp_path, monkeypatch):
    """Without the entropy of a micro-batch and the adapted weight, which depend on the split."""
    batch, gradients = torch.rand(4, 3, 32, 32) * 2 - 1, []
    for microbatch in (4, 2):
        config = CONFIG.override(
            f"data.max_microbatch={microbatch}", "model.entropy_loss_weight=0", "opt.max_grad_norm=0"
        )
        seed_global(0, Stream.WEIGHTS)  # of the discriminator, too
        tokenizer = FlowMo(config) if kind == "flowmo" else ConvolutionalTokenizer(config, WIDTH)
        trainer = PeerTrainer(tokenizer, tmp_path / STATE, torch.device("cpu"))
        trainer.step(batch, 0.0, adversarial=False)
        gradients.append([p.grad for p in tokenizer.parameters()])
        monkeypatch.setattr(AdversarialModel, "_adapted_weight", lambda *_: 0.0)
        trainer.step(batch, 0.0, adversarial=True)
        gradients[-1] += [p.grad for p in trainer.model.discriminator.parameters()]
    for whole, half in zip(*gradients, strict=True):
        torch.testing.assert_close(half, whole, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_ends_it(study):
    config = CONFIG.override("opt.lr=1e30", "trainer.duration=8 steps", "opt.max_grad_norm=0")
    with pytest.raises(StudyError, match="not finite"):
        train_peer(config, WIDTH, "wild", study)


def test_a_training_may_go_on(study):
    """Without a cool-down a longer training ends like one that was as long from the beginning."""
    short = CONFIG.override("trainer.duration=2 steps", "opt.cooldown=0")
    long = short.override("trainer.duration=4 steps")

    def train_both(config, run):
        study.train(config, f"{run}-trainer")
        seed_global(0, Stream.WEIGHTS)
        tokenizer = FlowMo(config)
        train_adversarial(tokenizer, f"{run}-peer", study, adversarial=False)
        return [*study.load(study.train(config, f"{run}-trainer").checkpoint).parameters(), *tokenizer.parameters()]

    train_both(short, "broken")
    for ours, expected in zip(train_both(long, "broken"), train_both(long, "whole"), strict=True):
        assert torch.equal(ours, expected)
    with pytest.raises(StudyError, match=r"trainer\.duration=4 steps"):
        study.train(short, "broken-trainer")
    with pytest.raises(StudyError, match=r"trainer\.duration=4 steps"):  # its row is of the shorter training
        study.trained_row("broken-trainer", long.override("trainer.duration=8 steps"), limit=1)
    cooled = long.override("opt.cooldown=0.5")
    study.train(cooled, "cooled")
    with pytest.raises(StudyError, match=r"trainer\.duration=4 steps"):
        study.train(cooled.override("trainer.duration=8 steps"), "cooled")
