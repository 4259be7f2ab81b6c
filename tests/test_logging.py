"""What a run tells: metrics that plot without a service, TensorBoard, Weights & Biases, code usage."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from flowmo.config import ConfigError
from flowmo.distributed import World
from flowmo.train.logging import CodebookUsage, Meter, MetricLogger
from flowmo.train.optimizer import StepCounts


def test_an_interrupted_journal_goes_on_at_the_checkpoint(tmp_path):
    first = MetricLogger(tmp_path, True, tensorboard=False)
    first.open(0, 0, {})
    for step in range(1, 6):
        first.record(step, 10 * step, {"loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ima')  # a kill in the middle of a line
    second = MetricLogger(tmp_path, True, tensorboard=False)
    second.open(3, 30, {})
    second.record(4, 40, {"loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["images"]) for line in lines] == [(1, 10), (2, 20), (3, 30), (4, 40)]


def test_tensorboard_holds_figures_and_pictures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    journal = MetricLogger(tmp_path, True)
    journal.open(0, 0, {})
    journal.record(1, 4, {"loss": 0.25})
    journal.image(1, Image.new("RGB", (4, 2), "red"))
    journal.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.25)]
    assert [(image.width, image.height) for image in events.Images("samples")] == [(4, 2)]


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    journal = MetricLogger(tmp_path, True, lambda line: None, tensorboard=False, wandb_project="test")
    journal.open(0, 0, {"opt": {"lr": 1}})
    journal.record(1, 4, {"loss": 0.25})
    journal.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_run_keeps_its_id_of_weights_and_biases(tmp_path, monkeypatch):
    """One that began with an earlier version has its folder's name."""
    seen = []
    stub = SimpleNamespace(init=lambda **options: seen.append(options["id"]))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    folders = [tmp_path / "one" / "run", tmp_path / "two" / "run", tmp_path / "old" / "run"]
    folders[2].mkdir(parents=True)
    (folders[2] / "metrics.jsonl").write_text('{"step": 1, "images": 4}\n')
    for folder in (*folders, *folders):
        folder.mkdir(parents=True, exist_ok=True)
        MetricLogger(folder, True, lambda line: None, tensorboard=False, wandb_project="test").open(1, 4, {})
    assert seen[:3] == seen[3:]
    assert len({*seen}) == 3
    assert seen[2] == "run"


def test_weights_and_biases_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        MetricLogger(tmp_path, True, wandb_project="test")


def test_other_processes_are_silent(tmp_path):
    lines = []
    journal = MetricLogger(tmp_path / "run", False, lines.append)
    journal.open(0, 0, {})
    journal.record(1, 4, {"loss": 0.25})
    journal.report("nothing")
    journal.report("a picture of this process", everywhere=True)
    assert lines == ["a picture of this process"]
    assert not (tmp_path / "run").exists()


def test_code_usage():
    usage = CodebookUsage(4, World())
    usage.add(torch.tensor([[[0, 1], [2, 3]]]))
    usage.add(torch.tensor([[[0, 1], [2, 3]]]))
    assert usage.take() == pytest.approx({"ids_used": 1, "id_entropy": 1, "bit_entropy": 1})
    usage.add(torch.tensor([[[1, 1], [1, 1]]]))
    assert usage.take() == pytest.approx({"ids_used": 0.25, "id_entropy": 0, "bit_entropy": 0})
    usage.add(torch.tensor([[[0, 1], [1, 0]]]))
    assert usage.take() == pytest.approx({"ids_used": 0.5, "id_entropy": 0.5, "bit_entropy": 0.5})
    assert usage.take() == {}
    continuous = CodebookUsage(None, World())
    continuous.add(None)
    assert continuous.take() == {}


def test_throughput_is_in_images_without_the_pauses(monkeypatch):
    now = iter([0.0, 2.0, 5.0, 10.0, 10.0, 12.0])
    monkeypatch.setattr("flowmo.train.logging.time.perf_counter", lambda: next(now))
    meter, parts = Meter(World(), batch=4), {"loss": torch.tensor(1.0), "finite": torch.tensor(1.0)}
    meter.add(parts)
    with meter.paused():  # from 2 to 5
        pass
    meter.add(parts)
    assert meter.take()[0] == pytest.approx(2 * 4 / (10 - 3))
    meter.add(parts)
    assert meter.rate() == pytest.approx(4 / 2), "of this log line alone"


def test_the_longest_streak_of_skipped_steps_is_kept():
    counts, good, bad = StepCounts(World()), torch.tensor(1.0), torch.tensor(float("nan"))
    for loss, norm in ((bad, good), (bad, bad), (good, bad), (good, good), (bad, good)):
        counts.add(loss, norm)
    assert counts.read() == (4, 3)


def test_a_loss_that_ends_is_averaged_over_its_own_steps():
    """As the bottleneck's when the encoder freezes between two log lines; a skipped step counts for none."""
    meter = Meter(World(), batch=4)
    one = torch.tensor(1.0)
    for commitment, loss, finite in ((0.2, 1.0, 1), (0.4, 2.0, 1), (float("nan"), float("nan"), 0), (None, 6.0, 1)):
        parts = {"loss": one * loss, "finite": one * finite}
        meter.add(parts if commitment is None else {**parts, "commitment": one * commitment})
    assert meter.take()[1] == pytest.approx({"loss": 3.0, "commitment": 0.3})
