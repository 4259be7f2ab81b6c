"""What studies share: trainings that are made once, and figures that are measured once, as files."""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import flowmo
from flowmo.checkpoint.files import write_content
from flowmo.checkpoint.run_folder import CHECKPOINTS
from flowmo.config import Config
from flowmo.data import open_source
from flowmo.distributed import World
from flowmo.errors import FlowMoError
from flowmo.evaluate.reconstruction import Evaluators, FlowMoReconstructor, Reconstructor, Throughput, measure
from flowmo.evaluate.summary import Summary
from flowmo.tokenizer import FlowMo
from flowmo.train.state import read_metadata
from flowmo.train.trainer import Trainer

FIGURES = "figures.json"


class StudyError(FlowMoError, RuntimeError):
    """A study that cannot go on; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where a study finds its pictures, trains, and writes what it found.

    Attributes:
        results: folder of the runs; a study that was interrupted goes on from what is there.
        out: folder of ``STUDY-SCALE.md``, ``.json`` and the plots.
        report: takes each line of the log.
        models: tokenizers, for studies of trained ones.
    """

    name: str
    scale: str
    train: str
    held_out: str
    results: Path
    out: Path
    world: World = World()
    report: Callable[[str], None] = print
    models: tuple[str, ...] = ("nano",)

    @property
    def stem(self) -> str:
        return f"{self.name}-{self.scale}"

    def folder(self, run: str) -> Path:
        """Of one of the study's runs."""
        return self.results / self.stem / run


@dataclass(frozen=True)
class Trained:
    """A run's last checkpoint, the images it has seen, and the seconds and the images that this run took."""

    checkpoint: Path
    images: int
    seconds: float


def train(
    config: Config,
    run: str,
    place: Place,
    start: Path | None = None,
    begin: Callable[[Trainer], None] | None = None,
) -> Trained:
    """Train under ``place``, or find it done.

    Args:
        start: checkpoint of another run to start from.
        begin: changes a run that has seen no pictures yet.

    Raises:
        StudyError: it was asked to stop; it goes on from there the next time.
    """
    folder = place.folder(run)
    data = (f"data.train={place.train}", f"data.val={place.held_out}")
    training = Trainer(config.override(*data), folder, place.world, start, place.report)
    if begin is not None and not training.images:
        begin(training)
    if training.images < training.schedule.duration:
        training.train()
    if training.images < training.schedule.duration:
        raise StudyError(f"stopped in {run}; the same command goes on from here")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    begun = read_metadata(start)["images"] if start else 0
    seconds, before = 0.0, begun
    for line in lines:
        if "images_per_second" in line:
            seconds, before = seconds + (line["images"] - before) / line["images_per_second"], line["images"]
    if before > begun:  # what came after the last line went as fast
        seconds *= (training.images - begun) / (before - begun)
    return Trained(training.checkpoints()[-1], training.images, seconds)


def once(run: str, place: Place, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run: made by ``make``, or what it made before, kept in the run's folder."""
    path = place.folder(run) / FIGURES
    if path.is_file():
        return json.loads(path.read_text())
    row = {"run": run, **make()}
    if place.world.main:
        write_content(path, json.dumps(row, indent=1))
    return row


def measured(
    tokenizer: FlowMo, place: Place, judges: Evaluators, pictures: int, noise_scale: float = 1.0
) -> dict[str, Any]:
    """Figures of a tokenizer on held-out pictures."""
    candidate = FlowMoReconstructor(tokenizer, noise_scale=noise_scale)
    return figures_of(candidate, tokenizer.config.data.image_size, place, judges, pictures)


def judged_count(place: Place, most: int) -> int:
    """Of how many held-out pictures figures are: ``most``, or all where there are fewer."""
    return min(most, len(open_source(place.held_out)))


def figures_of(
    candidate: Reconstructor, side: int, place: Place, judges: Evaluators, pictures: int, pace: Throughput | None = None
) -> dict[str, Any]:
    """Figures of anything that makes pictures into bits and back, on held-out pictures."""
    source, world = open_source(place.held_out), place.world
    found = measure(
        candidate, source, side, judges, limit=pictures, device=world.device, world=world, enlarge=True, throughput=pace
    )
    summary = Summary.of(candidate.name, found, judges.features)
    place.report("\n".join(summary.lines()))
    return summary.as_dict()


def with_settings(tokenizer: FlowMo, *settings: str) -> FlowMo:
    """The same weights with other settings of the sampler."""
    other = copy.copy(tokenizer)
    other.config = tokenizer.config.override(*settings)
    return other


def named_models(place: Place) -> Iterator[tuple[str, FlowMo]]:
    """Each of ``place.models``, by a name of its own that folders can have."""
    taken: set[str] = set()
    for source in place.models:
        path = Path(source)
        # results/STUDY/RUN/checkpoints/STEP.pth is known by its run
        stem = path.parent.parent.name if path.parent.name == CHECKPOINTS else path.stem
        name = stem if stem not in taken else f"{stem}-{len(taken) + 1}"
        taken.add(name)
        yield name, flowmo.load(source, device=str(place.world.device))


def forget_checkpoints(run: str, place: Place) -> None:
    """Give back the room of a run that was measured."""
    if place.world.main:
        shutil.rmtree(place.folder(run) / "checkpoints", ignore_errors=True)


def machine(device: torch.device) -> str:
    """What figures of time were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores"


def write_results(place: Place, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """All figures and what they were made with, as the file that tables and plots are drawn from."""
    if not place.world.main:
        return
    versions = {"flowmo": flowmo.__version__, "torch": torch.__version__, "python": platform.python_version()}
    about = {"study": place.name, "scale": place.scale, "versions": versions, "machine": machine(place.world.device)}
    content = {**about, **facts, "rows": list(rows)}
    place.out.mkdir(parents=True, exist_ok=True)
    path = place.out / f"{place.stem}.json"
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_content(path, text)


def read_results(place: Place) -> dict[str, Any]:
    """What ``write_results`` wrote.

    Raises:
        StudyError: it is not there.
    """
    path = place.out / f"{place.stem}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: no results to draw ({error}); run the study without --redraw") from None
