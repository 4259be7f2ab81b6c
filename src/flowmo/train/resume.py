"""How a run starts, saves and resumes: its weights, optimizers, EMA and position.

Started again with the same name, a run resumes from its last checkpoint and ends with exactly the weights of an
uninterrupted run: data order and random numbers depend only on the seed and on positions in the run.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowmo.checkpoint import CheckpointError, CheckpointReadError
from flowmo.checkpoint.files import find, write_content
from flowmo.checkpoint.run_folder import BEST, CHECKPOINTS, listing
from flowmo.config import Config, ConfigError
from flowmo.distributed import World
from flowmo.tokenizer import FlowMo
from flowmo.train import start_checks, state
from flowmo.train.cost import training_memory
from flowmo.train.early_stopping import EarlyStopping
from flowmo.train.ema import EMA
from flowmo.train.generator import GeneratorTask
from flowmo.train.logging import MetricLogger
from flowmo.train.memory import machine_memory
from flowmo.train.optimizer import NormControl, StepCounts, build_optimizers
from flowmo.train.parallel import prepare
from flowmo.train.schedule import PAPER_BATCH, BatchPlan, Position, Schedule
from flowmo.train.task import Task, TrainingError, changed_settings, in_bfloat16
from flowmo.train.tokenizer import TokenizerTask

STOP = "stop"
"""A file of this name in the run's folder ends it."""
START_WEIGHTS = {"model": "the raw weights, as the release", "ema": "the EMA of the weights"}


class ResumableRun:
    """One training run: task, optimizers, EMA, folder and position.

    Args:
        folder: the run's folder; it resumes from the checkpoints there.
        world: this rank, see ``flowmo.distributed.join``.
        resume_from: initial checkpoint, used if the folder has none; any source that ``flowmo.load`` takes.
        report: prints each line of the log.

    Raises:
        TrainingError: the folder holds a run of another model, or one that started from another checkpoint.
        CheckpointError: its last checkpoint is damaged, or there is no such ``resume_from``.
        DataError, WeightsNotFoundError: the images or the perceptual network are missing.
        ConfigError: the batch cannot be split over the ranks, or there are no held-out images to evaluate on.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        world: World = World(),
        resume_from: str | Path | None = None,
        report: Callable[[str], None] = print,
    ):
        self.config, self.folder, self.world, self.device = config, folder, world, world.device
        self.checkpoint_folder = folder / CHECKPOINTS
        trainer = config.trainer
        if trainer.best_metric and not config.data.val:  # optional in a settings file, required in a run
            raise ConfigError("trainer.best_metric needs held-out images. Write data.val=IMAGES.")
        if world.main:
            self._lock = state.FolderLock(folder)
            (folder / STOP).unlink(missing_ok=True)  # one of an earlier start; from now on it is for this one
        self.logger = MetricLogger(folder, world.main, report, trainer.tensorboard, trainer.wandb_project)
        self.task = self.build_task()
        self.config = self.task.config  # a student's names its teacher as base
        self.source_identity = self._same_source()
        limits = [] if config.data.max_microbatch else world.gather(self._max_microbatch())
        limit = world.broadcast(min(limits, default=None))  # all ranks must take equally many micro-batches
        self.plan = BatchPlan.of(config, world.size, limit)
        self.module = prepare(self.task.module, world, trainer)
        self.optimizers = build_optimizers(self.task.model)
        self.norm_control = NormControl(self.task.norm_controlled)
        self.ema = EMA(self.task.model, self.plan.total)
        self.early_stopping = EarlyStopping(trainer.best_metric, trainer.patience)
        self.step = self.images = 0
        self.skipped = StepCounts(world)
        self.started_from: str | None = ""  # as the user named it; ``None`` is unknown
        self.stage_begin = 0  # images
        self.saved_at, self.saved_images = -1, 0
        self.kept_steps: list[int] = []
        self._load(resume_from)

    def build_task(self) -> Task:
        """Build the task that the settings name, with initial weights on the rank's device."""
        task: type[Task] = GeneratorTask if self.config.generator.train else TokenizerTask
        return task(self.config, self.world, self.logger.report)

    def _same_source(self) -> str:
        """Return the hash of the training set. Raises ``TrainingError`` if another rank has another set."""
        found = self.world.gather(self.task.source_identity())
        others = self.world.broadcast([rank for rank, identity in enumerate(found) if identity != found[0]])
        if others:
            raise TrainingError(
                f"Process {others[0]} finds other files in {self.config.data.train} than process 0. Give all machines "
                "the same files."
            )
        return self.world.broadcast(found[0] if found else "")

    def _max_microbatch(self) -> int:
        """Forecast the largest micro-batch that fits on the device, or in this process's part of the machine."""
        memory = machine_memory() / self.world.local_size
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
        shards = self.world.size if self.config.trainer.parallel == "fsdp" else 1
        config, *more = self.task.forecast_arguments()
        config = config.updated({"trainer.enable_bfloat16": in_bfloat16(config, self.device)})
        return training_memory(config, *more).max_images(memory, shards)

    def _schedule(self, start: Position) -> Schedule:
        return Schedule.of(self.config, self.plan.total, len(self.task.source), start, self.stage_begin)

    @property
    def position(self) -> Position:
        return Position(self.step, self.images)

    def tensors(self) -> dict[str, Tensor]:
        """Return ``model.…``, ``ema.…``, ``optimizer.….exp_avg`` and ``norms.…``: all tensors of a checkpoint.

        They are references, so reading a checkpoint into them changes the run.
        """
        model = self.task.model
        optimizer = {p: values for one in self.optimizers for p, values in one.state.items()}
        return {
            **{f"model.{name}": value.detach() for name, value in model.state_dict().items()},
            **{f"ema.{name}": value for name, value in self.ema.state.items()},
            **{
                f"optimizer.{name}.{key}": value
                for name, parameter in model.named_parameters()
                for key, value in optimizer.get(parameter, {}).items()
            },
            **{f"norms.{name}": value for name, value in self.norm_control.state.items()},
        }

    def checkpoints(self) -> list[Path]:
        """Return the run's checkpoints, oldest first."""
        return listing(self.checkpoint_folder)

    def _ema_model(self) -> nn.Module | None:
        """Build a model of the EMA weights on rank 0 (``None`` elsewhere), on all ranks together."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)  # room for its activations
        weights = {n: w.full_tensor() if isinstance(w, DTensor) else w for n, w in self.ema.state.items()}
        return self.task.build_ema(weights) if self.world.main else None

    # Start and resume

    def _load(self, resume_from: str | Path | None) -> None:
        """Resume from the folder, or else start from ``resume_from``, and build the schedule from there."""
        if self.world.main:
            state.tidy(self.checkpoint_folder)
        found = self.world.broadcast(self.checkpoints())
        if found:
            self._resume(found)
            if resume_from and self.started_from is not None:
                self._check_same_start(str(resume_from), self.started_from)
        elif resume_from:
            self._start_from(find(resume_from))
            self.started_from = str(resume_from)
        self.saved_images = self.images
        self.schedule = self._schedule(self.position)
        if resume_from and not found and self.images >= self.schedule.duration:
            raise ConfigError(
                f"{resume_from} is at step {self.step} ({self.images} images), which has reached trainer.duration="
                f"{self.config.trainer.duration}. For {start_checks.POSTTRAIN_STEPS} steps more write "
                f"trainer.duration='{self.step + start_checks.POSTTRAIN_STEPS} steps'."
            )

    def _check_same_start(self, named: str, recorded: str) -> None:
        """Refuse to resume a run under the name of another checkpoint, whose weights would be ignored."""
        if not recorded:
            self.logger.report(f"{named} is not used: this run began without it, and resumes")
        elif Path(named).resolve() != Path(recorded).resolve():
            if os.sep in recorded and not Path(recorded).exists():  # moved, or of another machine
                self.logger.report(f"{named} is not used: this run started from {recorded}, and resumes")
                return
            raise TrainingError(
                f"{self.folder} holds a run that started from {recorded}, not from {named}. Use another "
                "--experiment-name, or resume it without --resume-from-ckpt."
            )

    def _resume(self, found: list[Path]) -> None:
        """Restore the newest of the run's own checkpoints."""
        try:
            metadata = state.read_metadata(found[-1])
            new_stage = self._begins_stage(metadata)
            self._restore(found[-1], metadata, optimizer=not new_stage)
        except CheckpointReadError:
            raise
        except CheckpointError as error:
            advice = f"Delete it to resume from {found[-2]}" if len(found) > 1 else "It is the only one of this run"
            raise TrainingError(f"{str(error).rstrip('.')}. {advice}.") from None
        self.started_from = metadata.get("started_from")
        self.stage_begin = self.images if new_stage else metadata.get("stage_begin", 0)
        # all of an older version's run, which did not record it
        self.kept_steps = metadata.get("kept_steps", [int(path.stem) for path in found])
        if new_stage:
            self._restart_ema(found[-1], self._start_weights())
            if metadata.get("best_step") is not None:  # the new stage has a best checkpoint of its own
                self.kept_steps = [*self.kept_steps, metadata["best_step"]]
        else:
            self.early_stopping.load_state_dict(metadata)
            self._report_differences(metadata)

    def _report_differences(self, metadata: dict) -> None:
        """Report a training set or a batch that is not the checkpoint's; ``_restore`` reports settings."""
        if metadata.get("source", self.source_identity) != self.source_identity:
            self.logger.report(
                "the training set has other files than at the checkpoint: the rest of this epoch repeats images or "
                "leaves some out"
            )
        batch = metadata.get("batch", self.plan.total)
        if batch != self.plan.total:
            self.logger.report(f"the batch differs from the checkpoint's: {batch} -> {self.plan.total} images")

    def _start_from(self, path: Path) -> None:
        """Start at the position of another run's or the authors' checkpoint, or at step 0 from bare weights.

        A checkpoint of the same stage gives its optimizer and EMA too.
        """
        config, weights = self.config, self._start_weights()
        metadata = {} if path.suffix == ".safetensors" else state.read_metadata(path)
        if metadata.get("flowmo") == state.FORMAT:
            new_stage = self._begins_stage(metadata)
            self._restore(path, metadata, optimizer=not new_stage)
            self.stage_begin = self.images if new_stage else metadata.get("stage_begin", 0)
        else:
            for part, values in self.task.foreign_weights(path):
                state.fill(path, self.tensors(), {f"{part}.{name}": value for name, value in values.items()})
            self.norm_control.remember()
            self.step, self.images = self._authors_position(path, metadata)
            # the authors' files do not say their stage
            new_stage = (config.stage, config.model.train) != ("pretrain", "all") or not self.step
            new_stage |= bool(config.trainer.start_weights)
            self.stage_begin = self.images  # with a fresh optimizer
            if self.step:
                self.logger.report(f"starting from the weights of {path}")
            else:
                weights = config.trainer.start_weights or "ema"  # as flowmo.load
                self.logger.report(
                    f"starts a new run from the weights of {path}: step 0, a fresh optimizer, an EMA of these weights"
                )
        if new_stage:
            self._restart_ema(path, weights)

    def _begins_stage(self, metadata: dict) -> bool:
        """Return whether this run trains something else than the run of a checkpoint did."""
        trained = Config.from_dict(metadata["config"]).model.train
        return (metadata["stage"], trained) != (self.config.stage, self.config.model.train)

    def _start_weights(self) -> str:
        """Weights from which a new stage starts: ``model`` or ``ema``.

        A decoder that is trained alone keeps the ids of the EMA, which ``flowmo.load`` gives.
        """
        ids_stay = self.config.stage == "pretrain" and self.config.model.train == "decoder"
        return self.config.trainer.start_weights or ("ema" if ids_stay else "model")

    def _restart_ema(self, path: Path, weights: str) -> None:
        """Restart the EMA from the ``model`` or ``ema`` weights of a checkpoint, and record its tokenizer as base."""
        self.ema.restart(from_ema=weights == "ema")
        self.norm_control.remember()
        model = self._ema_model()
        self._set_base(self.world.broadcast(model.as_base() if isinstance(model, FlowMo) else ""))
        if self.step or self.config.trainer.start_weights:
            self.logger.report(
                f"starts from {START_WEIGHTS[weights]}, of {path}, with a fresh EMA of them "
                f"(trainer.start_weights={weights})"
            )

    def _authors_position(self, path: Path, metadata: dict) -> Position:
        """Position of an authors' checkpoint, or 0 if it has none or this run would already be over."""
        steps = metadata.get("total_steps", 0)
        if not isinstance(steps, int) or steps < 0:
            raise TrainingError(f"{path}: total_steps is not a number of steps.")
        position = Position(steps, steps * PAPER_BATCH)
        return position if self._schedule(position).duration > position.images else Position()

    def _set_base(self, base: str) -> None:
        """Record the base tokenizer in both configs."""
        self.config = self.task.config = self.config.override(f"model.base={base}")

    def _restore(self, path: Path, metadata: dict, optimizer: bool = True) -> None:
        if metadata.get("flowmo") != state.FORMAT:
            raise TrainingError(f"{path} is not a training checkpoint of this version of flowmo.")
        self.task.check(path, metadata)
        before = Config.from_dict(metadata["config"])
        if self.config.opt.teacher and before.opt.teacher and before.model.base != self.config.model.base:
            raise TrainingError(
                f"{path} is of a student of {before.model.base.partition('-')[0]}, and opt.teacher="
                f"{self.config.opt.teacher} is {self.config.model.base.partition('-')[0]} or has another encoder. Name "
                "the student's teacher, or start another run."
            )
        optimizer = optimizer and before.model.train == self.config.model.train
        if optimizer and before.opt.optimizer != self.config.opt.optimizer:
            raise TrainingError(f"{path} has another optimizer's state. Write opt.optimizer={before.opt.optimizer}.")
        targets = {name: t for name, t in self.tensors().items() if optimizer or not name.startswith("optimizer.")}
        state.restore(path, targets)
        self._set_base(before.model.base)
        self.step, self.images = metadata["step"], metadata["images"]
        self.skipped = StepCounts(self.world, metadata["skipped"])
        self.logger.report(f"resumed from {path}")
        changed = changed_settings(before, self.config)
        if changed:
            self.logger.report(f"settings that differ from the checkpoint's: {changed}")

    # Save

    def save(self) -> Path:
        """Write a checkpoint and delete those that the settings do not keep, on all ranks together.

        The first checkpoint at or after each multiple of ``trainer.keep_every`` is kept.
        """
        keep = self.schedule.keep
        if keep and self.images // keep > self.saved_images // keep:
            self.kept_steps = [*self.kept_steps, self.step]
        metadata = {
            "config": self.config.to_dict(),
            "stage": self.config.stage,
            "step": self.step,
            "images": self.images,
            "batch": self.plan.total,
            "source": self.source_identity,
            "started_from": self.started_from,
            "stage_begin": self.stage_begin,
            "kept_steps": self.kept_steps,
            "skipped": self.skipped.read()[0],
            **self.early_stopping.state_dict(),
            **self.task.metadata(),
        }
        path = state.save(self.checkpoint_folder, self.step, self.tensors(), metadata, self.world)
        self.saved_at, self.saved_images = self.step, self.images
        if self.world.main:
            if self.early_stopping.step is None:  # the best one of another stage is not this stage's
                (self.folder / BEST).unlink(missing_ok=True)
            else:  # each time, in case a kill came between the two files
                write_content(self.folder / BEST, f"{self.early_stopping.step:08d}")
            kept = {*self.kept_steps, self.early_stopping.step}
            for old in self.checkpoints()[: -self.config.trainer.keep_last]:
                if int(old.stem) not in kept:
                    state.remove(old)
        return path
