"""Training with a discriminator: FlowMo's order of images and schedule, EMA weights, exact resume, in one process."""

from __future__ import annotations

import time
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch

from flowmo.checkpoint.files import write_whole
from flowmo.config import Config, OptConfig
from flowmo.data import ImageDataset, batches, open_source
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.perceptual import build_distance
from flowmo.streams import Stream, seed_global
from flowmo.tokenizer import FlowMo
from flowmo.train.ema import EMA
from flowmo.train.optimizer import NormControl, build_optimizers, clip_gradients, set_learning_rate
from flowmo.train.schedule import BatchPlan, Schedule
from flowmo.train.task import autocast
from reproduce import StudyError
from reproduce.convolutional import ADVERSARIAL_START, AdversarialModel, ConvolutionalTokenizer
from reproduce.runner import Study, check_same_training

STATE = "peer.pt"


class PeerTrainer:
    """A run of a tokenizer, in one process: model, optimizers, EMA, and its position in images and seconds.

    A convolutional tokenizer and all discriminators learn by Adam, a FlowMo as its settings say.

    Args:
        adversarial: the discriminator joins at a share of the run, so that the run cannot be made longer.
        discriminator_rate: learning rate of the discriminator over that of the tokenizer.
    """

    def __init__(
        self,
        tokenizer: ConvolutionalTokenizer | FlowMo,
        path: Path,
        device: torch.device,
        adversarial: bool = True,
        discriminator_rate: float = 1.0,
    ):
        self.config, self.path, self.device, self.adversarial = tokenizer.config, path, device, adversarial
        opt = self.config.opt
        perceptual = build_distance(opt.lpips_mode).to(device) if opt.lpips_weight else None
        self.model = AdversarialModel(tokenizer, perceptual).to(device)
        self.ema = EMA(tokenizer, self.config.data.global_batch_size)
        flowmo = isinstance(tokenizer, FlowMo)
        self.norm_control = NormControl(tokenizer.networks if flowmo else {})
        own = build_optimizers(tokenizer) if flowmo else [adam(tokenizer, opt)]
        discriminator = self.model.discriminator
        self.parts = ((tokenizer, own), (discriminator, [adam(discriminator, opt, discriminator_rate)]))
        self.microbatch = BatchPlan.of(self.config, 1).microbatch
        self.images, self.seconds = 0, 0.0
        self.discriminator_rate = discriminator_rate
        if path.is_file():
            self.restore()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer for _, optimizers in self.parts for optimizer in optimizers]

    def step(self, batch: torch.Tensor, rate: float, adversarial: bool) -> torch.Tensor:
        """Train the tokenizer and, if ``adversarial``, the discriminator on a batch. Returns the tokenizer's loss.

        Micro-batches of ``data.max_microbatch`` accumulate. Each has its own entropy and adapted weight.
        """
        parts = self.parts if adversarial else self.parts[:1]
        learning = [[p for p in part.parameters() if p.requires_grad] for part, _ in parts]
        self.model.zero_grad(set_to_none=True)
        first, total = self.images, torch.zeros((), device=self.device)
        for images in batch.to(self.device).split(self.microbatch):
            noise = TrainingNoise.of(self.config, images, range(first, first + len(images)))
            with autocast(self.config, self.device):
                losses = [loss * (len(images) / len(batch)) for loss in self.model.losses(images, adversarial, noise)]
            for loss, parameters in zip(losses, learning, strict=True):
                loss.backward(inputs=parameters)
            first, total = first + len(images), total + losses[0].detach()
        for (_, optimizers), parameters in zip(parts, learning, strict=True):
            clip_gradients(parameters, self.config.opt.max_grad_norm)
            for optimizer in optimizers:
                set_learning_rate(optimizer, rate)
                optimizer.step()
        self.norm_control.apply(torch.ones((), device=self.device))
        self.ema.update(self.images // len(batch))
        self.images += len(batch)
        return total

    def save(self) -> None:
        content = {"weights": self.model.state_dict(), "average": self.ema.state, "norms": self.norm_control.state}
        content |= {"images": self.images, "seconds": self.seconds}
        content["settings"] = {**self.config.to_dict(), "discriminator_rate": self.discriminator_rate}
        content["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        write_whole(self.path, lambda temporary: torch.save(content, temporary))

    def restore(self) -> None:
        content = torch.load(self.path, map_location=self.device, weights_only=True)
        saved = dict(content["settings"])
        rate = saved.pop("discriminator_rate")
        if rate != self.discriminator_rate:
            raise StudyError(f"{self.path} was trained with a discriminator's rate of {rate}. Remove it to train anew.")
        check_same_training(self.path, Config.from_dict(saved), self.config, not self.adversarial)
        self.model.load_state_dict(content["weights"])
        for name, value in content["average"].items():
            self.ema.state[name].copy_(value)
        self.norm_control.state = content["norms"]
        for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.images, self.seconds = content["images"], content["seconds"]


def adam(module: torch.nn.Module, opt: OptConfig, scale: float = 1.0) -> torch.optim.Optimizer:
    groups = [{"params": list(module.parameters()), "scale": scale}]
    return torch.optim.Adam(groups, opt.lr, (opt.beta1, opt.beta2))


def train_peer(config: Config, width: int, run: str, study: Study) -> tuple[ConvolutionalTokenizer, float]:
    """Train a convolutional tokenizer with a discriminator, as ``train_adversarial`` does."""
    seed_global(config.trainer.seed, Stream.WEIGHTS)
    tokenizer = ConvolutionalTokenizer(config, width)
    return tokenizer, train_adversarial(tokenizer, run, study)


def train_adversarial(
    tokenizer: ConvolutionalTokenizer | FlowMo,
    run: str,
    study: Study,
    adversarial: bool = True,
    lengths: Collection[int] = (),
    discriminator_rate: float = 1.0,
) -> float:
    """Train a tokenizer, or resume it. It ends with its EMA weights. Returns the training time in seconds.

    Args:
        adversarial: with a discriminator, which joins after ``ADVERSARIAL_START`` of the run.
        lengths: numbers of images after which the EMA weights are kept, see ``weights_after``.
        discriminator_rate: learning rate of the discriminator over that of the tokenizer.

    Raises:
        StudyError: its loss is no longer finite, or the run was begun with other settings.
    """
    config, path = tokenizer.config, study.folder(run) / STATE
    data = config.data
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer = PeerTrainer(tokenizer, path, study.world.device, adversarial, discriminator_rate)
    dataset = ImageDataset(open_source(study.data), data.image_size, data.random_crop, data.random_flip, data.draft)
    schedule = Schedule.of(config, data.global_batch_size, len(dataset))
    stream = batches(dataset, data.global_batch_size, config.trainer.seed, trainer.images, data.num_workers)
    since = time.perf_counter()
    while trainer.images < schedule.duration:
        rate = schedule.learning_rate(config.opt, trainer.images)
        joined = adversarial and trainer.images >= ADVERSARIAL_START * schedule.duration
        loss = trainer.step(next(stream), rate, joined)
        if schedule.is_due(schedule.log, trainer.images):
            if not torch.isfinite(loss):
                raise StudyError(f"{run}: the loss is not finite after {trainer.images} images. Lower opt.lr.")
            study.report(f"{run}  {trainer.images} images  loss {loss.item():.4f}")
        if trainer.images in lengths:  # before the state is saved: a resumed run does not pass here again
            weights = trainer.ema.state
            write_whole(weights_after(trainer.images, run, study), partial(torch.save, weights))
        if schedule.is_due(schedule.checkpoint, trainer.images) or trainer.images >= schedule.duration:
            trainer.seconds, since = trainer.seconds + time.perf_counter() - since, time.perf_counter()
            trainer.save()
    tokenizer.load_state_dict(trainer.ema.state, strict=False)
    return trainer.seconds


def weights_after(images: int, run: str, study: Study) -> Path:
    """File of the EMA weights of a run after so many images."""
    return study.folder(run) / f"{images}.pt"
