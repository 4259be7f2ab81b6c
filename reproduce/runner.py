"""Run a recipe: each training and measurement once, kept as files, then one results file and one page."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import flowmo
from flowmo.checkpoint.files import write_content
from flowmo.checkpoint.run_folder import CHECKPOINTS, SETTINGS
from flowmo.config import Config, flatten
from flowmo.data import evenly_spread, open_source
from flowmo.distributed import World
from flowmo.evaluate.metrics.pairs import grid
from flowmo.evaluate.reconstruction import Evaluators, FlowMoReconstructor, Reconstructor, measure, read_crops
from flowmo.evaluate.summary import Summary
from flowmo.images import to_pil
from flowmo.tokenizer import FlowMo
from flowmo.train.state import read_metadata
from flowmo.train.trainer import Trainer
from reproduce import StudyError, page

ROW_FILE = "figures.json"
SAMPLES_KEPT = 6


Row = dict[str, Any]
"""One measurement, as it is written to JSON."""
Rows = Iterator[Row]
Results = Mapping[str, Any]
"""Content of a results file."""


class Scale(SimpleNamespace):
    """Size of a study: ``images`` held-out images at most, ``seeds`` of each training, and what a recipe adds."""

    seeds = 1


class Recipe(Protocol):
    """A module of this package. The first line of its docstring is the title of the page.

    Attributes:
        SCALES: a ``Scale`` for each name of ``reproduce.SCALES``.
        TAKES_MODELS: optional; True if it measures ``--models``.
    """

    SCALES: Mapping[str, Scale]

    def rows(self, study: Study, metadata: Row) -> Rows:
        """Yield the results, one dict per measurement. ``metadata`` takes what the page needs beside them."""

    def body(self, results: Results, plot: Path) -> str:
        """Draw ``plot`` from a results file and return the body of the page."""


class Trained(NamedTuple):
    """A run's last checkpoint, the images it has seen, and its training time in seconds."""

    checkpoint: Path
    images: int
    seconds: float


@dataclass(frozen=True)
class Study:
    """One recipe at one scale on one data set.

    Attributes:
        data, held_out: sources of images to train on and to measure on.
        results: folder of the runs. An interrupted study resumes from it.
        out: folder of ``NAME-SCALE.md``, ``.json`` and ``.png``.
        report: callback for each line of the log.
        models: tokenizers for recipes that measure trained ones.
    """

    name: str
    scale: str
    data: str
    held_out: str
    results: Path
    out: Path
    world: World = World()
    report: Callable[[str], None] = print
    models: tuple[str, ...] = ("nano",)
    evaluators: Evaluators = field(default_factory=Evaluators)

    @property
    def stem(self) -> str:
        return f"{self.name}-{self.scale}"

    def folder(self, run: str) -> Path:
        return self.results / self.stem / run

    # Training and measuring

    def train(
        self, config: Config, run: str, start: Path | None = None, prepare: Callable[[Trainer], None] | None = None
    ) -> Trained:
        """Train a run, or resume it, or return it if it is complete.

        Args:
            start: checkpoint of another run to start from.
            prepare: changes a fresh run before its first step.

        Raises:
            StudyError: the run was asked to stop, or was begun with other settings.
        """
        config = self.settings(config, run, may_go_on=start is None)
        trainer = Trainer(config, self.folder(run), self.world, start, self.report)
        if prepare is not None and not trainer.images:
            prepare(trainer)
        if trainer.images < trainer.schedule.duration:
            trainer.train()
        if trainer.images < trainer.schedule.duration:
            raise StudyError(f"Stopped in {run}. Run the same command again to resume.")
        begin = read_metadata(start)["images"] if start else 0
        seconds, last = 0.0, begin
        for line in map(json.loads, (self.folder(run) / "metrics.jsonl").read_text().splitlines()):
            if "images_per_second" in line:
                seconds, last = seconds + (line["images"] - last) / line["images_per_second"], line["images"]
        if last > begin:  # extend to the images after the last log line
            seconds *= (trainer.images - begin) / (last - begin)
        return Trained(trainer.checkpoints()[-1], trainer.images, seconds)

    def settings(self, config: Config, run: str, may_go_on: bool = False) -> Config:
        """Return a run's settings with this study's images.

        Raises:
            StudyError: it was begun with other settings, see ``check_same_training``.
        """
        config = config.override(f"data.train={self.data}", f"data.val={self.held_out}")
        path = self.folder(run) / SETTINGS
        if path.is_file():
            check_same_training(path.parent, Config.from_yaml(path), config, may_go_on)
        return config

    def once(self, run: str, make: Callable[[], Row]) -> Row:
        """Return a run's row: the one kept in its folder, else the result of ``make``, which is kept.

        Raises:
            StudyError: the kept row is of other images, or was measured by other networks.
        """
        path = self.folder(run) / ROW_FILE
        images = hashlib.sha256(f"{self.data}\n{self.held_out}".encode(errors="surrogateescape")).hexdigest()[:16]
        networks = self.evaluators.describe()
        if path.is_file():
            row = json.loads(path.read_text())
            if row.pop("images_from", images) != images:
                raise StudyError(f"{path.parent} has a row of other images. Remove it, or name another --results-dir.")
            kept = row.pop("evaluators", networks)
            if kept != networks:
                raise StudyError(
                    f"{path.parent} has a row measured with {kept or 'no networks'}, not {networks or 'none'}. "
                    "Provide the same networks, remove the row's folder, or name another --results-dir."
                )
            return row
        row = {"run": run, **make()}
        if self.world.main:
            write_content(path, json.dumps({**row, "images_from": images, "evaluators": networks}, indent=1))
        return row

    def trained_row(self, run: str, config: Config, limit: int, start: Path | None = None, **about: Any) -> Row:
        """Train a run and measure it on at most ``limit`` images, once. Returns ``about`` and its metrics."""
        self.settings(config, run)

        def make() -> Row:
            trained = self.train(config, run, start)
            tokenizer = self.load(trained.checkpoint)
            self.keep_samples(run, tokenizer)
            times = {"seconds": trained.seconds, "images": trained.images}
            return {**about, **times, **self.measure(tokenizer, limit)}

        return self.once(run, make)

    def load(self, model: str | Path, *settings: str) -> FlowMo:
        return flowmo.load(model, *settings, device=str(self.world.device)).set_precision("auto")

    def load_models(self, distilled: bool = True) -> Iterator[tuple[str, str, FlowMo]]:
        """Yield (model, unique name, tokenizer) for ``models``, without students unless ``distilled``.

        Raises:
            StudyError: kept rows of this name are of other weights or of other images.
        """
        taken: set[str] = set()
        for source in self.models:
            path = Path(source)
            # results/STUDY/RUN/checkpoints/STEP.pth is named after its run
            stem = path.parent.parent.name if path.parent.name == CHECKPOINTS else path.stem
            name = stem if stem not in taken else f"{stem}-{len(taken) + 1}"
            taken.add(name)
            tokenizer = self.load(source)
            if tokenizer.config.model.mean_velocity and not distilled:
                self.report(f"{name} is skipped: a distilled model has one solver, no guidance and no velocity.")
                continue
            self.check_same_model(name, tokenizer)
            yield source, name, tokenizer

    def check_same_model(self, name: str, tokenizer: FlowMo) -> None:
        """Refuse rows that were kept under a model's name, but of other weights or other images."""
        path, content = self.folder(f"{name}.txt"), f"{tokenizer.weights_identity()} {self.data} {self.held_out}"
        if path.is_file() and path.read_text() != content:
            raise StudyError(f"{path.parent} has figures of another {name}, or on other images. Remove them.")
        self.world.barrier()  # all ranks have read it
        if self.world.main:
            write_content(path, content)

    def count(self, limit: int) -> int:
        """Number of held-out images that a measurement of at most ``limit`` uses."""
        return min(limit, len(open_source(self.held_out)))

    def measure(self, tokenizer: FlowMo, limit: int, noise_scale: float = 1.0) -> Row:
        """Metrics of a tokenizer on at most ``limit`` held-out images."""
        candidate = FlowMoReconstructor(tokenizer, noise_scale=noise_scale)
        return self.evaluate(candidate, tokenizer.config.data.image_size, limit)

    def evaluate(self, candidate: Reconstructor, side: int, limit: int) -> Row:
        """Metrics of any reconstructor on central crops of ``side`` pixels."""
        source, world = open_source(self.held_out), self.world
        found = measure(
            candidate, source, side, self.evaluators, limit=limit, device=world.device, world=world, enlarge=True
        )
        summary = Summary.of(candidate.name, found, self.evaluators.features)
        self.report("\n".join(summary.lines()))
        row = world.broadcast(summary.as_dict())  # the other ranks have no distances of features
        row["pictures"] = row.pop("images")  # "images" of a row are those of training
        return row

    def delete_checkpoints(self, run: str) -> None:
        if self.world.main:
            shutil.rmtree(self.folder(run) / CHECKPOINTS, ignore_errors=True)

    # Images, kept beside the runs: not all of them may be published

    def held_out_images(self, count: int, side: int) -> tuple[list[int], Tensor]:
        """Indices of at most ``count`` evenly spread held-out images, and the images (b 3 side side in [−1, 1])."""
        source = open_source(self.held_out)
        indices = evenly_spread(min(count, len(source)), len(source))
        return indices, read_crops(source, indices, side, enlarge=True)

    def keep_samples(self, run: str, tokenizer: FlowMo) -> None:
        """Save some held-out images and their reconstructions in a run's folder."""
        indices, x = self.held_out_images(SAMPLES_KEPT, tokenizer.config.data.image_size)
        self.keep_images(run, originals=x, samples=tokenizer.decode(tokenizer.encode(x), seed=indices).cpu())

    def keep_images(self, run: str, **rows: Tensor) -> None:
        """Save each batch (b 3 h w) as one row of images, ``NAME.png``, in a run's folder."""
        if self.world.main:
            self.folder(run).mkdir(parents=True, exist_ok=True)
            for name, images in rows.items():
                to_pil(grid([images[:SAMPLES_KEPT]])).save(self.folder(run) / f"{name}.png")


def check_same_training(run: Path, saved: Config, now: Config, may_go_on: bool) -> None:
    """Raise ``StudyError`` if a run was begun with other settings.

    Args:
        may_go_on: accept a longer training, which changes nothing of what the run has done, if it has no cool-down.
    """
    before, after = flatten(saved), flatten(now) | {"model.base": saved.model.base}  # runs write it
    old, new = saved.trainer.duration, now.trainer.duration
    if may_go_on and not now.opt.cooldown and old.unit == new.unit and old.amount < new.amount:
        before["trainer.duration"] = new
    changed = [f"{name}={value}" for name, value in before.items() if value != after[name]]
    if changed:
        raise StudyError(f"{run} was trained with {', '.join(changed)}. Remove it to train it anew.")


def run(recipe: Recipe, study: Study) -> None:
    """Compute the rows that are missing, and write the results and the page, of a study that is cut short too.

    Raises:
        StudyError: no rows, or a run was asked to stop.
    """
    images = study.count(recipe.SCALES[study.scale].images)
    metadata: Row = {"pictures": images, "judges": study.evaluators.describe()}
    rows: list[Row] = []
    try:
        for row in recipe.rows(study, metadata):
            rows.append(row)
            write_results(study, metadata | {"unfinished": True}, rows)
        if not rows:
            raise StudyError("None of the models can be measured. Name others with --models.")
        write_results(study, metadata, rows)
    finally:
        if rows and study.world.main:
            show_samples(study, rows)
            write_page(recipe, study)
            study.report(f"Page: {study.out / study.stem}.md")


def show_samples(study: Study, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``pictures.png``: the first seed's samples of every arm below the originals, if the recipe keeps any."""
    strips = {"originals": study.folder(rows[0]["run"]) / "originals.png"}
    for row in rows:
        strips.setdefault(row.get("label", row["run"]), study.folder(row["run"]) / "samples.png")
    strips = {label: path for label, path in strips.items() if path.is_file()}
    if strips:
        page.image_strips(strips, study.folder("pictures.png"))


def machine(device: torch.device) -> str:
    """Description of the hardware, for times."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU core{'s' * (cores != 1)}"


def write_results(study: Study, metadata: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``NAME-SCALE.json``, from which pages are drawn."""
    if not study.world.main:
        return
    versions = {"flowmo": flowmo.__version__, "torch": torch.__version__, "python": platform.python_version()}
    about = {"study": study.name, "scale": study.scale, "versions": versions, "machine": machine(study.world.device)}
    study.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, **metadata, "rows": list(rows)}, indent=1, ensure_ascii=False)
    write_content(study.out / f"{study.stem}.json", text)


def read_results(study: Study) -> dict[str, Any]:
    """Read what ``write_results`` wrote. Raises ``StudyError`` if there is none."""
    path = study.out / f"{study.stem}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StudyError(f"Cannot read {path}: {error}. Run the study without --redraw first.") from None


def write_page(recipe: Recipe, study: Study) -> None:
    """Write ``NAME-SCALE.md`` and its plot from the results in ``study.out``."""
    results, title = read_results(study), (recipe.__doc__ or "").splitlines()[0].rstrip(".")
    models = ""
    if "models" in results or getattr(recipe, "TAKES_MODELS", False):
        models = " --models " + " ".join(results.get("models", ["MODEL", "..."]))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    unfinished = "**Unfinished: more rows follow.**\n\n" if results.get("unfinished") else ""
    note = f"{results['note']}\n\n" if "note" in results else ""  # written by hand into published results
    text = f"""# Study: {title}, at scale `{study.scale}`

    python -m reproduce {study.name} --scale {study.scale} --data IMAGES --held-out HELD_OUT{models}

{unfinished}{note}{recipe.body(results, study.out / f"{study.stem}.png").strip()}

![metrics]({study.stem}.png)

{results["machine"]}, {versions}
"""
    write_content(study.out / f"{study.stem}.md", text)
