"""Training of the convolutional peer, resumable: pictures in FlowMo's order, its optimizer and its averaged weights."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from flowmo.checkpoint.files import write_whole
from flowmo.config import Config
from flowmo.data import ImageDataset, batches, open_source
from flowmo.losses.perceptual import build_distance
from flowmo.streams import Stream, seed_global
from flowmo.train.ema import EMA
from flowmo.train.optimizer import clip_gradients
from flowmo.train.schedule import Schedule
from flowmo.train.task import autocast
from reproduce.convolutional import ADVERSARIAL_SHARE, Adversaries, ConvolutionalTokenizer
from reproduce.study import Place, StudyError

STATE = "peer.pt"


def train_peer(config: Config, width: int, run: str, place: Place) -> tuple[ConvolutionalTokenizer, float]:
    """The averaged weights of a peer that learns as ``config`` says, and the seconds that training took.

    Raises:
        StudyError: its loss is no longer finite.
    """
    path = place.folder(run) / STATE
    path.parent.mkdir(parents=True, exist_ok=True)
    device, data, opt = place.world.device, config.data, config.opt
    seed_global(config.trainer.seed, Stream.WEIGHTS)
    perceptual = build_distance(opt.lpips_mode).to(device) if opt.lpips_weight else None
    both = Adversaries(ConvolutionalTokenizer(config, width), perceptual).to(device)
    average = EMA(both.tokenizer, data.global_batch_size)
    parts = (both.tokenizer, both.discriminator)
    adams = [torch.optim.Adam(part.parameters(), opt.lr, (opt.beta1, opt.beta2)) for part in parts]
    images, seconds = restore(path, both, average, adams)
    source = ImageDataset(open_source(place.train), data.image_size, data.random_crop, data.random_flip, data.draft)
    times = Schedule.of(config, data.global_batch_size, len(source))
    stream = batches(source, data.global_batch_size, config.trainer.seed, images, data.num_workers)
    since = time.perf_counter()
    while images < times.duration:
        for adam in adams:
            adam.param_groups[0]["lr"] = times.learning_rate(opt, images)
        adversarial = images >= ADVERSARIAL_SHARE * times.duration
        with autocast(config, device):
            losses = both.losses(next(stream).to(device), adversarial)
        step(both, adams, losses, opt.max_grad_norm)
        average.update(images // data.global_batch_size)
        images += data.global_batch_size
        if times.is_due(times.log, images):
            if not torch.isfinite(losses[0]):
                raise StudyError(f"{run}: the peer's loss is no longer finite at {images} images; lower opt.lr")
            place.report(f"{run}  {images} images  loss {losses[0].item():.4f}")
        if times.is_due(times.checkpoint, images) or images >= times.duration:
            seconds, since = seconds + time.perf_counter() - since, time.perf_counter()
            save(path, both, average, adams, images, seconds)
    both.tokenizer.load_state_dict(average.state)
    return both.tokenizer, seconds


def step(
    both: Adversaries, adams: list[torch.optim.Optimizer], losses: tuple[torch.Tensor, ...], longest: float
) -> None:
    """One step of the tokenizer and, where there is a loss of it, one of the discriminator."""
    parts: tuple[nn.Module, ...] = (both.tokenizer, both.discriminator)
    for part, adam, loss in zip(parts, adams, losses, strict=False):
        parameters = list(part.parameters())
        part.zero_grad(set_to_none=True)
        loss.backward(inputs=parameters)
        clip_gradients(parameters, longest)
        adam.step()


def save(
    path: Path,
    both: Adversaries,
    average: EMA,
    adams: list[torch.optim.Optimizer],
    images: int,
    seconds: float,
) -> None:
    content = {"weights": both.state_dict(), "average": average.state, "images": images, "seconds": seconds}
    content["adams"] = [adam.state_dict() for adam in adams]
    write_whole(path, lambda temporary: torch.save(content, temporary))


def restore(path: Path, both: Adversaries, average: EMA, adams: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Images seen and seconds taken so far, 0 of a fresh run."""
    if not path.is_file():
        return 0, 0.0
    content = torch.load(path, weights_only=True)
    both.load_state_dict(content["weights"])
    average.state = {name: value.to(average.state[name].device) for name, value in content["average"].items()}
    for adam, state in zip(adams, content["adams"], strict=True):
        adam.load_state_dict(state)
    return content["images"], content["seconds"]
