"""Training of the convolutional peer: FlowMo's order of images and schedule, Adam, EMA weights, exact resume."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from flowmo.checkpoint.files import write_whole
from flowmo.config import Config
from flowmo.data import ImageDataset, batches, open_source
from flowmo.losses.perceptual import build_distance
from flowmo.streams import Stream, seed_global
from flowmo.train.ema import EMA
from flowmo.train.optimizer import clip_gradients
from flowmo.train.schedule import Schedule
from flowmo.train.task import autocast
from reproduce import StudyError
from reproduce.convolutional import ADVERSARIAL_START, AdversarialModel, ConvolutionalTokenizer
from reproduce.runner import Study

STATE = "peer.pt"


class PeerTrainer:
    """A run of the peer, in one process: model, optimizers, EMA, and its position in images and seconds."""

    def __init__(self, config: Config, width: int, path: Path, device: torch.device):
        self.config, self.path, self.device = config, path, device
        opt = config.opt
        seed_global(config.trainer.seed, Stream.WEIGHTS)
        perceptual = build_distance(opt.lpips_mode).to(device) if opt.lpips_weight else None
        self.model = AdversarialModel(ConvolutionalTokenizer(config, width), perceptual).to(device)
        self.ema = EMA(self.model.tokenizer, config.data.global_batch_size)
        self.parts = (self.model.tokenizer, self.model.discriminator)
        self.optimizers = [torch.optim.Adam(part.parameters(), opt.lr, (opt.beta1, opt.beta2)) for part in self.parts]
        self.images, self.seconds = 0, 0.0
        if path.is_file():
            self.restore()

    def step(self, batch: torch.Tensor, rate: float, adversarial: bool) -> torch.Tensor:
        """Train the tokenizer and, if ``adversarial``, the discriminator on a batch. Returns the tokenizer's loss."""
        with autocast(self.config, self.device):
            losses = self.model.losses(batch.to(self.device), adversarial)
        for part, optimizer, loss in zip(self.parts, self.optimizers, losses, strict=False):
            optimizer.param_groups[0]["lr"] = rate
            parameters = list(part.parameters())
            part.zero_grad(set_to_none=True)
            loss.backward(inputs=parameters)
            clip_gradients(parameters, self.config.opt.max_grad_norm)
            optimizer.step()
        self.ema.update(self.images // len(batch))
        self.images += len(batch)
        return losses[0]

    def save(self) -> None:
        content = {"weights": self.model.state_dict(), "average": self.ema.state}
        content |= {"images": self.images, "seconds": self.seconds}
        content["adams"] = [optimizer.state_dict() for optimizer in self.optimizers]
        write_whole(self.path, lambda temporary: torch.save(content, temporary))

    def restore(self) -> None:
        content = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(content["weights"])
        for name, value in content["average"].items():
            self.ema.state[name].copy_(value)
        for optimizer, state in zip(self.optimizers, content["adams"], strict=True):
            optimizer.load_state_dict(state)
        self.images, self.seconds = content["images"], content["seconds"]


def train_peer(config: Config, width: int, run: str, study: Study) -> tuple[ConvolutionalTokenizer, float]:
    """Train a peer, or resume it. Returns it with its EMA weights, and the training time in seconds.

    Raises:
        StudyError: its loss is no longer finite.
    """
    path, data = study.folder(run) / STATE, config.data
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer = PeerTrainer(config, width, path, study.world.device)
    dataset = ImageDataset(open_source(study.data), data.image_size, data.random_crop, data.random_flip, data.draft)
    schedule = Schedule.of(config, data.global_batch_size, len(dataset))
    stream = batches(dataset, data.global_batch_size, config.trainer.seed, trainer.images, data.num_workers)
    since = time.perf_counter()
    while trainer.images < schedule.duration:
        rate = schedule.learning_rate(config.opt, trainer.images)
        loss = trainer.step(next(stream), rate, trainer.images >= ADVERSARIAL_START * schedule.duration)
        if schedule.is_due(schedule.log, trainer.images):
            if not torch.isfinite(loss):
                raise StudyError(f"{run}: the loss is not finite after {trainer.images} images. Lower opt.lr.")
            study.report(f"{run}  {trainer.images} images  loss {loss.item():.4f}")
        if schedule.is_due(schedule.checkpoint, trainer.images) or trainer.images >= schedule.duration:
            trainer.seconds, since = trainer.seconds + time.perf_counter() - since, time.perf_counter()
            trainer.save()
    trainer.model.tokenizer.load_state_dict(trainer.ema.state)
    return trainer.model.tokenizer, trainer.seconds
