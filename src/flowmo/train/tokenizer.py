"""Training task of stages 1A, 1B and 1C: images in, a tokenizer out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from flowmo.checkpoint.files import read
from flowmo.config import OWN, Config
from flowmo.data import ImageDataset, Source, evenly_spread, open_source
from flowmo.data.sources.base import identity_of
from flowmo.distributed import World
from flowmo.errors import check_side
from flowmo.evaluate.metrics import build_features
from flowmo.evaluate.metrics.pairs import grid, psnr
from flowmo.evaluate.reconstruction import Evaluators, FlowMoReconstructor, measure
from flowmo.evaluate.summary import Summary
from flowmo.images import to_pil
from flowmo.images.pixels import PixelFormat
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.perceptual import LPIPS, SMALLEST_SIDE, WeightsNotFoundError, build_distance
from flowmo.losses.stages import Loss, Stage, crop_images
from flowmo.model.quantizers import WholeBatch, local_statistic
from flowmo.streams import Stream, seed_global, stream_seed
from flowmo.tokenizer import FlowMo, build, load
from flowmo.train.logging import CodebookUsage
from flowmo.train.optimizer import restored_unless, scale_initial_weights
from flowmo.train.schedule import BatchPlan, Schedule
from flowmo.train.task import (
    Task,
    TrainingError,
    autocast,
    changed_settings,
    check_same_settings,
    find_misfits,
    lpips_dtype,
)

GRID_IMAGES = 8
MIN_IMAGES_FOR_RFID = 4
IMAGES_AND_LOSS = tuple(name for name in OWN if name != "model.")
"""Settings of a model that a run may change, prefixes as in ``OWN``."""


class TokenizerTask(Task):
    """Stage 1A; with ``model.posttrain_sample`` stage 1B, with ``opt.teacher`` stage 1C.

    Raises:
        DataError, WeightsNotFoundError: the images or the perceptual network are missing.
    """

    samples_show_originals = True
    source: ImageDataset

    def __init__(self, config: Config, world: World, report: Callable[[str], None]):
        super().__init__(config, world, report)
        data, opt = config.data, config.opt
        # a cached function reports each image once
        self.report_unreadable = cache(lambda message: report(f"left out of the held-out images: {message}"))
        images = self.open_source("train")
        self.pixels = PixelFormat.of(config)
        transforms = (data.random_crop, data.random_flip, data.draft, data.read_timeout, self.pixels)
        self.source = ImageDataset(images, data.image_size, *transforms)
        self.held_out = self._held_out(images) if world.main else torch.empty(0)
        self.perceptual = None
        if opt.lpips_weight:
            dtype = lpips_dtype(config, world.device)
            try:
                distance = build_distance(opt.lpips_mode, opt.perceptual_weights or None, dtype=dtype)
            except WeightsNotFoundError as error:
                raise WeightsNotFoundError(f"{error} opt.lpips_weight=0 trains without it.") from None
            self.perceptual = distance.to(world.device)
            report(f"perceptual loss: {self.perceptual.name}")
        seed_global(config.trainer.seed, Stream.WEIGHTS)
        self.model = FlowMo(config)
        scale_initial_weights(self.model)
        self.teacher = self._load_teacher(Path(opt.teacher)) if opt.teacher else None
        self.model.to(world.device)
        self.module = Stage(self.model, opt, self.perceptual, self.teacher)
        self.norm_controlled = self.model.networks
        self.evaluators = self._build_evaluators() if world.main else Evaluators()
        self.usage = CodebookUsage(self.model.quantizer.id_count, world)
        self.frozen = False
        if config.model.train == "decoder" or config.stage != "pretrain":
            self.freeze_encoder()
        self.model.decoder.requires_grad_(config.model.train != "encoder")
        self.batch = BatchPlan.of(config, world.size).total
        self.step_begin = 0  # images before the current step

    def open_source(self, part: str) -> Source:
        """Open the images of ``data.train`` or ``data.val``."""
        data = self.config.data
        return open_source(data.train, data.train_index) if part == "train" else open_source(data.val, data.val_index)

    def source_identity(self) -> str:
        return identity_of(self.source.source, labels=False)

    def _load_teacher(self, path: Path) -> FlowMo:
        """Load stage 1C's teacher and copy its weights into the student.

        Raises:
            TrainingError: the teacher has another architecture, or samples with another solver than Euler's.
        """
        teacher = load(path)
        solver = teacher.config.eval.sampling.solver
        if solver != "euler" and not self.config.opt.teacher_steps:
            raise TrainingError(
                f"{path} samples with {solver}, and stage 1C follows Euler steps. Write opt.teacher_steps=N."
            )
        expected = {**self.config.architecture(), "mean_velocity": False}
        advice = "Give the student the teacher's settings."
        check_same_settings(teacher.config.architecture(), expected, path, "model", advice=advice)
        names = ("bit_depth", "value_range", *(() if teacher.native_size else ("image_size",)))
        images, own = ({name: getattr(c.data, name) for name in names} for c in (teacher.config, self.config))
        check_same_settings(images, own, path, "data", advice=advice)
        self.model.load_state_dict(teacher.state_dict(), strict=False)  # it has no layers for a step's end time
        self.config = self.config.override(f"model.base={teacher.as_base()}")  # their ids are the same
        return teacher.to(self.world.device).eval().requires_grad_(False)

    def _check_same_encoder(self, path: Path, teacher: FlowMo, weights: Mapping[str, Tensor]) -> None:
        """Refuse a student whose ids are not its teacher's."""
        for name, value in teacher.state_dict().items():
            if not name.startswith("decoder.") and not torch.equal(value.cpu(), weights[name].to(value.dtype)):
                raise TrainingError(
                    f"{path} has another encoder than opt.teacher={self.config.opt.teacher}. Name its own teacher, or "
                    "leave out --resume-from-ckpt to start from the teacher's weights."
                )

    def _held_out(self, training_images: Source) -> Tensor:
        """Read the images of the sample grids, evenly spread over the held-out set, or else over the training set."""
        data = self.config.data
        source = self.open_source("val") if data.val else training_images
        source = ImageDataset(source, data.image_size, timeout=data.read_timeout, pixels=self.pixels)
        images = []
        for index in evenly_spread(GRID_IMAGES, len(source)):
            image, errors = source.load(index, 0)
            images.append(image)
            for message in errors.values() if data.val else ():  # the trainer reports training images
                self.report_unreadable(message)
        return torch.stack(images).to(self.world.device)

    def _build_evaluators(self) -> Evaluators:
        """Build the network that ``trainer.best_metric`` needs.

        Raises:
            TrainingError: there are too few images for rFID.
            FeatureNetworkError, WeightsNotFoundError: the network is not available.
        """
        metric, device = self.config.trainer.best_metric, self.world.device
        weights = self.config.opt.perceptual_weights or None
        if metric == "lpips":
            side = self.config.data.image_size
            check_side("trainer.best_metric=lpips", (side, side), SMALLEST_SIDE["alex"])
            return Evaluators(lpips_alex=LPIPS("alex", weights)).to(device)
        if metric != "rfid":
            return Evaluators()
        count = min(self.config.eval.images, len(self.open_source("val")))
        if count < MIN_IMAGES_FOR_RFID:
            raise TrainingError(
                f"trainer.best_metric=rfid needs {MIN_IMAGES_FOR_RFID} held-out images, not {count}. Raise "
                "eval.images, or name more images by data.val."
            )
        return Evaluators(features=build_features("inception", weights)).to(device)

    def forecast_arguments(self) -> tuple[Config, bool, None]:
        config = self.config
        if self.teacher is not None and not config.opt.teacher_steps:
            config = config.updated({"opt.teacher_steps": self.teacher.config.eval.sampling.sample_steps})
        return config, self.frozen, None

    # Step

    def advance(self, images: int, schedule: Schedule) -> bool:
        self.step_begin = images
        learns = self.config.stage == "pretrain" and images < schedule.freeze_encoder_after
        if self.frozen or learns or self.config.model.train == "encoder":
            return False
        self.freeze_encoder()
        return True

    def freeze_encoder(self) -> None:
        self.model.encoder.requires_grad_(False)
        self.frozen = True

    def global_batch_statistics(self, microbatches: Sequence[Tensor], first: int) -> WholeBatch:
        """Return a function from a micro-batch's statistic to the global batch's.

        With gradient accumulation, all images are encoded once beforehand. A frozen encoder needs none of this,
        because the statistic then trains nothing.
        """
        model = self.config.model
        if not self.model.quantizer.needs_whole_batch or model.entropy_statistics == "process" or self.frozen:
            return local_statistic
        if len(microbatches) == 1:
            return local_statistic if self.world.size == 1 else self.world.mean
        seen: list[Tensor] = []

        def collect(statistic: Tensor) -> Tensor:
            seen.append(statistic)
            return statistic

        with torch.no_grad(), autocast(self.config, self.world.device):
            for microbatch in microbatches:
                seed_global(self.config.trainer.seed, Stream.BOTTLENECK, first)
                self.module(self._crop(microbatch, first), None, collect)
                first += len(microbatch)
        mean = self.world.mean(torch.stack(seen).mean(dim=0))
        return lambda statistic: mean

    def loss(self, module: nn.Module, microbatch: Tensor, first: int, statistics: WholeBatch) -> Loss:
        microbatch = self._crop(microbatch, first)
        noise = TrainingNoise.of(self.config, microbatch, range(first, first + len(microbatch)))
        seed_global(self.config.trainer.seed, Stream.BOTTLENECK, first)
        with autocast(self.config, self.world.device):
            loss = module(microbatch, noise, statistics, self.frozen)
        self.usage.add(loss.ids)
        return loss

    def _crop(self, microbatch: Tensor, first: int) -> Tensor:
        """Crop all images of a step to one random size of ``data.crop_sizes``, each at a random position."""
        sizes, seed = self.config.data.crops, self.config.trainer.seed
        if not sizes:
            return microbatch
        height, width = sizes[stream_seed(seed, Stream.CROP_SIZE, self.step_begin // self.batch) % len(sizes)]
        crops = []
        for i in range(first, first + len(microbatch)):
            top = stream_seed(seed, Stream.CROP_TOP, i) % (microbatch.shape[2] - height + 1)
            left = stream_seed(seed, Stream.CROP_LEFT, i) % (microbatch.shape[3] - width + 1)
            crops.append((slice(top, top + height), slice(left, left + width)))
        return crop_images(microbatch, crops)

    def after_step(self, step: int, finite: Tensor) -> None:
        quantizer = self.model.quantizer
        if not self.frozen:
            with restored_unless(finite, list(quantizer.buffers())):
                quantizer.learn(step)

    # Evaluation

    def statistics(self) -> dict[str, float]:
        return self.usage.take()

    def build_ema(self, weights: Mapping[str, Tensor]) -> FlowMo:
        return build(self.config, weights).to(self.world.device)

    def evaluate(self, model: FlowMo) -> dict[str, float]:
        reconstructor, size = FlowMoReconstructor(model), self.config.data.image_size
        count = self.config.eval.batch_size
        # a larger batch than flowmo evaluate's would change the last digits of its metrics
        model.chunk_size = min(count, model.default_chunk_sizes[self.world.device.type != "cpu"])
        with autocast(self.config, self.world.device):
            measured = measure(
                reconstructor,
                self.open_source("val"),
                size,
                self.evaluators,
                limit=self.config.eval.images,
                batch_size=count,
                device=self.world.device,
                enlarge=True,
                on_unreadable=self.report_unreadable,
                pixels=self.pixels,
            )
        summary = Summary.of(reconstructor.name, measured, self.evaluators.features)
        # without a mean of finite PSNRs, every reconstruction equals its original
        mean_psnr = math.inf if summary.psnr is None else summary.psnr
        metrics = {"psnr": mean_psnr, "lpips": summary.lpips_alex, "rfid": summary.frechet_distance}
        return {name: value for name, value in metrics.items() if value is not None}

    @torch.no_grad()
    def sample(self, model: FlowMo) -> tuple[Image.Image, dict[str, float]]:
        """Return held-out images above their reconstructions, and metrics of them."""
        x = self.held_out
        model.chunk_size = len(x)
        with autocast(self.config, self.world.device):
            y = model.decode(model.encode(x))
        metrics = {"held_out_psnr": float(psnr(x, y).mean())}
        if self.perceptual is not None:
            metrics["held_out_distance"] = float(self.perceptual(self.pixels.visible(x), self.pixels.visible(y)).mean())
        return to_pil(grid([self.pixels.visible(images) for images in (x, y)])), metrics

    # Checkpoints

    def check(self, path: Path, metadata: Mapping) -> None:
        before, misfits = Config.from_dict(metadata["config"]), []
        if before.architecture() != self.config.architecture():
            with torch.device("meta"):
                misfits = find_misfits(FlowMo(before).state_dict(), self.model.state_dict())
        check_same_settings(before.architecture(), self.config.architecture(), path, "model", misfits)

    def foreign_weights(self, path: Path) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Yield the weights of a tokenizer file, the package's own or the authors'."""
        undetermined = ("code_length", "codebook_size_for_entropy", "enable_mup")  # not given by the authors' weights
        authors = path.suffix != ".safetensors"
        settings = tuple(f"model.{name}={getattr(self.config.model, name)}" for name in undetermined if authors)
        for part, ema in (("model", False), ("ema", True)):
            config, weights = read(path, settings, ema)
            misfits = find_misfits(weights, self.model.state_dict())
            check_same_settings(config.architecture(), self.config.architecture(), path, "model", misfits)
            bad = next((name for name, value in weights.items() if not value.isfinite().all()), None)
            if bad:
                raise TrainingError(f"{path}: {bad} holds NaN or infinite values. Start from other weights.")
            changed = changed_settings(config, self.config, IMAGES_AND_LOSS)
            if changed and part == "model":
                self.report(f"settings that differ from the model's own: {changed}")
            if self.teacher is None:
                self.config = self.config.override(f"model.base={config.model.base}")
            else:
                self._check_same_encoder(path, self.teacher, weights)
            yield part, weights
