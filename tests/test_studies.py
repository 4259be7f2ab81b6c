"""Studies at their smallest scale, which proves the machinery and no claim."""

import json

import pytest
from conftest import PICTURES

from flowmo.cli import main
from flowmo.studies import SCALES, STUDIES
from flowmo.studies.study import StudyError, cell, markdown_table, mean_and_deviation, read_results


def test_means_and_cells():
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_deviation([1.0]) == (1.0, 0.0)
    assert mean_and_deviation([1.0, None]) is None
    assert cell([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert cell([2.5], 2) == "2.50"
    assert cell([None], 2) == "–"
    assert markdown_table(["a", "b"], [["1", "2"]]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_every_scale(name):
    import importlib

    study = importlib.import_module(STUDIES[name])
    assert set(study.SCALES) == set(SCALES)
    for scale in study.SCALES.values():
        assert scale.cost


def test_posttrain_smoke(trained_weights, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(trained_weights))
    places = ["--results-dir", tmp_path / "results", "--out", tmp_path / "out"]
    words = ["study", "posttrain", "--data", PICTURES, "--held-out", PICTURES, *places, "--device", "cpu"]
    assert main([str(word) for word in words]) == 0
    found = json.loads((tmp_path / "out" / "posttrain-smoke.json").read_text())
    assert [row["kind"] for row in found["rows"]] == ["base", "more", "one-step", "sample"]
    assert all(row["pictures"] == 8 for row in found["rows"])
    assert all(row["seconds"] > 0 for row in found["rows"])
    assert len({row["psnr"] for row in found["rows"]}) == 4, "every arm is a model of its own"
    text = (tmp_path / "out" / "posttrain-smoke.md").read_text()
    assert text.count("\n| ") == 6
    assert "(a) sample, weight 0.01" in text
    runs = tmp_path / "results" / "posttrain-smoke"
    for path in (tmp_path / "out" / "posttrain-smoke.png", runs / "pictures.png"):
        assert path.stat().st_size > 5000
    assert (runs / "base" / "checkpoints").is_dir()
    assert not (runs / "sample-0.01-seed1" / "checkpoints").exists(), "what was measured gives back its room"
    (tmp_path / "out" / "posttrain-smoke.md").unlink()
    assert main([str(word) for word in words]) == 0  # trains and measures nothing again
    assert (tmp_path / "out" / "posttrain-smoke.md").read_text() == text
    (tmp_path / "out" / "posttrain-smoke.md").unlink()
    assert main(["study", "posttrain", "--redraw", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "posttrain-smoke.md").read_text() == text


def test_generate_smoke(trained_weights, class_folder, tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(trained_weights))
    places = ["--results-dir", tmp_path / "results", "--out", tmp_path / "out", "--models", tiny_model]
    words = ["study", "generate", "--data", class_folder, "--held-out", class_folder, *places, "--device", "cpu"]
    assert main([str(word) for word in words]) == 0
    found = json.loads((tmp_path / "out" / "generate-smoke.json").read_text())
    kinds = ["originals", "floor", "ceiling", "t1-g1.5", "halton", "bits"]
    assert [row["kind"] for row in found["rows"]] == kinds
    assert found["rows"][0]["frechet_distance"] == pytest.approx(0, abs=1e-2)
    assert found["classes"] == ["tench", "English springer", "parachute"]
    text = (tmp_path / "out" / "generate-smoke.md").read_text()
    assert text.count("\n| ") == 8
    assert (tmp_path / "out" / "generate-smoke.png").stat().st_size > 5000
    assert (tmp_path / "results" / "generate-smoke" / "tiny-bits" / "classes.png").stat().st_size > 1000
    (tmp_path / "out" / "generate-smoke.md").unlink()
    assert main([str(word) for word in words]) == 0  # trains and measures nothing again
    assert (tmp_path / "out" / "generate-smoke.md").read_text() == text


def test_generate_needs_classes(trained_weights, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(trained_weights))
    words = ["study", "generate", "--data", PICTURES, "--held-out", PICTURES, "--models", tiny_model]
    assert main([str(word) for word in [*words, "--results-dir", tmp_path, "--out", tmp_path]]) == 2
    assert "one folder a class" in capsys.readouterr().err


def test_studies_that_cannot_start(tmp_path, capsys):
    assert main(["study", "posttrain", "--out", str(tmp_path)]) == 2
    assert "name the pictures" in capsys.readouterr().err
    assert main(["study", "posttrain", "--redraw", "--out", str(tmp_path)]) == 2
    assert "no results to draw" in capsys.readouterr().err
    from flowmo.studies.study import Place

    with pytest.raises(StudyError, match="without --redraw"):
        read_results(Place("posttrain", "cpu", "", "", tmp_path, tmp_path))
