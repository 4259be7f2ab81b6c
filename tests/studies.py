"""Studies at their smallest scale: how tests run one."""

import importlib
import json

import pytest
from conftest import PICTURES

from flowmo.train.trainer import Trainer
from reproduce import runner
from reproduce.__main__ import main
from reproduce.runner import Study, read_results


def study_of(name, folder, evaluators, *models):
    images, about = str(PICTURES), {"report": str, "models": models, "evaluators": evaluators}
    return Study(name, "smoke", images, images, folder / "results", folder / "out", **about)


def run_study(study, monkeypatch):
    """A study's rows and page. Run and drawn again, it has the same page and trains nothing."""
    pytest.importorskip("matplotlib")
    recipe = importlib.import_module(f"reproduce.{study.name}")
    runner.run(recipe, study)
    page = study.out / f"{study.stem}.md"
    text = page.read_text()
    assert (study.out / f"{study.stem}.png").stat().st_size > 3000
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train", lambda self: pytest.fail("trains again"))
        for again in (runner.run, runner.write_page):
            page.unlink()
            again(recipe, study)
            assert page.read_text() == text
    return read_results(study)["rows"], text


def run_by_command(name, images, folder, *words):
    """A study's results and page, by the command line. Run and drawn again, it has the same page."""
    pytest.importorskip("matplotlib")
    out = folder / "out"
    page = out / f"{name}-smoke.md"
    places = ("--data", images, "--held-out", images, "--results-dir", folder / "results", "--out", out)
    command = [name, *places, "--device", "cpu", *words]
    pages = []
    for again in (command, command, [name, "--redraw", "--out", out]):
        page.unlink(missing_ok=True)
        assert main([str(word) for word in again]) == 0
        pages.append(page.read_text())
    assert pages == pages[:1] * 3
    assert page.with_suffix(".png").stat().st_size > 5000
    return json.loads(page.with_suffix(".json").read_text()), pages[0]
