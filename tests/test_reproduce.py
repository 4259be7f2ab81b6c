"""Studies at their smallest scale, which proves the machinery and no claim. More are in ``tests/stress``."""

import dataclasses
import importlib
import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PICTURES, open_gates
from studies import run_study, study_of

from flowmo import Config, FlowMo, save
from flowmo.evaluate.reconstruction import Evaluators
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.stages import frozen_code, one_step
from flowmo.model import flow
from reproduce import (
    SCALES,
    STUDIES,
    StudyError,
    distill,
    noise,
    passes,
    peer,
    posttrain,
    runner,
    timesteps,
)
from reproduce.__main__ import main
from reproduce.generation import GenerationEvaluator
from reproduce.page import (
    METRICS,
    Gain,
    against_paper,
    cell,
    comparison,
    gain,
    groups_of,
    markdown_table,
    mean_and_deviation,
)
from reproduce.runner import Scale, Study, read_results
from reproduce.sampler import resampled
from reproduce.variance import correlation, detail, metrics

pytestmark = pytest.mark.usefixtures("small_features")


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
    """And its file opens with what it reproduces, what it costs at each scale, and what to expect."""
    recipe = importlib.import_module(f"reproduce.{name}")
    assert set(recipe.SCALES) == set(SCALES)
    title, _, cost = recipe.__doc__.partition("\nCost: ")
    cost, _, expected = cost.partition("\nExpect: ")
    assert "Reproduces" in title or "Beyond the paper" in title
    assert all(f"{scale} " in cost.replace(",", " ") for scale in SCALES)
    assert expected


DOCS = Path(__file__).parents[1] / "docs" / "studies"


@pytest.mark.parametrize("results", sorted(DOCS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_pages_are_those_of_their_results(results, tmp_path):
    pytest.importorskip("matplotlib")
    name, _, scale = results.stem.rpartition("-")
    shutil.copy(results, tmp_path)
    assert main([name, "--scale", scale, "--redraw", "--out", str(tmp_path)]) == 0
    page = results.with_suffix(".md").name
    assert (tmp_path / page).read_text() == (DOCS / page).read_text(), "run --redraw and commit the page"


@pytest.mark.parametrize("results", sorted(DOCS.glob("*-cpu.json")), ids=lambda path: path.stem)
def test_a_study_that_was_cut_short_has_a_page(results, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, dpi: Path(path).touch())
    name, found = results.stem.removesuffix("-cpu"), json.loads(results.read_text())
    for count in {1, 2, 3, 5, 11, len(found["rows"]) // 2} - {0}:
        (tmp_path / results.name).write_text(json.dumps(found | {"rows": found["rows"][:count], "unfinished": True}))
        assert main([name, "--scale", "cpu", "--redraw", "--out", str(tmp_path)]) == 0
        text = (tmp_path / results.name).with_suffix(".md").read_text()
        assert "Unfinished: more rows follow." in text
        assert not re.search(r"\bnan\b", text)


def test_a_study_that_stops_leaves_its_page(tmp_path):
    def rows(study, metadata):
        yield {"run": "first"}
        raise StudyError("Stopped in second.")

    recipe = SimpleNamespace(__doc__="A title.", SCALES={"smoke": Scale(images=1)}, rows=rows)
    recipe.body = lambda results, plot: f"{len(results['rows'])} row"
    study = Study("passes", "smoke", data="", held_out=str(PICTURES), results=tmp_path, out=tmp_path)
    with pytest.raises(StudyError, match="Stopped in second"):
        runner.run(recipe, study)
    assert "Unfinished: more rows follow.**\n\n1 row" in (tmp_path / "passes-smoke.md").read_text()
    recipe.rows = lambda study, metadata: iter([{"run": "first"}])
    runner.run(recipe, study)
    assert "Unfinished" not in (tmp_path / "passes-smoke.md").read_text()


def test_a_metric_that_some_rows_lack_is_left_out(tmp_path):
    """A study that resumes where an evaluator is missing has rows with its metrics and rows without."""
    pytest.importorskip("matplotlib")
    plot = tmp_path / "some.png"
    complete, incomplete = {"psnr": 20.0, "lpips_alex": 0.3}, {"psnr": 21.0, "lpips_alex": None}

    def row(kind, values):
        return {"kind": kind, "label": kind, "weight": 0.1, "base": "tiny", "images": 1, "pictures": 1, **values}

    rows = [[row("base", complete)], *([row(kind, incomplete)] for kind in ("more", "one-step", "sample"))]
    results = {"rows": [row for group in rows for row in group], "settings": [], "pictures": 1}
    results |= {"images": 0, "distance": ""}
    for found in results["rows"]:
        found |= {"arm": found["label"], "seconds": 1, "weight": 0.1 * (found["kind"] in ("one-step", "sample"))}
    assert "- LPIPS" not in posttrain.body(results, plot)
    assert plot.stat().st_size > 5000
    rate = [{"rate": "1 bit", "noise": noise, **complete} for noise in (0.8, 0.9)]
    rate.append({"rate": "1 bit", "noise": 1.0, **incomplete})
    noise.draw([rate], METRICS[2], plot)
    text = noise.verdict([rate], METRICS[:3:2])
    assert text == "- 1 bit, PSNR (dB): the best scale is 1 itself.\n"
    assert plot.stat().st_size > 5000


def test_rows_of_the_same_weights_are_compared_by_their_differences():
    """Seeds differ by 2 dB, what is done to both by 0.5 ± 0.07."""
    ours, other = ([{"psnr": value} for value in values] for values in ((14.5, 16.6), (14.0, 16.0)))
    assert gain(ours, other, METRICS[0], paired=True) == pytest.approx((0.55, 0.0707), rel=1e-3)
    assert gain(ours, other, METRICS[0])[1] > 2
    assert gain(ours, other[:1], METRICS[0], paired=True) is None


def test_distill_smoke(evaluators, tiny_config, tmp_path, monkeypatch):
    """A teacher of two steps: its curves, the student's, and what is said of the goals."""
    torch.manual_seed(0)
    teacher = tmp_path / "teacher.safetensors"
    save(open_gates(FlowMo(tiny_config.override("eval.sampling.sample_steps=2", "eval.sampling.rho=2"))), teacher)
    rows, text = run_study(study_of("distill", tmp_path, evaluators, str(teacher)), monkeypatch)
    curves = [(row["curve"], row["passes"]) for row in rows]
    # Guidance acts in an interval, and costs a pass where a step begins in it; Heun looks twice but at the last step.
    assert [passes for curve, passes in curves if curve == "teacher, Euler"] == [1, 3]
    assert [passes for curve, passes in curves if curve == "teacher, heun"] == [1, 3]
    assert [passes for curve, passes in curves if curve == "student towards the sample"] == [1, 2]
    own = [row for row in rows if row.get("own")]
    assert [row["passes"] for row in own] == [3]
    assert len({row["psnr"] for row in rows}) >= len(rows) - 1, "one step is the same by two solvers"
    assert "met: at most +10 %" in text or "missed: at most +10 %" in text


def test_the_peer_takes_the_rate_that_trains_best(tmp_path, monkeypatch):
    """Each rate on the training pictures, by LPIPS, or by PSNR without it; what was tried leaves no weights behind."""
    rates = {5e-4: 0.4, 1e-3: 0.2, 2e-3: 0.3}
    scale = Scale(**{**vars(peer.SCALES["smoke"]), "rates": tuple(rates)})
    monkeypatch.setitem(peer.SCALES, "smoke", scale)
    study = Study("peer", "smoke", "train", "held out", tmp_path, tmp_path)

    def trial(kind, run, rate, seed, match, there, about, share):
        assert there.held_out == "train"
        assert about == {"rate": rate}
        (there.folder(run) / "checkpoints").mkdir(parents=True)
        return {"psnr": 10 * rates[rate], "lpips_alex": rates[rate] if kind == "flowmo" else None}

    monkeypatch.setattr(peer, "train_and_measure", trial)
    assert peer.best_rate("flowmo", None, study) == 1e-3
    assert peer.best_rate("convolutional", None, study) == 5e-4
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.parametrize("sampler", [("euler", 1.5), ("heun", 1.5), ("heun", 1.0), ("midpoint", 1.0)])
def test_a_teachers_own_setting_is_measured_once(sampler, tiny_config):
    """Students are held against it, whatever its solver and guidance."""
    solver, guidance = sampler
    own = dataclasses.replace(tiny_config.eval.sampling, solver=solver, guidance=guidance)
    settings = list(distill.teacher_settings(own, distill.SCALES["smoke"]))
    assert [sampling for _, sampling in settings].count(own) == 1
    assert len(set(settings)) == len(settings)


def test_held_out_images_have_the_classes_of_the_others(class_folder, evaluators, tmp_path):
    """Labels are numbers of a source's own classes."""
    other = tmp_path / "other"
    shutil.copytree(class_folder, other)
    shutil.rmtree(other / "n01440764")
    evaluators.features = object()
    study = study_of("generate", tmp_path, evaluators)
    with pytest.raises(StudyError, match="other classes"):
        GenerationEvaluator(dataclasses.replace(study, data=str(class_folder), held_out=str(other)), 4, 32)


@pytest.mark.parametrize("study", ["generate", "tokenizers"])
def test_generators_need_classes(study, trained_weights, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(trained_weights))
    words = [study, "--data", PICTURES, "--held-out", PICTURES, "--models", tiny_model]
    assert main([str(word) for word in [*words, "--results-dir", tmp_path, "--out", tmp_path]]) == 2
    assert "one folder a class" in capsys.readouterr().err


def test_ablations_smoke(evaluators, tmp_path, monkeypatch):
    study = study_of("ablations", tmp_path, evaluators)
    rows, text = run_study(study, monkeypatch)
    by_arm = {row["arm"]: row for row in rows}
    assert list(by_arm) == [
        *("baseline", "patch", "mse", "no-lpips", "fsq", "logit-normal", "no-anchor", "rho-1", "no-guidance"),
    ]
    # Of two sampling steps none is in guidance's interval, and two of training may leave every bit of a code as it was.
    same = {"no-guidance", "mse"}
    assert len({row["psnr"] for row in rows if row["arm"] not in same}) == len(rows) - len(same)
    assert {row["bits_per_pixel"] for row in rows} == {4 * 9 / 32**2}
    assert by_arm["rho-1"]["seconds"] == by_arm["baseline"]["seconds"], "sampled from the baseline's weights"
    assert all(row["colour_error"] > 0 for row in rows)
    assert text.count("| PSNR (dB) | ") == 7, "beside each of table 4's rows"
    for name in ("pictures", "figure7"):
        assert (study.folder(name + ".png")).stat().st_size > 3000
    assert (study.folder("baseline-2-steps-seed1") / "checkpoints").is_dir()
    assert not (study.folder("autoencoder-2-steps-seed1") / "checkpoints").exists()


def test_noise_smoke(evaluators, tmp_path, monkeypatch):
    rows, text = run_study(study_of("noise", tmp_path, evaluators), monkeypatch)
    assert [(row["noise"], row["rate"]) for row in rows] == [
        (noise, f"{bits * 4 / 32**2:.4g} bits per pixel") for bits in (3, 9, 18) for noise in (0.8, 1.0)
    ]
    assert len({row["psnr"] for row in rows}) == 6
    assert text.count("the best scale is") == 9


def test_continuous_smoke(evaluators, tmp_path, monkeypatch):
    rows, text = run_study(study_of("continuous", tmp_path, evaluators), monkeypatch)
    assert [row["arm"] for row in rows] == ["layernorm", "kl", "noop", "dito"]
    assert {row["bits_per_pixel"] for row in rows} == {4 * 4 * 32 / 32**2}
    assert len({row["psnr"] for row in rows}) == 4
    assert "| DiTo | 0.78 | 24.1 | 0.706 | 0.102 |" in text


def test_arms_of_passes_differ():
    """The settings of each work, and no two are alike. Only some are trained in ``tests/stress``, to save time."""
    base = passes.SMOKE_NESTED
    arms = list(passes.arms_of(base))
    found = {(base.override(*arm.settings), arm.start, arm.start_share, arm.share) for arm in arms}
    assert len(found) == len({arm.name for arm in arms}) == len(arms) == 22
    assert {arm.start for arm in arms} - {""} <= {arm.name for arm in arms}


def test_the_compute_of_a_training_includes_its_start(monkeypatch):
    base = passes.SCALES["cpu"].base
    arms = {arm.name: arm for arm in passes.arms_of(base)}
    assert passes.tflop(arms["flow"], 24_000, base) == pytest.approx(51.12, abs=0.01), (
        "counted for `discriminator`, too"
    )
    monkeypatch.setattr(passes, "training_flops", lambda config, freeze_encoder: 3e12 if freeze_encoder else 1e12)
    assert passes.tflop(arms["flow"], 96_000, base) == 96_000
    assert passes.tflop(arms["seek"], 98_048, base) == pytest.approx(96_000 + 3 * 2_048)
    assert passes.tflop(arms["more"], 26_048, base) == pytest.approx(24_000 + 3 * 2_048)


def test_many_passes_cross_one_pass():
    """PSNR falls from 16 to 8 dB in one pass, and is 12 dB in two: they cross between the rates."""

    def row(rate, count, value, seed=1):
        return {"rate": rate, "passes": count, "psnr": value, "seed": seed}

    rows = [row(0.01, 1, 8.0), row(0.01, 2, 12.0), row(0.04, 1, 16.0), row(0.04, 2, 12.0)]
    assert passes.gains(METRICS[0], rows) == [(0.01, 4.0, 0.0), (0.04, -4.0, 0.0)]
    more = [*rows, row(0.01, 1, 20.0, seed=2), row(0.01, 2, 26.0, seed=2), row(0.04, 1, 1.0, seed=2)]
    assert passes.gains(METRICS[0], more) == [(0.01, 5.0, 2**0.5), (0.04, -4.0, 0.0)], "within each seed"
    assert passes.crossing([(0.01, 4.0, 0.0), (0.04, -4.0, 0.0)]) == "many below 0.020"
    assert passes.crossing([(0.01, -1.0, 0.0), (0.04, 1.0, 0.0)]) == "one below 0.020"
    assert passes.crossing([(0.01, 1.0, 0.0), (0.04, 1.0, 0.0)]) == "many at every rate"
    assert passes.crossing([(0.01, 0.0, 0.0), (0.04, -1.0, 0.0)]) == "one at every rate"


def test_the_gain_of_many_passes_over_a_training():
    """Two seeds of one length are averaged; a rate between the lowest and the highest is left out."""

    def row(seed, rate, count, value):
        about = {"recipe": "flow", "label": "f", "trained": 8, "tflop": 51.2, "seed": seed}
        return {**about, "rate": rate, "passes": count, "psnr": value}

    settings = [(seed, rate, count) for seed in (1, 2) for rate in (1, 2, 3) for count in (1, 2, 4)]
    rows = [row(*setting, sum(setting)) for setting in settings]
    assert passes.training_table(METRICS[:1], rows).splitlines()[2:] == [
        "| f | 8 | 51 | 1.0000 | 3.50 ± 0.71 → 6.50 ± 0.71 |",
        "| f | 8 | 51 | 3.0000 | 5.50 ± 0.71 → 8.50 ± 0.71 |",
    ]
    assert len(groups_of(rows, "rate", "passes")) == 9


def test_studies_of_trained_models_smoke(evaluators, tiny_config, tmp_path, monkeypatch):
    torch.manual_seed(0)
    sampling = ("eval.sampling.sample_steps=2", "model.prediction=image")
    for name in ("a", "b"):
        save(open_gates(FlowMo(tiny_config.override(*sampling))).eval(), tmp_path / f"{name}.safetensors")
    models = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b")]
    study = study_of("variance", tmp_path, evaluators, *models)
    rows, _ = run_study(study, monkeypatch)
    assert [row["arm"] for row in rows] == ["a", "b"]
    assert all(row["spread"] > 0 and row["psnr_of_mean"] > row["psnr"] and row["lpips_between"] > 0 for row in rows)
    assert (study.folder("a") / "figure8.png").stat().st_size > 1000
    rows, _ = run_study(study_of("sampler", tmp_path, evaluators, models[0]), monkeypatch)
    assert [row["part"] for row in rows] == ["shift"] * 2 + ["guidance"] + ["interval"] * 2 + ["solver"] * 2
    # ρ = 1 has its second step at t = 0.5, ρ = 4 at 0.06
    assert [row["passes"] for row in rows] == [1, 3, 2, 4, 3, 1, 3], "guidance counts where its interval is met"
    rows, text = run_study(study_of("likelihood", tmp_path, evaluators, models[0]), monkeypatch)
    assert [row["kind"] for row in rows] == ["own", "other", "null", "sample"]
    assert len({row["bits"] for row in rows}) == 4
    assert "an image's code (48 bits) saves" in text


def test_timesteps_smoke(evaluators, tiny_config, tmp_path, monkeypatch):
    """The errors and probabilities of the intervals give the loss as an integral over the density of t does."""
    torch.manual_seed(0)
    settings = ("model.prediction=image", "opt.schedule=fat_lognormal", "opt.anchor=0.2", "opt.loss_space=velocity")
    tokenizer = open_gates(FlowMo(tiny_config.override(*settings))).eval()
    save(tokenizer, tmp_path / "a.safetensors")
    study = study_of("timesteps", tmp_path, evaluators, str(tmp_path / "a.safetensors"))
    (row,), text = run_study(study, monkeypatch)
    indices, x = study.held_out_images(4, tiny_config.data.image_size)
    noise, times = TrainingNoise.of(tokenizer.config, x, indices), (torch.arange(400) + 0.5) / 400
    density = 0.1 + 0.9 * torch.exp(-(times.logit() ** 2) / 2) / (2 * math.pi) ** 0.5 / (times * (1 - times))
    with torch.no_grad():
        code = frozen_code(tokenizer, x).code
        for key, space in (("velocity_error", "velocity"), ("image_error", "image")):
            opt = tokenizer.config.override(f"opt.loss_space={space}").opt
            found = [
                one_step(tokenizer, code, x, noise._replace(t=t.expand(4)), opt)[0] for t in (*times, torch.ones(()))
            ]
            parts = torch.stack(found) * torch.cat((0.8 * density / 400, torch.tensor([0.2])))
            below, *_, whole = timesteps.shares_below(row, key)[timesteps.EDGES.index(0.2) - 1 :]
            assert below == pytest.approx(float(parts[:80].sum() / parts.sum()), rel=0.04)
            assert whole == pytest.approx(1)
            ours = sum(p * e for p, e in zip(row["probability"], row[key], strict=True))
            assert ours == pytest.approx(float(parts.sum()), rel=0.04)
            assert f"{100 * below:.1f} %" in text


@pytest.mark.parametrize("schedule", flow.DISTRIBUTIONS)
def test_probabilities_are_those_of_training(schedule):
    opt = Config().override(f"opt.schedule={schedule}", "opt.anchor=0.25").opt
    t = flow.sample_timesteps(400_000, schedule, torch.Generator().manual_seed(0), anchor=0.25)
    counted = [float(((t >= low) & (t < high)).float().mean()) for low, high in pairwise(timesteps.EDGES)]
    assert timesteps.probabilities(opt) == pytest.approx([*counted, float((t == 1).float().mean())], abs=0.003)
    assert sum(timesteps.probabilities(opt)) == pytest.approx(1)


def test_peer_smoke(evaluators, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr("reproduce.peer.TIMED", 2)
    study = study_of("peer", tmp_path, evaluators)
    rows, text = run_study(study, monkeypatch)
    assert [row["arm"] for row in rows] == ["flowmo", "convolutional"]
    assert {row["bits_per_pixel"] for row in rows} == {4 * 9 / 32**2}
    assert all(row["decode_alone"] > 0 and row["decode_together"] > 0 for row in rows)
    counted = read_results(study)
    ours, theirs = (counted["parameters"][kind] for kind in ("flowmo", "convolutional"))
    assert 0.5 < theirs / ours < 2, "widths are coarse at this size"
    assert "FlowMo is" in text


def test_metrics_of_samples():
    torch.manual_seed(0)
    x = torch.zeros(3, 16, 16)
    x[:, :, 8:] = torch.rand(3, 16, 8) - 0.5
    samples = x + 0.2 * torch.randn(50, 3, 16, 16) * (torch.arange(16) >= 8)
    found = metrics(x, samples)
    assert found["spread"] == pytest.approx(0.2 / 2 * 127.5, rel=0.05)
    assert found["with_detail"] > 0.8, "samples differ where the image varies"
    assert found["with_error"] > 0.6
    assert found["psnr_of_mean"] > found["psnr"] + 10
    assert detail(torch.ones(3, 8, 8)).max() < 1e-3
    assert correlation(torch.ones(4, 4), torch.rand(4, 4)) == 0


def test_directions_against_the_paper():
    def rows(arm, *psnrs):
        return [{"arm": arm, "label": arm.upper(), "psnr": psnr} for psnr in psnrs]

    measured = (*rows("base", 20.0, 20.2), *rows("up", 21.0, 21.2), *rows("down", 19.0, 19.2), *rows("same", 20.1))
    groups = groups_of(measured)
    psnr = METRICS[0]
    assert gain(groups[1], groups[0], psnr) == (pytest.approx(1.0), pytest.approx(0.2))
    assert [Gain(better, 0.2).direction for better in (0.5, 0.3, -0.5)] == [1, 0, -1]
    assert comparison(groups[1], groups[0], METRICS) == "- PSNR (dB): UP is better than BASE, by 1.00 (spread 0.20).\n"
    assert "DOWN is worse than BASE, by 1.00" in comparison(groups[2], groups[0], METRICS)
    assert comparison(groups[3], groups[0], METRICS) == "- PSNR (dB): SAME is behind BASE, by 0.00 (one seed).\n"
    assert gain(groups[3], groups[0], psnr).direction == 0
    same = rows("same", 20.0, 20.3)
    assert "SAME is within two spreads of BASE: difference 0.05" in comparison(same, groups[0], METRICS)
    published = {name: {"psnr": figure} for name, figure in {"base": 20, "up": 22, "down": 22, "same": 22}.items()}
    text = against_paper([groups[0], same], published)
    assert "| SAME | PSNR (dB) | +2 | +0.05 (spread 0.25) | within the spread |" in text
    text = against_paper(groups[:2], {**published, "up": {"psnr": 20}})
    assert "| UP | PSNR (dB) | +0 | +1.00 (spread 0.20) | – |" in text, "the paper has no difference"
    text = against_paper(groups, published)
    directions = [line.split(" | ")[-1] for line in text.splitlines()[2:]]
    assert directions == ["holds |", "does not hold |", "– |"], "the last has one seed"
    assert "| UP | PSNR (dB) | +2 | +1.00 (spread 0.20) | holds |" in text


def test_a_row_of_other_images_or_networks_is_refused(tmp_path):
    study = study_of("variance", tmp_path, Evaluators())
    assert study.once("row", lambda: {"psnr": 20.0}) == study.once("row", dict) == {"run": "row", "psnr": 20.0}
    with pytest.raises(StudyError, match="row of other images"):
        dataclasses.replace(study, held_out="elsewhere").once("row", dict)
    network = torch.nn.Identity()
    network.name = "another network"
    with pytest.raises(StudyError, match=r"measured with .*, not .*another network"):
        dataclasses.replace(study, evaluators=Evaluators(features=network)).once("row", dict)


def test_models_have_names_of_their_own(tiny_model, tmp_path):
    study = study_of("variance", tmp_path, None, str(tiny_model), str(tiny_model))
    assert [name for _, name, _ in study.load_models()] == ["tiny", "tiny-2"]
    _, _, tokenizer = next(study.load_models())
    sampling = dataclasses.replace(tokenizer.config.eval.sampling, rho=1.0, sample_steps=3)
    other = resampled(tokenizer, sampling)
    with torch.no_grad():
        tokenizer.decoder.picture_out.bias.add_(1)
    save(tokenizer, tiny_model)
    with pytest.raises(StudyError, match="has figures of another tiny"):
        next(study.load_models())
    with pytest.raises(StudyError, match="or on other images"):
        next(dataclasses.replace(study, held_out="elsewhere").load_models())
    assert (other.config.eval.sampling.rho, other.config.eval.sampling.sample_steps) == (1, 3)
    assert tokenizer.config.eval.sampling.rho == 4
    assert other.decoder is tokenizer.decoder


def test_a_study_that_does_not_exist_names_those_that_do(capsys):
    with pytest.raises(SystemExit):
        main(["ablation"])
    told = capsys.readouterr().err
    assert all(name in told for name in STUDIES)


def test_studies_that_cannot_start(tmp_path, capsys):
    assert main(["posttrain", "--out", str(tmp_path)]) == 2
    assert "Name the images" in capsys.readouterr().err
    assert main(["posttrain", "--redraw", "--out", str(tmp_path)]) == 2
    assert "Cannot read" in capsys.readouterr().err
    with pytest.raises(StudyError, match="without --redraw"):
        read_results(Study("posttrain", "cpu", "", "", tmp_path, tmp_path))
