"""Stage 1A on one process: pictures in, checkpoints, a log and sample grids out.

A run lives in ``results/<experiment>/``: ``config.json``, ``metrics.jsonl`` (one line a report), ``samples/`` and
``checkpoints/``. Started again with the same name it goes on from its last checkpoint, and ends with the weights that
an unbroken run would have: the order of the pictures and every random number are functions of the seed and the step.
SIGTERM, which schedulers send, and Ctrl-C save before the run ends.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from flowmo import checkpoint
from flowmo.config import Config
from flowmo.data import Views, batches, open_source
from flowmo.errors import FlowMoError
from flowmo.evaluate.figures import grid, psnr
from flowmo.perceptual import LPIPS
from flowmo.pictures import to_picture
from flowmo.tokenizer import FlowMo
from flowmo.train.optimizer import Average, NormControl, build_optimizer, learning_rate
from flowmo.train.stages import Draws, pretrain_loss

GRID_PICTURES = 8


class TrainingError(FlowMoError, RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


class Run:
    """One training run: its models, its folder and where it is.

    Raises:
        TrainingError: the folder holds a run of other settings, or its checkpoint is damaged.
        DataError, WeightsNotFound: the pictures or the perceptual network are not there.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        device: str = "cpu",
        resume_from: Path | None = None,
        report: Callable[[str], None] = print,
    ):
        self.config, self.folder, self.report = config, folder, report
        self.device = torch.device(device)
        data = config.data
        train = open_source(data.train, data.train_index)
        self.source = Views(train, data.image_size, data.random_crop, data.random_flip)
        self.held_out = self._held_out()
        self.perceptual = None
        if config.opt.lpips_weight:
            self.perceptual = LPIPS(config.opt.lpips_mode, config.opt.perceptual_weights or None).to(self.device)
        torch.manual_seed(config.trainer.seed)
        self.tokenizer = FlowMo(config).to(self.device)
        self.optimizer = build_optimizer(self.tokenizer, config.opt)
        self.norm_control = NormControl(self.tokenizer)
        self.average = Average(self.tokenizer, config.model.ema_decay)
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.stopping = False
        self.bad: set[str] = set()
        found = self.checkpoints()
        if found or resume_from:
            self._restore(found[-1] if found else resume_from)

    def _held_out(self) -> Tensor:
        """A few pictures for the sample grids, spread over the held-out ones, or the training ones without those."""
        data = self.config.data
        held_out = open_source(data.val, data.val_index) if data.val else self.source.source
        source = Views(held_out, data.image_size)
        count = min(GRID_PICTURES, len(source))
        chosen = [i * len(source) // count for i in range(count)]
        return torch.stack([source.readable(i, 0)[0] for i in chosen]).to(self.device)

    # The loop

    def train(self) -> None:
        config, t = self.config, self.config.trainer
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(config.to_json())
        parameters = sum(p.numel() for p in self.tokenizer.parameters())
        self.report(f"{len(self.source)} pictures, {parameters / 1e6:.1f} M parameters, from step {self.step}")
        loss = torch.compile(pretrain_loss) if t.compile else pretrain_loss
        size = config.data.batch_size
        stream = batches(self.source, size, t.seed, self.step * size, config.data.num_workers, self._on_bad)
        sums: dict[str, Tensor] = {}
        since = time.perf_counter()
        counted = 0
        with self._stop_on_signals():
            while self.step < t.max_steps and not self.stopping:
                parts = self._step(next(stream).to(self.device), loss)
                if parts is not None:
                    counted += 1
                    sums = {name: sums.get(name, 0) + value for name, value in parts.items()}
                if self.step % t.log_every == 0:
                    now = time.perf_counter()
                    self._log({name: float(v) / counted for name, v in sums.items()}, now - since)
                    sums, counted, since = {}, 0, now
                if t.sample_every and self.step % t.sample_every == 0:
                    self._sample()
                    since = time.perf_counter()
                if self.step % t.checkpoint_every == 0 or self.step == t.max_steps:
                    self.save()
        if self.stopping:
            self.save()
            self.report(f"stopped at step {self.step}; the same command goes on from here")

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT ends the run after the step at hand; a second SIGINT ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, _: object) -> None:
            self.stopping = True
            signal.signal(number, before[number])

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
            self.report(f"left out: {bad[name]}")
        share = self.config.data.max_bad_share
        if len(self.bad) > max(1, share * len(self.source)):
            raise TrainingError(
                f"{len(self.bad)} of {len(self.source)} pictures cannot be read so far, more than data.max_bad_share="
                f"{share:g} of them; the last: {next(iter(bad.values()))}"
            )

    def _step(self, images: Tensor, loss: Callable) -> dict[str, Tensor] | None:
        """One optimizer step, or none where the loss or its gradient is not finite: then ``None``."""
        config = self.config
        if self.step >= config.opt.freeze_encoder_after:
            self.tokenizer.encoder.requires_grad_(False)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        draws = Draws.for_step(config, images, self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.trainer.enable_bfloat16):
            total, parts = loss(self.tokenizer, images, draws, self.perceptual)
        total.backward()
        gradients = [p.grad for p in self.tokenizer.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.step += 1
        if not (torch.isfinite(total.detach()) and torch.isfinite(norm)):
            self._skip(float(total.detach()), float(norm))
            return None
        self.skipped_in_a_row = 0
        if config.opt.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.tokenizer.parameters(), config.opt.max_grad_norm, norm)
        self.optimizer.step()
        if config.model.fix_initial_norms:
            self.norm_control.apply()
        self.average.update(self.tokenizer, self.step - 1)
        return {**parts, "gradient_norm": norm}

    def _skip(self, loss: float, norm: float) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.report(f"step {self.step} skipped: loss {loss}, gradient norm {norm}")
        if self.skipped_in_a_row >= self.config.trainer.max_skipped_steps:
            sound = self.checkpoints()
            where = f"the last checkpoint, {sound[-1]}, is sound" if sound else "there is no checkpoint yet"
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row without a finite loss and gradient, up to step {self.step}; "
                f"{where}: start again with a lower opt.lr"
            )

    def _log(self, means: dict[str, float], seconds: float) -> None:
        t, size = self.config.trainer, self.config.data.batch_size
        rate = t.log_every * size / seconds
        left = (t.max_steps - self.step) * size / rate
        shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
        clock = f"{int(left // 3600)}h{int(left % 3600 // 60):02d}"
        self.report(f"step {self.step}/{t.max_steps}  {shown}  {rate:.1f} images/s  {clock} left")
        self._record(
            {
                "images": self.step * size,
                "images_per_second": rate,
                "skipped_steps": self.skipped,
                "bad_pictures": len(self.bad),
                **means,
            }
        )

    def _record(self, values: dict[str, float]) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")

    @torch.no_grad()
    def _sample(self) -> None:
        """Held-out pictures through the averaged weights: a grid (originals above) and their figures."""
        tokenizer = checkpoint.build(self.config, self.average.state).to(self.device)
        x = self.held_out
        tokenizer.chunk_size = len(x)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.trainer.enable_bfloat16):
            y = tokenizer.decode(tokenizer.encode(x))
        figures = {"held_out_psnr": float(psnr(x, y).mean())}
        if self.perceptual is not None:
            figures["held_out_lpips"] = float(self.perceptual(x, y).mean())
        path = self.folder / "samples" / f"{self.step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        to_picture(grid([x, y])).save(path)
        self._record(figures)
        self.report(f"step {self.step}  " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items()) + f"  {path}")

    # Checkpoints

    def checkpoints(self) -> list[Path]:
        """Checkpoints of this run, oldest first."""
        return sorted((self.folder / "checkpoints").glob("[0-9]*.pth"))

    def save(self) -> None:
        path = self.folder / "checkpoints" / f"{self.step:08d}.pth"
        content = {
            "flowmo": 1,
            "config": self.config.to_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "model": self.tokenizer.state_dict(),
            "ema": self.average.state,
            "optimizer": self.optimizer.state_dict(),
            "norms": self.norm_control.state,
        }
        checkpoint.write_whole(path, lambda temporary: torch.save(content, temporary))
        t = self.config.trainer
        for old in self.checkpoints()[: -t.keep_last]:
            if not (t.keep_every and int(old.stem) % t.keep_every == 0):
                old.unlink()

    def _restore(self, path: Path) -> None:
        content = checkpoint.read_pth(path)
        if "flowmo" not in content:
            raise TrainingError(f"{path}: not a training checkpoint of flowmo, it has no optimizer state")
        before, now = content["config"]["model"], self.config.to_dict()["model"]
        changed = [f"model.{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
        if changed:
            raise TrainingError(
                f"{path} is of a model with other settings: {', '.join(changed)}; use another --experiment-name, "
                "or the settings it was started with"
            )
        self.tokenizer.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.average.load(content["ema"])
        self.norm_control.state = {name: norm.to(self.device) for name, norm in content["norms"].items()}
        self.step, self.skipped = content["step"], content.get("skipped", 0)
        self.report(f"going on from {path}")
