"""Training loop of every stage: step, log, evaluate, save.

A run lives in ``results/<experiment>/``: ``config.json``, ``metrics.jsonl``, ``tensorboard/``, ``samples/``,
``checkpoints/``, and ``ended`` when it is complete. SIGTERM, Ctrl-C and a file named ``stop`` in the folder save a
checkpoint and end it. How it resumes is in ``resume.py``.
"""

from collections.abc import Generator, Iterator
from contextlib import closing

from torch import Tensor, nn

from flowmo.checkpoint.files import write_content
from flowmo.checkpoint.run_folder import ENDED, SETTINGS
from flowmo.data import batches
from flowmo.evaluate.speed import peak_flops
from flowmo.precision import multiplies_bfloat16
from flowmo.train import start_checks
from flowmo.train.cost import training_flops
from flowmo.train.failures import plain_errors, plain_evaluation_errors, stop_on_signals
from flowmo.train.logging import Meter
from flowmo.train.memory import used_memory
from flowmo.train.optimizer import clip_gradients, set_learning_rate, step_if
from flowmo.train.parallel import accumulating, wrap_ddp
from flowmo.train.plots import draw
from flowmo.train.resume import STOP, ResumableRun
from flowmo.train.task import TrainingError, in_bfloat16

__all__ = ["Trainer", "TrainingError"]


class Trainer(ResumableRun):
    """Train a run. Takes the arguments of ``ResumableRun`` and raises its errors."""

    asked_to_stop = False
    """True once this rank has received a signal."""
    stopping = False
    """True once any rank was asked to stop; equal on all ranks."""

    # Train

    def train(self) -> None:
        """Train to the end, or until a signal, the stop file or early stopping; save a checkpoint in any case."""
        self.unreadable: set[str] = set()  # names of images
        if self.world.main:
            (self.folder / ENDED).unlink(missing_ok=True)
            write_content(self.folder / SETTINGS, self.config.to_json())
        self.world.barrier()
        self.logger.open(self.step, self.images, self.config.to_dict())
        self.logger.report(self._describe())
        self.logger.report(start_checks.describe(self.config, self.position, self.schedule))
        try:
            # close the loader after an error too: its workers ignore signals, and exiting would wait for them
            errors = plain_errors(self.plan, self._max_microbatch)
            with stop_on_signals(self._ask_to_stop):  # to the last save: torchrun sends SIGTERM twice
                with errors, closing(self._batches()) as rank_batches:
                    self._loop(rank_batches)
                self._finish()
        finally:
            self.logger.close()

    def _loop(self, rank_batches: Iterator[Tensor]) -> None:
        module = wrap_ddp(self.module, self.world)
        meter = Meter(self.world, self.plan.total, self.skipped.read()[0])
        while self.images < self.schedule.duration and not self.stopping and not self.early_stopping.exhausted:
            if self.task.advance(self.images, self.schedule):
                module = wrap_ddp(self.module, self.world)
            meter.add(self._step(next(rank_batches).to(self.device, non_blocking=True), module))
            schedule = self.schedule
            self.logger.progress(lambda: self._progress(meter.rate()))
            if schedule.is_due(schedule.log, self.images):
                self._log(meter)
            if schedule.is_due(schedule.sample, self.images):
                with meter.paused(), plain_evaluation_errors():
                    self._sample()
            if schedule.is_due(schedule.checkpoint, self.images) or self.images >= schedule.duration:
                with meter.paused():
                    meter.skipped = self._check_skipped(meter.skipped)
                    with plain_evaluation_errors():
                        self._evaluate()
                    self.save()
                    if self.world.main:
                        draw(self.folder, self.early_stopping, self.task.samples_show_originals)
                    self.world.barrier()
            asked = self.asked_to_stop or (self.world.main and (self.folder / STOP).exists())
            self.stopping = self.world.any(asked)

    def _finish(self) -> None:
        if self.stopping and self.images < self.schedule.duration:
            if self.saved_at != self.step:
                self.save()
            self.logger.report(f"Stopped at step {self.step}. Run the same command again to resume.")
        elif self.world.main:
            (self.folder / ENDED).touch()
        best = self.early_stopping
        if best.metric and best.step is not None:
            early = "ended early, " if best.exhausted else ""
            self.logger.report(f"{early}best checkpoint: step {best.step}, held-out {best.metric} {best.value:.4f}")

    def _ask_to_stop(self) -> None:
        self.asked_to_stop = True

    def _describe(self) -> str:
        parameters = sum(p.numel() for p in self.task.model.parameters())
        plan = self.plan
        processes = f"{plan.world_size} process{'es' * (plan.world_size > 1)}"
        split = f"{processes} × {plan.accumulation_steps} × {plan.microbatch}"
        return (
            f"{len(self.task.source)} images, {parameters / 1e6:.1f} M parameters, batch {plan.total} = {split}, "
            f"from step {self.step} ({self.images} images)"
            + ("" if multiplies_bfloat16(self.device) else ", in float32: this device multiplies no bfloat16")
        )

    def _batches(self) -> Generator[Tensor]:
        """Yield this rank's batches without end, from the run's position on."""
        data, plan = self.config.data, self.plan
        return batches(
            self.task.source,
            plan.per_rank,
            self.config.trainer.seed,
            self._first_position(),
            data.num_workers,
            self._on_unreadable,
            global_batch=plan.total,
            pin_memory=self.device.type == "cuda",
            timeout=data.read_timeout,
        )

    def _first_position(self) -> int:
        """Position in the run of this rank's first item in the next batch."""
        return self.images + self.world.rank * self.plan.per_rank

    def _on_unreadable(self, errors: dict[str, str]) -> None:
        """Report each unreadable image once."""
        for name in errors.keys() - self.unreadable:
            self.unreadable.add(name)
            self.logger.report(f"left out: {errors[name]}", everywhere=True)
        self._check_unreadable()

    def _check_unreadable(self) -> None:
        """Raise ``TrainingError`` if more images than one and than ``data.max_bad_share`` are unreadable.

        Ranks exchange their unreadable images at each log line.
        """
        share, total = self.config.data.max_bad_share, len(self.task.source)
        if len(self.unreadable) > max(1, share * total):
            raise TrainingError(
                f"{len(self.unreadable)} of {total} images cannot be read so far, more than "
                f"data.max_bad_share={share:g} of them. One is {min(self.unreadable)}."
            )

    # Step

    def _step(self, batch: Tensor, module: nn.Module) -> dict[str, Tensor]:
        """Take one optimizer step on this rank's part of a batch; skip the update if loss or gradient is not finite.

        Returns the values to log; ``finite`` is 1 or 0.
        """
        opt, plan, model = self.config.opt, self.plan, self.task.model
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, self.schedule.learning_rate(opt, self.images))
            optimizer.zero_grad(set_to_none=True)
        first, microbatches = self._first_position(), batch.split(plan.microbatch)
        statistics = self.task.global_batch_statistics(microbatches, first)
        sums: dict[str, Tensor] = {}
        for i, microbatch in enumerate(microbatches):
            with accumulating(module, last=i == len(microbatches) - 1):
                result = self.task.loss(module, microbatch, first + i * plan.microbatch, statistics)
                (result.loss / plan.accumulation_steps).backward()
            sums = {name: sums.get(name, 0) + value / plan.accumulation_steps for name, value in result.parts.items()}
        norm = clip_gradients(model.parameters(), opt.max_grad_norm)
        step, self.step, self.images = self.step, self.step + 1, self.images + plan.total
        finite = self.skipped.add(sums["loss"], norm)
        for optimizer in self.optimizers:
            step_if(optimizer, finite)
        if self.config.model.fix_initial_norms:
            self.norm_control.apply(finite)
        self.task.after_step(step, finite)
        self.ema.update(step, finite)
        return {**sums, "gradient_norm": norm, "finite": finite}

    def _check_skipped(self, before: int) -> int:
        """Report steps skipped since the count was ``before``, and return the count.

        Raises:
            TrainingError: ``trainer.max_skipped_steps`` in a row were skipped.
        """
        skipped, in_a_row = self.skipped.read()
        if skipped > before:
            steps = f"{skipped - before} step{'s' * (skipped - before > 1)}"
            self.logger.report(f"{steps} up to step {self.step} skipped: loss or gradient is not finite")
        if in_a_row >= self.config.trainer.max_skipped_steps:
            found = self.checkpoints()
            last = f"The last checkpoint, {found[-1]}, is sound" if found else "There is no checkpoint yet"
            raise TrainingError(
                f"{in_a_row} steps in a row without a finite loss and gradient, up to step {self.step}. "
                f"{last}. Start again with a lower opt.lr{' and opt.muon_lr' * (self.config.opt.optimizer == 'muon')}."
            )
        return skipped

    # Log and evaluate

    def _progress(self, rate: float) -> str:
        left = (self.schedule.duration - self.images) / max(rate, 1e-9)
        clock = f"{int(left // 3600)}h{int(left % 3600 // 60):02d}"
        share = self.images / self.schedule.duration
        return f"step {self.step}  {self.images} images ({share:.1%})  {rate:.1f} images/s  {clock} left"

    def _utilisation(self, rate: float) -> float:
        """Model FLOP utilisation (MFU): FLOP/s of the training step over the devices' peak."""
        peak, _ = peak_flops(self.device, in_bfloat16(self.config, self.device))
        return training_flops(*self.task.forecast_arguments()) * rate / (peak * self.world.size)

    def _log(self, meter: Meter) -> None:
        meter.skipped = self._check_skipped(meter.skipped)
        rate, means = meter.take()
        self.unreadable.update(*self.world.gather(self.unreadable))
        self._check_unreadable()
        with meter.paused():  # the first forecast takes seconds
            mfu, memory = self._utilisation(rate), used_memory(self.device) / 2**30
        values = {
            "images_per_second": rate,
            "flop_utilisation": mfu,
            "memory_gib": memory,
            "learning_rate": self.schedule.learning_rate(self.config.opt, max(self.images - self.plan.total, 0)),
            "skipped_steps": meter.skipped,
            "unreadable_images": len(self.unreadable),
            **means,
            **self.task.statistics(),
        }
        shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
        self.logger.report(f"{self._progress(rate)}  MFU {mfu:.1%}  {memory:.1f} GiB  {shown}")
        self.logger.record(self.step, self.images, values)

    def _evaluate(self) -> None:
        """Measure the EMA weights on held-out data for early stopping."""
        best = self.early_stopping
        if not best.metric:
            return
        model, value = self._ema_model(), 0.0
        if model is not None:
            metrics = self.task.evaluate(model)
            value = metrics[best.metric]
            self.logger.record(self.step, self.images, {f"eval_{name}": metric for name, metric in metrics.items()})
        value = self.world.broadcast(value)
        improved = best.update(self.step, value)
        verdict = "the best so far" if improved else f"the best is step {best.step} with {best.value:.4f}"
        self.logger.report(f"step {self.step}  held-out {best.metric} {value:.4f}, {verdict}")

    def _sample(self) -> None:
        """Write a sample grid of the EMA weights, and their metrics."""
        model = self._ema_model()
        if model is not None:
            image, metrics = self.task.sample(model)
            path = "" if image is None else f"  {self.logger.image(self.step, image)}"
            self.logger.record(self.step, self.images, metrics)
            self.logger.report(f"step {self.step}  " + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()) + path)
        self.world.barrier()
