"""Stages 1A and 1B as tasks of the engine: pictures in, a tokenizer out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from flowmo.checkpoint import files as checkpoint
from flowmo.config import Config
from flowmo.data import ImageDataset, Source, evenly_spread, open_source
from flowmo.distributed import World
from flowmo.evaluate.metrics import build_features
from flowmo.evaluate.metrics.pairs import grid, psnr
from flowmo.evaluate.reconstruction import Evaluators, FlowMoReconstructor, measure
from flowmo.evaluate.summary import Summary
from flowmo.images import to_pil
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.perceptual import LPIPS, build_distance
from flowmo.losses.stages import Loss, Stage, cut_out
from flowmo.model.quantizers import Learner, WholeBatch, alone
from flowmo.streams import Stream, seed_global, stream_seed
from flowmo.tokenizer import FlowMo
from flowmo.train.codebook_usage import CodeUsage
from flowmo.train.cost import Cost, training_cost
from flowmo.train.finite import restored_unless
from flowmo.train.optimizer import scale_initial_weights
from flowmo.train.schedule import BatchPlan, Schedule
from flowmo.train.task import TrainingError, autocast, changed_settings

GRID_PICTURES = 8
FEWEST_FOR_RFID = 4


class TokenizerTask:
    """A ``flowmo.train.task.Task``: stage 1A, with ``model.posttrain_sample`` 1B, with ``opt.teacher`` 1C.

    Raises:
        DataError, WeightsNotFoundError: the pictures or the perceptual network are not there.
    """

    def __init__(self, config: Config, world: World, report: Callable[[str], None]):
        self.config, self.world, self.report = config, world, report
        self.unreadable: set[str] = set()
        self.stage = config.stage
        data = config.data
        pictures = self.open_source("train")
        self.source = ImageDataset(
            pictures, data.image_size, data.random_crop, data.random_flip, data.draft, data.read_timeout
        )
        self.held_out = self._held_out(pictures) if world.main else None
        self.perceptual = None
        if config.opt.lpips_weight:
            self.perceptual = build_distance(config.opt.lpips_mode, config.opt.perceptual_weights or None)
            self.perceptual.to(world.device)
            report(f"perceptual loss: {self.perceptual.name}")
        seed_global(config.trainer.seed, Stream.WEIGHTS)
        self.model = FlowMo(config)
        scale_initial_weights(self.model)
        self.teacher = self._take_over(Path(config.opt.teacher)) if config.opt.teacher else None
        self.model.to(world.device)
        self.module = Stage(self.model, config.opt, self.perceptual, self.teacher)
        self.norm_controlled = self.model.networks
        self.judges = self._judges() if world.main else Evaluators()
        self.usage = CodeUsage(self.model.quantizer, world)
        self.frozen = False
        self.batch = BatchPlan.of(config, world.size).total

    def _take_over(self, path: Path) -> FlowMo:
        """The teacher of stage 1C, whose weights the fresh student starts with."""
        teacher = checkpoint.load(path)
        expected = {**self.config.architecture(), "mean_velocity": False}
        changed_settings(teacher.config.architecture(), expected, path, "model")
        self.model.load_state_dict(teacher.state_dict(), strict=False)  # it lacks what is told of a step's end
        return teacher.to(self.world.device).eval().requires_grad_(False)

    def open_source(self, part: str) -> Source:
        """The images of ``data.train`` or ``data.val``."""
        data = self.config.data
        return open_source(data.train, data.train_index) if part == "train" else open_source(data.val, data.val_index)

    def _held_out(self, pictures: Source) -> Tensor:
        """A few pictures for the sample grids, spread over the held-out ones, or the training ones without those."""
        data = self.config.data
        source = ImageDataset(self.open_source("val") if data.val else pictures, data.image_size)
        images = []
        for index in evenly_spread(GRID_PICTURES, len(source)):
            image, bad = source.load(index, 0)
            images.append(image)
            for message in bad.values() if data.val else ():  # the loop names training images
                self._leave_out(message)
        return torch.stack(images).to(self.world.device)

    def _leave_out(self, message: str) -> None:
        """Name an unreadable held-out image once in a run."""
        if message not in self.unreadable:
            self.unreadable.add(message)
            self.report(f"left out of the held-out images: {message}")

    def _judges(self) -> Evaluators:
        """The network that ``trainer.best_metric`` needs.

        Raises:
            TrainingError: too few pictures for a distance and its bias.
            FeatureNetworkError, WeightsNotFoundError: the network cannot be had.
        """
        metric = self.config.trainer.best_metric
        if metric == "lpips":
            return Evaluators(lpips_alex=LPIPS("alex")).to(self.world.device)
        if metric != "rfid":
            return Evaluators()
        count = min(self.config.eval.pictures, len(self.open_source("val")))
        if count < FEWEST_FOR_RFID:
            raise TrainingError(
                f"trainer.best_metric=rfid needs {FEWEST_FOR_RFID} held-out pictures, not {count}; raise "
                "eval.pictures, or name more pictures by data.val"
            )
        return Evaluators(features=build_features("inception")).to(self.world.device)

    def cost(self, fused: bool = True) -> Cost:
        config = self.config
        if self.teacher is not None and not config.opt.teacher_steps:
            config = config.override(f"opt.teacher_steps={self.teacher.config.eval.sampling.sample_steps}")
        return training_cost(config, self.frozen, fused)

    # Steps

    def advance(self, images: int, times: Schedule) -> bool:
        if self.frozen or not (self.stage != "pretrain" or images >= times.freeze_encoder_after):
            return False
        self.freeze_encoder()
        return True

    def freeze_encoder(self) -> None:
        """From now on the encoder only encodes."""
        self.model.encoder.requires_grad_(False)
        self.frozen = True

    def share(self, chunks: Sequence[Tensor], first: int) -> WholeBatch:
        """How a bottleneck that needs it learns a statistic of the whole batch.

        Where a process takes its part in several passes, the pictures of all are encoded once beforehand. With a
        frozen encoder the statistic trains nothing, and each pass's own is logged.
        """
        settings = self.config.model
        if not self.model.quantizer.needs_whole_batch or settings.entropy_statistics == "process" or self.frozen:
            return alone
        if len(chunks) == 1:
            return alone if self.world.size == 1 else self.world.mean
        seen: list[Tensor] = []

        def collect(statistic: Tensor) -> Tensor:
            seen.append(statistic)
            return statistic

        with torch.no_grad(), autocast(self.config, self.world.device):
            place = first
            for chunk in chunks:
                seed_global(self.config.trainer.seed, Stream.BOTTLENECK, place)
                self.module(self._crop(chunk, place), None, collect)
                place += len(chunk)
        mean = self.world.mean(torch.stack(seen).mean(dim=0))
        return lambda statistic: mean

    def loss(self, module: nn.Module, chunk: Tensor, place: int, shared: WholeBatch) -> Loss:
        chunk = self._crop(chunk, place)
        draws = TrainingNoise.of(self.config, chunk, range(place, place + len(chunk)))
        seed_global(self.config.trainer.seed, Stream.BOTTLENECK, place)
        with autocast(self.config, self.world.device):
            loss = module(chunk, draws, shared, self.frozen)
        self.usage.add(loss.ids)
        return loss

    def _crop(self, chunk: Tensor, place: int) -> Tensor:
        """Random crops of one size, which the step draws: a function of the seed and the images' places alone."""
        sizes, seed = self.config.data.crops, self.config.trainer.seed
        if not sizes:
            return chunk
        height, width = sizes[stream_seed(seed, Stream.CROP_SIZE, place // self.batch) % len(sizes)]
        rows, columns = chunk.shape[2] - height + 1, chunk.shape[3] - width + 1
        corners = [
            (stream_seed(seed, Stream.CROP_TOP, i) % rows, stream_seed(seed, Stream.CROP_LEFT, i) % columns)
            for i in range(place, place + len(chunk))
        ]
        return cut_out(chunk, corners, height, width)

    def stepped(self, step: int, finite: Tensor) -> None:
        quantizer = self.model.quantizer
        if isinstance(quantizer, Learner) and not self.frozen:
            with restored_unless(finite, list(quantizer.buffers())):
                quantizer.learn(step)

    # What it tells

    def statistics(self) -> dict[str, float]:
        return self.usage.take()

    def averaged(self, weights: Mapping[str, Tensor]) -> FlowMo:
        return checkpoint.build(self.config, weights).to(self.world.device)

    def judge(self, model: FlowMo) -> dict[str, float]:
        data = self.config.data
        source = self.open_source("val")
        candidate, limit = FlowMoReconstructor(model), self.config.eval.pictures
        with autocast(self.config, self.world.device):
            measured = measure(
                candidate,
                source,
                data.image_size,
                self.judges,
                limit=limit,
                device=self.world.device,
                enlarge=True,
                on_unreadable=self._leave_out,
            )
        summary = Summary.of(candidate.name, measured, self.judges.features)
        # Of pictures that all equal their originals there is no mean of finite values; no checkpoint can be better.
        finite = math.inf if summary.psnr is None else summary.psnr
        figures = {"psnr": finite, "lpips": summary.lpips_alex, "rfid": summary.frechet_distance}
        return {name: figure for name, figure in figures.items() if figure is not None}

    @torch.no_grad()
    def show(self, model: FlowMo) -> tuple[Image.Image, dict[str, float]]:
        """Held-out pictures through the tokenizer: a grid, originals above, and their figures."""
        if self.held_out is None:
            raise RuntimeError("the main process alone shows pictures, and has read them")
        x = self.held_out
        model.chunk_size = len(x)
        with autocast(self.config, self.world.device):
            y = model.decode(model.encode(x))
        figures = {"held_out_psnr": float(psnr(x, y).mean())}
        if self.perceptual is not None:
            figures["held_out_distance"] = float(self.perceptual(x, y).mean())
        return to_pil(grid([x, y])), figures

    # Checkpoints

    def facts(self) -> dict[str, Any]:
        return {}

    def check(self, path: Path, facts: Mapping[str, Any]) -> None:
        changed_settings(Config.from_dict(facts["config"]).architecture(), self.config.architecture(), path, "model")

    def foreign_weights(self, path: Path) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Of a file that holds a tokenizer: the package's own, or the authors'."""
        untold = ("code_length", "codebook_size_for_entropy", "enable_mup")  # by the shapes of weights
        settings = tuple(f"model.{name}={getattr(self.config.model, name)}" for name in untold)
        for part, ema in (("model", False), ("ema", True)):
            config, weights = checkpoint.read(path, settings, ema)
            changed_settings(config.architecture(), self.config.architecture(), path, "model")
            yield part, weights
