"""A training run of any stage: data in, checkpoints, a log and samples out, on one process or many.

A run lives in ``results/<experiment>/``: ``config.json``, ``metrics.jsonl`` (one line a report), ``tensorboard/``,
``samples/`` and ``checkpoints/``, and ``ended`` once it has come to its end. Started again with the same name it goes
on from its last checkpoint, and ends with the weights that an unbroken run would have: the order of the items and
every random number are functions of the seed and of an item's place in the run. SIGTERM, which schedulers send,
Ctrl-C, and a file named ``stop`` in the folder save before the run ends.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flowmo.checkpoint.distributed import ShardedError
from flowmo.checkpoint.files import CheckpointError, write_content
from flowmo.checkpoint.run_folder import BEST, CHECKPOINTS, ENDED, SETTINGS, listing
from flowmo.config import Config, ConfigError, flatten
from flowmo.data import batches
from flowmo.distributed import World
from flowmo.train import intent, state
from flowmo.train.cost import peak_flops
from flowmo.train.early_stopping import EarlyStopping, plot
from flowmo.train.ema import EMA
from flowmo.train.failures import in_one_line, within_memory
from flowmo.train.finite import StepCounts
from flowmo.train.logging import MetricLogger
from flowmo.train.memory import machine_memory
from flowmo.train.optimizer import NormControl, build_optimizer, clip_gradients, set_learning_rate, step_all
from flowmo.train.parallel import accumulating, prepare, synchronise
from flowmo.train.schedule import PAPER_BATCH, BatchPlan, Position, Schedule
from flowmo.train.task import Task, TrainingError, build_task, in_bfloat16, multiplies_bfloat16

__all__ = ["Trainer", "TrainingError"]


class Trainer:
    """One training run: its models, its folder and where it is.

    Args:
        folder: what the run writes, and goes on from.
        world: this process and the others, see ``flowmo.distributed.join``.
        resume_from: checkpoint to start from while the folder has none.
        report: takes each line of the log.
        build: makes the task.

    Raises:
        TrainingError: the folder holds a run of another model.
        CheckpointError, StateError: its last checkpoint is damaged.
        DataError, WeightsNotFoundError: the pictures or the perceptual network are not there.
        ConfigError: the batch cannot be shared by the processes, or checkpoints are to be judged on no pictures.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        world: World = World(),
        resume_from: Path | None = None,
        report: Callable[[str], None] = print,
        build: Callable[[Config, World, Callable[[str], None]], Task] = build_task,
    ):
        self.config, self.folder, self.world = config, folder, world
        self.device = world.device
        trainer = config.trainer
        if trainer.best_metric and not config.data.val:  # a settings file need not name pictures, a run must
            raise ConfigError("trainer.best_metric needs held-out pictures; write data.val=PICTURES")
        self._lock = FolderLock(folder) if world.main else None
        self.journal = MetricLogger(folder, world.main, report, trainer.tensorboard, trainer.wandb_project)
        self.task = build(config, world, self.journal.report)
        self.plan = BatchPlan.of(config, world.size, self._max_images())
        self.module = prepare(self.task.module, world, trainer)
        self.optimizer = build_optimizer(self.task.model)
        self.norm_control = NormControl(self.task.norm_controlled)
        self.average = EMA(self.task.model, self.plan.total)
        self.guard = EarlyStopping(trainer.best_metric, trainer.patience)
        self.step = self.images = 0
        self.skipped = StepCounts(world)
        self.asked_to_stop = False  # this process, at any moment
        self.stopping = False  # all of them, agreed on after a step
        self.saved_at = -1
        self.bad: set[str] = set()
        if world.main:
            state.tidy(self.checkpoint_folder)
        found = world.broadcast(self.checkpoints())
        if found:
            self._go_on_from(found)
        elif resume_from:
            self._start_from(resume_from)
        start = Position(self.step, self.images)
        self.times = Schedule.of(config, self.plan.total, len(self.task.source), start)
        if resume_from and not found:
            intent.check_length(config, resume_from, start, self.times)

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def stop_file(self) -> Path:
        return self.folder / "stop"

    def checkpoints(self) -> list[Path]:
        """Checkpoints of this run, oldest first."""
        return listing(self.checkpoint_folder)

    def _max_images(self) -> int | None:
        """Items of one pass that the memory holds, where the settings do not say how many to take."""
        return None if self.config.data.max_microbatch else self._fitting()

    def _fitting(self) -> int:
        """Items of one pass that the memory of the device, or this process's part of the machine's, holds."""
        on_gpu = self.device.type == "cuda"
        cost = self.task.cost(fused=on_gpu or not in_bfloat16(self.config, self.device))
        shards = self.world.size if self.config.trainer.parallel == "fsdp" else 1
        if on_gpu:
            return cost.max_images(torch.cuda.get_device_properties(self.device).total_memory, shards)
        return cost.max_images(machine_memory() / self.world.local_size, shards)

    # The loop

    def train(self) -> None:
        """Train to the end, or until a signal or the stop file ends the run early; both leave a checkpoint."""
        if self.world.main:
            self.stop_file.unlink(missing_ok=True)
            (self.folder / ENDED).unlink(missing_ok=True)
            (self.folder / SETTINGS).write_text(self.config.to_json())
        self.world.barrier()
        self.journal.open(self.step, self.images, self.config.to_dict())
        self.journal.report(self._describe())
        self.journal.report(intent.describe(self.config, Position(self.step, self.images), self.times))
        try:
            with self._stop_on_signals(), in_one_line(), within_memory(self.plan, self._fitting):
                self._loop()
            if self.stopping and self.images < self.times.duration:
                if self.saved_at != self.step:
                    self.save()
                self.journal.report(f"stopped at step {self.step}; the same command goes on from here")
            elif self.world.main:
                (self.folder / ENDED).touch()
            if self.guard.metric and self.guard.step is not None:
                early = "ended early, " if self.guard.exhausted else ""
                best = f"held-out {self.guard.metric} {self.guard.value:.4f}"
                self.journal.report(f"{early}best checkpoint: step {self.guard.step}, {best}")
        finally:
            self.journal.close()

    def _loop(self) -> None:
        module = synchronise(self.module, self.world)
        # Closed also after an error: its workers ignore signals, and the interpreter would wait for them for ever.
        with closing(self._batches()) as stream:
            self._steps(stream, module)

    def _steps(self, stream: Iterator[Tensor], module: torch.nn.Module) -> None:
        """Steps over ``stream`` until the run's end or a request to stop."""
        plan = self.plan
        meter = Meter(self.world, self.skipped.read()[0])
        while self.images < self.times.duration and not self.stopping and not self.guard.exhausted:
            if self.task.advance(self.images, self.times):
                module = synchronise(self.module, self.world)
            meter.add(self._step(next(stream).to(self.device, non_blocking=True), module))
            self.journal.live(lambda: self._progress(meter.rate(plan.total)))
            if self.times.due(self.times.log, self.images):
                self._log(meter)
            if self.times.due(self.times.sample, self.images):
                with meter.paused():
                    self._sample()
            if self.times.due(self.times.checkpoint, self.images) or self.images >= self.times.duration:
                with meter.paused():
                    meter.skipped = self._check_skipped(meter.skipped)
                    self._judge()
                    self.save()
            asked = self.asked_to_stop or (self.world.main and self.stop_file.exists())
            self.stopping = self.world.any(asked)[0]

    def _batches(self) -> Generator[Tensor]:
        """Endless batches for this process, from the run's position on."""
        data, plan = self.config.data, self.plan
        return batches(
            self.task.source,
            plan.per_process,
            self.config.trainer.seed,
            self.images + self.world.rank * plan.per_process,
            data.num_workers,
            self._on_bad,
            global_batch=plan.total,
            pin_memory=self.device.type == "cuda",
            timeout=data.read_timeout,
        )

    def _describe(self) -> str:
        parameters = sum(p.numel() for p in self.task.model.parameters())
        plan = self.plan
        shared = f"{plan.processes} process{'es' * (plan.processes > 1)} × {plan.passes} × {plan.microbatch}"
        return (
            f"{len(self.task.source)} pictures, {parameters / 1e6:.1f} M parameters, batch {plan.total} = {shared}, "
            f"from step {self.step} ({self.images} images)"
            + ("" if multiplies_bfloat16(self.device) else ", in float32: this CPU multiplies no bfloat16")
        )

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT ends the run after the step at hand; a second SIGINT ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, _: object) -> None:
            self.asked_to_stop = True
            if number == signal.SIGINT:  # torchrun sends SIGTERM to a process and to its group: it comes twice
                signal.signal(signal.SIGINT, before[signal.SIGINT])

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_bad(self, bad: dict[str, str]) -> None:
        """Names each unreadable picture once, and ends the run where they are too many to be accidents."""
        for name in bad.keys() - self.bad:
            self.bad.add(name)
            self.journal.report(f"left out: {bad[name]}", everywhere=True)
        share = self.config.data.max_bad_share
        if len(self.bad) > max(1, share * len(self.task.source)):
            raise TrainingError(
                f"{len(self.bad)} of {len(self.task.source)} pictures cannot be read so far, more than "
                f"data.max_bad_share={share:g} of them; the last: {next(iter(bad.values()))}"
            )

    def _step(self, batch: Tensor, module: torch.nn.Module) -> dict[str, Tensor]:
        """One optimizer step on this process's items of a batch, which changes no weights where loss or gradient is
        not finite. Returns what the log averages; ``finite`` is 1 or 0."""
        config, plan = self.config, self.plan
        set_learning_rate(self.optimizer, self.times.rate(config.opt, self.images))
        self.optimizer.zero_grad(set_to_none=True)
        first = self.images + self.world.rank * plan.per_process
        chunks = batch.split(plan.microbatch)
        shared = self.task.share(chunks, first)
        sums: dict[str, Tensor] = {}
        for i, chunk in enumerate(chunks):
            with accumulating(module, last=i == len(chunks) - 1):
                loss = self.task.loss(module, chunk, first + i * plan.microbatch, shared)
                (loss.total / plan.passes).backward()
            sums = {name: sums.get(name, 0) + value / plan.passes for name, value in loss.parts.items()}
        parameters = list(self.task.model.parameters())
        norm = clip_gradients(parameters, config.opt.max_grad_norm)
        step, self.step, self.images = self.step, self.step + 1, self.images + plan.total
        finite = self.skipped.add(sums["loss"], norm)
        step_all(self.optimizer, finite)
        if config.model.fix_initial_norms:
            self.norm_control.apply(finite)
        self.task.stepped(step, finite)
        self.average.update(step, finite)
        return {**sums, "gradient_norm": norm, "finite": finite}

    def _check_skipped(self, before: int) -> int:
        """Read the count of skipped steps, which were ``before`` at the last log line, and say if there are more.

        Raises:
            TrainingError: ``trainer.max_skipped_steps`` were skipped in a row.
        """
        skipped, in_a_row = self.skipped.read()
        if skipped > before:
            more = skipped - before
            self.journal.report(
                f"{more} step{'s' * (more > 1)} up to step {self.step} skipped: loss or gradient is not finite"
            )
        if in_a_row >= self.config.trainer.max_skipped_steps:
            sound = self.checkpoints()
            where = f"the last checkpoint, {sound[-1]}, is sound" if sound else "there is no checkpoint yet"
            raise TrainingError(
                f"{in_a_row} steps in a row without a finite loss and gradient, up to step {self.step}; "
                f"{where}: start again with a lower opt.lr"
            )
        return skipped

    # What it tells

    def _progress(self, rate: float) -> str:
        left = (self.times.duration - self.images) / max(rate, 1e-9)
        clock = f"{int(left // 3600)}h{int(left % 3600 // 60):02d}"
        share = self.images / self.times.duration
        return f"step {self.step}  {self.images} images ({share:.1%})  {rate:.1f} images/s  {clock} left"

    def _utilisation(self, rate: float) -> float:
        """Model FLOP utilisation: FLOPs of the training step a second over the devices' peak."""
        peak, _ = peak_flops(self.device, in_bfloat16(self.config, self.device))
        return self.task.cost().flops * rate / (peak * self.world.size)

    def _log(self, meter: Meter) -> None:
        skipped = meter.skipped = self._check_skipped(meter.skipped)
        rate, means = meter.take(self.plan.total)
        bad = int(self.world.sum(torch.tensor(float(len(self.bad)), device=self.device)))
        system = {
            "images_per_second": rate,
            "flop_utilisation": self._utilisation(rate),
            "memory_gib": used_memory(self.device) / 2**30,
        }
        usage = self.task.statistics()
        shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
        state_of_machine = f"MFU {system['flop_utilisation']:.1%}  {system['memory_gib']:.1f} GiB"
        self.journal.report(f"{self._progress(rate)}  {state_of_machine}  {shown}")
        counts = {"skipped_steps": skipped, "bad_pictures": bad}
        rates = {"learning_rate": self.times.rate(self.config.opt, self.images)}
        self.journal.record(self.step, self.images, {**system, **rates, **counts, **means, **usage})

    def _averaged(self) -> torch.nn.Module | None:
        """A model of the averaged weights in the main process, ``None`` in the others; all call this together."""
        weights = {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in self.average.state.items()
        }
        return self.task.averaged(weights) if self.world.main else None

    def _judge(self) -> None:
        """Measure the averaged weights on held-out data, and remember whether they are the best so far."""
        metric = self.guard.metric
        if not metric:
            return
        model, value = self._averaged(), 0.0
        if model is not None:
            figures = self.task.judge(model)
            value = figures[metric]
            self.journal.record(self.step, self.images, {f"eval_{name}": figure for name, figure in figures.items()})
            plot(self.folder, metric)
        value = self.world.broadcast(value)
        better = self.guard.judge(self.step, value)
        best = "the best so far" if better else f"the best is step {self.guard.step} with {self.guard.value:.4f}"
        self.journal.report(f"step {self.step}  held-out {metric} {value:.4f}, {best}")

    def _sample(self) -> None:
        """What the averaged weights can do, as a picture and figures."""
        model = self._averaged()
        if model is None:
            return
        picture, figures = self.task.show(model)
        where = "" if picture is None else f"  {self.journal.picture(self.step, picture)}"
        self.journal.record(self.step, self.images, figures)
        self.journal.report(f"step {self.step}  " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items()) + where)

    # Checkpoints

    @property
    def state(self) -> state.State:
        return state.State(self.task.model, self.average, self.optimizer, self.norm_control)

    def save(self) -> Path:
        """Write a checkpoint and drop the older ones that the settings do not keep; all processes together."""
        facts = {
            "config": self.config.to_dict(),
            "stage": self.task.stage,
            "step": self.step,
            "images": self.images,
            "skipped": self.skipped.read()[0],
            **self.guard.facts(),
            **self.task.facts(),
        }
        path = state.save(self.checkpoint_folder, self.step, self.state, facts, self.world)
        self.saved_at = self.step
        if self.world.main:
            if self.guard.step == self.step:
                write_content(self.folder / BEST, path.stem)
            for old in self.checkpoints()[: -self.config.trainer.keep_last]:
                if not self._kept(int(old.stem)) and int(old.stem) != self.guard.step:
                    state.remove(old)
        return path

    def _kept(self, step: int) -> bool:
        """Whether the checkpoint of a step was the first at or past a multiple of ``trainer.keep_every``."""
        images = self.images - (self.step - step) * self.plan.total
        every = max(self.times.checkpoint, self.plan.total)
        return bool(self.times.keep) and images // self.times.keep > (images - every) // self.times.keep

    def _go_on_from(self, found: list[Path]) -> None:
        """Restore the newest of this run's own checkpoints."""
        try:
            self._restore(found[-1])
        except (CheckpointError, ShardedError, state.StateError) as error:
            advice = f"remove it to go on from {found[-2]}" if len(found) > 1 else "it is the only one of this run"
            raise TrainingError(f"{error}; {advice}") from None

    def _start_from(self, path: Path) -> None:
        """Start with the weights and the position of another run's checkpoint, or of the authors'.

        The same stage goes on with its optimizer and EMA; a new stage starts both afresh.
        """
        if not path.is_dir() and not path.is_file():
            raise TrainingError(f"{path}: no such checkpoint")
        facts = {} if path.suffix == ".safetensors" else state.read_metadata(path)
        if facts.get("flowmo") == state.FORMAT:
            self._restore(path, optimizer=facts["stage"] == self.task.stage)
            self.guard = EarlyStopping(self.guard.metric, self.guard.patience)  # the best of this run, not of that
            if facts["stage"] != self.task.stage:
                self._start_stage(path)
            return
        for part, weights in self.task.foreign_weights(path):
            state.fill(path, self.state.tensors(), {f"{part}.{name}": value for name, value in weights.items()})
        self.norm_control.remember()
        steps = facts.get("total_steps", 0)
        if not isinstance(steps, int) or steps < 0:
            raise TrainingError(f"{path}: total_steps is no number of steps")
        self.step = steps
        self.images = self.step * PAPER_BATCH
        self.journal.report(f"starting from the weights of {path}")
        if self.task.stage != "pretrain":  # the stage of a file that does not say it
            self._start_stage(path)

    def _start_stage(self, path: Path) -> None:
        """Start a stage from another stage's weights: a fresh EMA of them, and their norms as those to keep."""
        chosen = self.config.trainer.start_weights
        self.average.restart(from_average=chosen == "ema")
        self.norm_control.remember()
        told = {"model": "the trained weights, as the release", "ema": "the EMA of the weights"}[chosen]
        self.journal.report(f"starts from {told}, of {path}, with a fresh EMA of them (trainer.start_weights={chosen})")

    def _restore(self, path: Path, optimizer: bool = True) -> None:
        facts = state.read_metadata(path)
        if facts.get("flowmo") != state.FORMAT:
            raise TrainingError(f"{path}: not a training checkpoint of this version of flowmo")
        self.task.check(path, facts)
        state.restore(path, self.state, optimizer)
        self.step, self.images = facts["step"], facts["images"]
        self.skipped = StepCounts(self.world, facts["skipped"])
        self.guard.restore(facts)
        self.journal.report(f"going on from {path}")
        before, now = flatten(Config.from_dict(facts["config"])), flatten(self.config)
        changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name]]
        if changed:
            self.journal.report(f"settings that differ from the checkpoint's: {', '.join(changed)}")


class FolderLock:
    """Keeps another process's run out of a folder; gone with the process that holds it, however it ends.

    It is a POSIX record lock, which works over NFS and which the data loader's forked processes do not inherit: they
    may outlive a killed run for some seconds.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TrainingError(f"{folder}: another run is writing there; end it, or use another name") from None

    def __del__(self) -> None:
        os.close(self._descriptor)


class Meter:
    """Means of the losses and the rate of images since they were last taken."""

    def __init__(self, world: World, skipped: int = 0):
        self.world, self.skipped = world, skipped
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.since = time.perf_counter()

    def add(self, parts: dict[str, Tensor]) -> None:
        """A step's parts; those of a skipped step, whose ``finite`` is 0, do not count."""
        self.steps += 1
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(parts["finite"] > 0, value.float(), 0.0)

    def rate(self, batch: int) -> float:
        return self.steps * batch / max(time.perf_counter() - self.since, 1e-9)

    def take(self, batch: int) -> tuple[float, dict[str, float]]:
        """Images a second, and the means over steps and processes; starts anew."""
        means: dict[str, float] = {}
        if self.sums:
            values = self.world.mean(torch.stack([value.float() for value in self.sums.values()]))
            means = dict(zip(self.sums, values.tolist(), strict=True))
            counted = means.pop("finite")
            means = {name: value / counted for name, value in means.items()} if counted else {}
        rate = self.rate(batch)
        self._restart()
        return rate, means

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no training."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start


def used_memory(device: torch.device) -> int:
    """Most bytes that this process has held at once, on its GPU if it has one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
