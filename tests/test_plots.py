import json
import math
import sys

import numpy as np
import pytest
from PIL import Image

from flowmo.train.early_stopping import EarlyStopping
from flowmo.train.plots import CURVES, MOST_ROWS, PROGRESS, draw, draw_curves, read_curves


@pytest.fixture
def run(tmp_path):
    """A run's folder: ten log lines, a held-out metric, a line cut off by a kill, and twelve sample grids."""
    lines = [
        {"step": i, "images": 32 * i, "loss": 1 / i, "flow": math.nan if i == 3 else 0.5 / i, "learning_rate": 1e-3}
        for i in range(1, 11)
    ]
    lines += [{"step": i, "images": 32 * i, "eval_psnr": 20 - (i - 5) ** 2} for i in (3, 5, 8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 11, "ima')
    (tmp_path / "samples").mkdir()
    for i in range(12):
        grid = np.full((22, 40, 3), 200, dtype=np.uint8)  # originals above, reconstructions below
        grid[11:] = i
        Image.fromarray(grid).save(tmp_path / "samples" / f"{i:08d}.png")
    return tmp_path


def test_curves_are_those_of_the_log(run):
    curves = read_curves(run)
    assert curves["loss"] == [(32 * i, 1 / i) for i in range(1, 11)]
    assert [images for images, _ in curves["flow"]] == [32 * i for i in range(1, 11) if i != 3], "NaN is left out"
    assert curves["eval_psnr"] == [(96, 16), (160, 20), (256, 11)]


def test_every_metric_has_its_panel(run, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    saved = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **_: saved.append(self))
    draw_curves(read_curves(run), run / CURVES, EarlyStopping("psnr"))
    axes = {axis.get_title(): axis for axis in saved[0].axes}
    assert list(axes) == ["training", "eval_psnr, best 20", "learning rate"]
    assert [line.get_label() for line in axes["training"].lines] == ["loss", "flow"]
    best = axes["eval_psnr, best 20"].lines[1]
    assert list(best.get_xdata()) == [160, 160]


def test_progress_shows_the_whole_run(run):
    draw(run, EarlyStopping(), originals=True)
    progress = np.asarray(Image.open(run / PROGRESS))
    assert progress.shape == (11 * (MOST_ROWS + 1), 40, 3)
    assert progress[::11, 0, 0].tolist() == [200, 0, 2, 3, 5, 6, 8, 9, 11]


def test_grids_without_originals_are_shown_whole(run):
    draw(run, EarlyStopping(), originals=False)
    progress = np.asarray(Image.open(run / PROGRESS))
    assert progress.shape == (22 * MOST_ROWS, 40, 3)
    assert progress[::11, 0, 0].tolist() == [shade for i in (0, 2, 3, 5, 6, 8, 9, 11) for shade in (200, i)]


def test_without_matplotlib_or_a_log(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    draw(run, EarlyStopping(), originals=True)
    assert (run / PROGRESS).is_file()
    assert not (run / CURVES).exists()
    (run / "metrics.jsonl").unlink()
    draw(run, EarlyStopping(), originals=True)
