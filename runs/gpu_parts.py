"""What ``one_gpu.py`` runs, part by part. Each part runs in a process of its own and records what it finds as it goes.

A part that crashes, hangs or loses its CUDA context therefore leaves the others untouched.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch
from gpu_images import DeviceCrops, MemoryImages, load_packs
from torch import Tensor, nn

import flowmo
from flowmo.checkpoint import files as checkpoint
from flowmo.config import Config
from flowmo.data import Source
from flowmo.distributed import World, join
from flowmo.errors import FlowMoError
from flowmo.evaluate import speed as bench
from flowmo.evaluate.metrics.pairs import grid
from flowmo.evaluate.reconstruction import Evaluators, Reconstruction, measure, read_crops
from flowmo.evaluate.speed import matrix_rate
from flowmo.evaluate.summary import Summary
from flowmo.images import to_pil
from flowmo.losses.perceptual import BACKBONES, HEADS, RESNET, WeightsNotFoundError, find_weights
from flowmo.model.sampler import image_seed
from flowmo.precision import describe
from flowmo.train.logging import METRICS
from flowmo.train.tokenizer import TokenizerTask
from flowmo.train.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "results.json"
PIECE = 16 << 20
MOST_PIECES = 3
"""Pieces of the weights: with results.json, metrics.jsonl and samples.png at most 8 files and 64 MiB."""

PERIODS = {"log": 10.0, "checkpoint": 60.0, "sample": 120.0}
"""Seconds of training between two lines of the log, two checkpoints and two sample grids."""

SMALL_SIZES = {"data.image_size": 32, "model.patch_size": 8, "model.code_length": 6, "eval.sampling.sample_steps": 25}
LITTLE = [
    *(f"{name}={size}" for name, size in SMALL_SIZES.items()),
    *(f"model.{network}hidden_size=64" for network in ("", "enc_")),
    *(f"model.{network}num_heads=2" for network in ("", "enc_")),
    *(f"model.{network}_depth=1" for network in ("enc", "dec")),
]
LITTLE_GENERATOR = ["generator.hidden_size=64", "generator.depth=1", "generator.num_heads=2"]
CHAIN = ["model.posttrain_sample=true", "model.posttrain_sample_k=8", "opt.lpips_mode=resnet", "opt.lpips_weight=0.01"]


@dataclass(frozen=True)
class Job:
    """What one part is asked to do.

    Attributes:
        out: folder of the files that are brought back.
        state: folder of checkpoints, and of a second copy of the results.
        until: when the part should end, as ``time.time`` counts.
        packs: zip files or folders of images.
        start: weights to start training from.
        later: seconds of training that follow in later calls.
        config: YAML file of the training recipe.
        settings: ``section.name=value`` over it.
        dry_run: run everything in little, on the CPU.
    """

    part: str
    out: Path
    state: Path
    until: float
    packs: tuple[Path, ...] = ()
    start: Path | None = None
    later: float = 0.0
    config: Path = ROOT / "configs" / "nano_gpu.yaml"
    settings: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if torch.cuda.is_available() and not self.dry_run else torch.device("cpu")

    @property
    def left(self) -> float:
        """Seconds until the part should end."""
        return self.until - time.time()

    def recipe(self) -> Config:
        """The settings of the training run."""
        fixed = ["data.train=packs", "data.val=packs", "data.num_workers=0", "trainer.tensorboard=false"]
        fixed += ["trainer.best_metric=", "trainer.keep_last=2", "trainer.keep_every=0"]
        if self.dry_run:
            fixed += ["data.global_batch_size=4", "data.max_microbatch=4", "trainer.compile=false"]
        return Config.from_yaml(self.config).override(*fixed, *self.settings)

    def earlier(self) -> dict[str, Any]:
        """This part's results of an earlier call with the same code and device; empty if there are none."""
        found = read_results(self).get(self.part, {})
        return found if found.get("measured_with") == self.measured_with() else {}

    def measured_with(self) -> list[Any]:
        """What results of several calls must have in common: code, device, size."""
        measuring = [describe_sources(ROOT / folder) for folder in ("runs", "benchmarks", "tests/gpu")]
        return [describe_sources(), *measuring, torch.__version__, describe_device(self.device), self.dry_run]

    def record(self, **values: Any) -> None:
        """Put values under this part's name in ``results.json``."""
        write_results(self, {**read_results(self).get(self.part, {}), **values})


def read_results(job: Job) -> dict[str, Any]:
    """All results so far, which an earlier call may have left in the state folder only."""
    for folder in (job.state, job.out):
        if (folder / RESULTS).is_file():
            return json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    return {}


def write_results(job: Job, values: dict[str, Any]) -> None:
    """Replace one part's results in both folders, each file whole at any moment."""
    content = json.dumps({**read_results(job), job.part: values}, indent=1)
    for folder in (job.state, job.out):
        checkpoint.write_content(folder / RESULTS, content)


def run_part(job: Job) -> None:
    """Run a part in this process, record how it ended, and report an error without raising it."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    job.state.mkdir(parents=True, exist_ok=True)
    lock = (job.state / "lock").open("w")
    fcntl.lockf(lock, fcntl.LOCK_EX)  # waits for the end of a part whose call was killed
    torch.set_float32_matmul_precision("high")
    began = time.time()
    torch.backends.cudnn.benchmark = True
    job.record(device=describe_device(job.device), torch=torch.__version__, dry_run=job.dry_run)
    try:
        PARTS[job.part](job)
        job.record(status="done", seconds=round(time.time() - began, 1), traceback=None)
    except BaseException:
        job.record(status="failed", seconds=round(time.time() - began, 1), traceback=traceback.format_exc())
        traceback.print_exc()
        sys.exit(1)


def describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"


def end_with_parent() -> None:
    """End this process when the one that started it ends, however it ends."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


# check


class Recorder:
    """A pytest plugin that records each test as soon as it ends, beside those of an earlier call."""

    def __init__(self, job: Job):
        self.job = job
        self.tests: dict[str, dict[str, Any]] = job.earlier().get("tests", {})

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        name = report.nodeid.partition("::")[2]
        test = {"outcome": report.outcome, "seconds": round(report.duration, 1), **dict(report.user_properties)}
        if report.outcome == "skipped":
            test["reason"] = report.longrepr[2]
        elif report.outcome == "failed":
            test["traceback"] = str(report.longrepr)[-4000:]
        self.tests[name] = test
        counts = {
            outcome: sum(t["outcome"] == outcome for t in self.tests.values())
            for outcome in ("passed", "failed", "skipped")
        }
        self.job.record(**counts, tests=self.tests, measured_with=self.job.measured_with())


def check(job: Job) -> None:
    """The tests of ``tests/gpu``."""
    import pytest

    words = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), str(ROOT / "tests" / "gpu")]
    code = pytest.main(words, plugins=[Recorder(job)])
    if code not in (0, 1):  # 1: some tests failed, which the results say
        raise FlowMoError(f"pytest ended with {code!r} before it ran the tests of tests/gpu.")


# measure


def measure_part(job: Job) -> None:
    """Speed and memory of training steps, encoding and decoding, row by row, while the time lasts.

    A later call goes on where an earlier one ended.
    """
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from train_step import measure_largest

    device = job.device
    for _ in range(10 if device.type == "cuda" else 0):  # an idle GPU's clock is low
        matrix_rate(device, True)
    rates = {"bfloat16_tflops": matrix_rate(device, True) / 1e12}
    torch.set_float32_matmul_precision("highest")
    rates["float32_tflops"] = matrix_rate(device, False) / 1e12
    torch.set_float32_matmul_precision("high")
    rates["tf32_tflops"] = matrix_rate(device, False) / 1e12
    rows = [row for row in job.earlier().get("rows", []) if "traceback" not in row]
    wanted = dict(measurements(job, measure_largest))
    left_out = [name for name in wanted if name not in {row["name"] for row in rows}]
    about = {"matrix_rates": rounded(rates), "measured_with": job.measured_with()}
    job.record(**about, rows=rows, left_out=left_out)
    while left_out and job.left >= 5:
        name, began = left_out[0], time.time()
        torch._dynamo.reset()
        try:
            rows += [{"name": name, **rounded(row)} for row in wanted[name]()]
        except Exception:
            rows.append({"name": name, "traceback": traceback.format_exc()})
        print(f"{name}: {time.time() - began:.1f} s", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        del left_out[0]
        job.record(rows=rows, left_out=left_out)


def measurements(job: Job, measure_largest: Any) -> Iterator[tuple[str, Any]]:
    """Name and work of each row, the most telling first."""
    little, device = job.dry_run, job.device
    steps, most = (2, 2) if little else (5, 32)

    def train(config: Config) -> list[dict[str, Any]]:
        row = measure_largest(config, device, most, steps)
        if row is None:
            raise FlowMoError("Not even one image fits into the memory.")
        rate = matrix_rate(device, True)
        return [{**row, "matrix_share": 1e12 * row["tflop_per_image"] * row["images_per_second"] / rate}]

    def infer(preset: str, compiled: bool) -> list[dict[str, Any]]:
        config = flowmo.preset(preset).override(*(LITTLE if little else ()))
        with device:
            tokenizer = flowmo.FlowMo(config).eval().requires_grad_(False)
        ready = {"ready": flowmo.FlowMo.compile} if compiled else {}
        timings = bench.measure(tokenizer, 2 if little else 16, device.type == "cuda", 2, **ready)
        return [
            {"part": t.part, "images_per_second": t.images / t.seconds, "matrix_share": t.matrix_share} for t in timings
        ]

    def config(preset: str, *more: str) -> Config:
        size = () if not little else LITTLE_GENERATOR if preset == "maskgit" else LITTLE
        return flowmo.preset(preset).override(*size, *more)

    order = [("small", "1A"), ("lo", "1A"), ("small", ""), ("lo", ""), ("maskgit", "2"), ("small", "1B"), ("lo", "1B")]
    for preset, stage in order:  # hi costs what lo does
        for compiled in (False,) if little else (False, True):  # a CPU compiles for minutes
            title = f"{preset}, {f'stage {stage}' if stage else 'inference'}{', compiled' * compiled}"
            settings = config(preset, f"trainer.compile={str(compiled).lower()}", *(CHAIN if stage == "1B" else ()))
            yield title, partial(train, settings) if stage else partial(infer, preset, compiled)


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers with four significant digits."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) and math.isfinite(v) else v for k, v in values.items()}


# train


class PackTask(TokenizerTask):
    """A tokenizer's task on images in memory. Checkpoints keep the seconds of training so far."""

    def __init__(self, config: Config, world: World, report: Any, train: MemoryImages, held_out: MemoryImages):
        self.sources = {"train": train, "val": held_out}
        self.seconds = 0.0
        super().__init__(config, world, report)

    def open_source(self, part: str) -> Source:
        return self.sources[part]

    def metadata(self) -> dict[str, Any]:
        return {**super().metadata(), "seconds": self.seconds}

    def check(self, path: Path, metadata: Any) -> None:
        super().check(path, metadata)
        self.seconds = float(metadata.get("seconds", 0.0))


class TimedTrainer(Trainer):
    """A run that ends by the clock, however fast the device is.

    The length of the run in images is estimated anew before every step, as images by its end over the share of the
    time that has passed. The learning rate falls over the last ``opt.cooldown`` of that length, and so of the time. A
    later call counts the time of the earlier ones. If they announced it by ``later``, it goes on along the same
    schedule; otherwise the rate rises again.

    Args:
        job: its ``until`` ends this call.
    """

    def __init__(self, job: Job, world: World, train: MemoryImages, held_out: MemoryImages):
        config = job.recipe()
        self.job, self.packs = job, (train, held_out)
        super().__init__(config, job.state / "train", world, job.start, partial(print, flush=True))
        data = config.data
        self.crops = DeviceCrops(train.images, data.image_size, config.trainer.seed, data.random_flip, world.device)
        self.before = self.task.seconds if self.images > self.stage_begin else 0.0
        self.begun, self.images_before = time.time(), self.images
        self.end = job.until - min(10.0, 0.05 * job.left)
        self.last = dict.fromkeys(PERIODS, self.begun)
        # a resumed run may be longer than the recipe's; the first step estimates its length
        self.schedule = replace(self.schedule, duration=max(self.schedule.duration, self.images + 1))

    def build_task(self) -> PackTask:
        train, held_out = self.packs
        return PackTask(self.config, self.world, self.logger.report, train=train, held_out=held_out)

    def _batches(self) -> Generator[Tensor]:
        position = self.images
        while True:
            yield self.crops.batch(position, self.plan.total)
            position += self.plan.total

    def _step(self, batch: Tensor, module: nn.Module) -> dict[str, Tensor] | None:
        now = time.time()
        self.task.seconds = self.before + now - self.begun
        share = self.task.seconds / (self.before + self.end - self.begun + self.job.later)
        begin = self.stage_begin
        length = begin + round((self.images + self.plan.total - begin) / min(max(share, 1e-6), 1.0))
        due = {name: self._due(name, seconds, now) for name, seconds in PERIODS.items()}
        self.schedule = replace(self.schedule, duration=length, **due)
        self.asked_to_stop = self.asked_to_stop or now >= self.end
        return super()._step(batch, module)

    def _due(self, name: str, seconds: float, now: float) -> int:
        """A period in images: one step when so many seconds have passed, never otherwise."""
        if now - self.last[name] < seconds:
            return 0
        self.last[name] = now
        return self.plan.total

    def save(self) -> Path:
        path = super().save()
        weights = write_weights(self._ema_model(), self.job)
        checkpoint.write_content(self.job.out / METRICS, self._metrics())
        seconds = self.task.seconds
        progress = {"images": self.images, "steps": self.step, "train_seconds": seconds}
        rate = (self.images - self.images_before) / max(time.time() - self.begun, 1e-6)  # of this call
        self.job.record(**rounded({**progress, "images_per_second": rate}), weights=weights)
        return path

    def _metrics(self) -> str:
        path = self.folder / METRICS
        return path.read_text(encoding="utf-8") if path.is_file() else ""


def train(job: Job) -> None:
    """Train the recipe by the clock, from the last checkpoint if there is one."""
    began = time.time()
    images, held_out, counts = load_packs(job.packs, job.recipe().data.image_size)
    job.record(
        **{f"{name}_in_packs": count for name, count in counts.items()},
        packs=[pack.name for pack in job.packs],
        decode_seconds=round(time.time() - began, 1),
    )
    with join(job.device.type) as world:
        run = TimedTrainer(job, world, images, held_out)
        run.train()


def missing_weights(config: Config) -> str | None:
    """Why the perceptual network of a recipe cannot be loaded, or ``None``."""
    mode, folder = config.opt.lpips_mode, config.opt.perceptual_weights or None
    wanted = [RESNET] if mode == "resnet" else [files[net] for net in mode.split("+") for files in (BACKBONES, HEADS)]
    try:
        for names, url in wanted if config.opt.lpips_weight else ():
            find_weights(names, url, folder, download=False)
    except WeightsNotFoundError as error:
        return str(error)
    return None


def check_pieces(config: Config) -> None:
    """Refuse a model whose weights in float16 take more than ``MOST_PIECES`` pieces, before anything is spent.

    Raises:
        FlowMoError: they do.
    """
    with torch.device("meta"):
        size = 2 * sum(value.numel() for value in flowmo.FlowMo(config).state_dict().values())
    if size + 2**20 > MOST_PIECES * PIECE:  # a MiB for the header
        raise FlowMoError(f"The weights take {size >> 20} MiB, more than {MOST_PIECES} pieces of 16 MiB.")


def write_weights(tokenizer: flowmo.FlowMo, job: Job) -> dict[str, Any]:
    """Write weights in float16 as pieces of at most 16 MiB, and describe them for ``join_weights``."""
    whole = job.state / "weights.safetensors"
    flowmo.save(tokenizer, whole, torch.float16)
    content = whole.read_bytes()
    pieces = [content[start : start + PIECE] for start in range(0, len(content), PIECE)]
    job.out.mkdir(parents=True, exist_ok=True)
    for old in job.out.glob("weights.[0-9]"):
        if int(old.suffix[1:]) >= len(pieces):
            old.unlink()
    for number, piece in enumerate(pieces):
        (job.out / f".weights.{number}").write_bytes(piece)
    for number in range(len(pieces)):  # after all are written: pieces of two checkpoints do not join
        (job.out / f".weights.{number}").replace(job.out / f"weights.{number}")
    return {"bytes": len(content), "pieces": len(pieces), "sha256": hashlib.sha256(content).hexdigest()}


def join_weights(folder: Path, out: Path) -> None:
    """Put the pieces of ``write_weights`` together.

    Raises:
        FlowMoError: a piece is missing or damaged.
    """
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    described = [weights for part in ("finish", "train") if (weights := results.get(part, {}).get("weights"))]
    if not described:
        raise FlowMoError(f"{folder / RESULTS} tells of no weights. Run the parts train and finish first.")
    for weights in described:  # a later call's training replaces the pieces of an earlier one's finish
        paths = [folder / f"weights.{number}" for number in range(weights["pieces"])]
        missing = [path.name for path in paths if not path.is_file()]
        content = b"" if missing else b"".join(path.read_bytes() for path in paths)
        if hashlib.sha256(content).hexdigest() == weights["sha256"]:
            return checkpoint.write_content(out, content)
    if missing:
        raise FlowMoError(f"{folder} lacks {', '.join(missing)}. Copy all pieces of one run into it.")
    raise FlowMoError(f"The pieces in {folder} are not those that {RESULTS} describes. Copy them again.")


# finish


@dataclass
class Candidate:
    """A tokenizer at a number of steps and a rate, as a ``flowmo.evaluate.reconstruction.Reconstructor``."""

    tokenizer: flowmo.FlowMo
    steps: int
    bits_per_pixel: float | None = None
    name: str = "FlowMo"
    id_count: int | None = None

    def reconstruct(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        codes = self.tokenizer.encode(images, self.bits_per_pixel)
        decoded = self.tokenizer.decode(codes, self.steps, [image_seed(0, index) for index in indices])
        return Reconstruction(decoded, torch.full((len(images),), codes.bits / len(codes)))


def candidates(tokenizer: flowmo.FlowMo, side: int, few: bool) -> Iterator[Candidate]:
    """One pass, the model's own steps, and many; then the lower rates of a model that has several."""
    own = tokenizer.config.eval.sampling.sample_steps
    for steps in dict.fromkeys((1, own, 25)):
        yield Candidate(tokenizer, steps)
    lower = sorted(tokenizer.rates(side, side))[:-1]
    for rate in lower[:1] if few else reversed(lower):
        yield Candidate(tokenizer, own, rate)


def finish(job: Job) -> None:
    """Metrics of the EMA weights on held-out images, a grid of samples, and the weights."""
    side, device = job.recipe().data.image_size, job.device
    tokenizer = flowmo.load(job.state / "train", device=device)
    tokenizer.set_precision("auto")
    job.record(weights=write_weights(tokenizer, job), precision=describe(tokenizer.precision, device))
    _, held_out, _ = load_packs(job.packs, side, only_held_out=True)
    chosen = range(min(2 if job.dry_run else 8, len(held_out)))
    limit = min(len(held_out), 2 if job.dry_run else 256)
    evaluators, missing = Evaluators.find(features="none", download=False)
    evaluators.to(device)
    rows: list[dict[str, Any]] = []
    shown = [read_crops(held_out, chosen, side)]
    for candidate in candidates(tokenizer, side, few=job.dry_run):
        summary = Summary.of("", measure(candidate, held_out, side, evaluators, limit=limit, device=device))
        names = ("bits_per_pixel", "psnr", "ssim", "lpips_alex", "lpips_vgg")
        metrics = {name: getattr(summary, name) for name in names}
        rows.append({"steps": candidate.steps, "images": summary.images, **rounded(metrics)})
        shown.append(candidate.reconstruct(shown[0], chosen).images.cpu())
        to_pil(grid(shown)).save(job.out / "samples.png")
        job.record(rows=rows, missing=missing)


PARTS = {"check": check, "measure": measure_part, "train": train, "finish": finish}


def describe_sources(folder: Path = ROOT / "src" / "flowmo", suffixes: Sequence[str] = (".py",)) -> str:
    """A digest of the code, which names it where there is no git."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(p for p in folder.rglob("*") if p.suffix in suffixes):
        digest.update(path.read_bytes())
    return digest.hexdigest()
