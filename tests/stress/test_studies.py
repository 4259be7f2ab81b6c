"""Studies at their smallest scale that take longest. The others are in ``tests/test_reproduce.py``."""

import pytest
from conftest import PICTURES
from studies import run_by_command, run_study, study_of

from flowmo import Config
from flowmo.model.torchvision_import import before_importing
from reproduce import StudyError, discriminator, passes
from reproduce.runner import read_results

pytestmark = pytest.mark.usefixtures("small_features")


def test_posttrain_smoke(trained_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(trained_weights))
    found, text = run_by_command("posttrain", PICTURES, tmp_path)
    assert [row["kind"] for row in found["rows"]] == ["base", "more", "one-step", "sample"]
    assert all(row["pictures"] == 8 for row in found["rows"])
    assert all(row["seconds"] > 0 for row in found["rows"])
    assert len({row["psnr"] for row in found["rows"]}) == 4, "every arm is a model of its own"
    assert text.count("\n| ") == 6
    assert "(a) sample, weight 0.01" in text
    runs = tmp_path / "results" / "posttrain-smoke"
    assert (runs / "pictures.png").stat().st_size > 5000
    assert (runs / "smoke-base-seed1" / "checkpoints").is_dir()
    assert not (runs / "smoke-sample-0.01-seed1" / "checkpoints").exists(), "what was measured gives back its room"


def test_generate_smoke(trained_weights, class_folder, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(trained_weights))
    found, text = run_by_command("generate", class_folder, tmp_path, "--models", tiny_model)
    kinds = ["originals", "others", "floor", "ceiling", "t1-g1.5", "halton", "bits"]
    assert [row["kind"] for row in found["rows"]] == kinds
    assert found["rows"][0]["frechet_distance"] == pytest.approx(0, abs=1e-2)
    assert found["classes"] == ["tench", "English springer", "parachute"]
    nats = [row["cross_entropy"] for row in found["rows"] if "cross_entropy" in row]
    assert len(nats) == 3
    assert nats[0] == nats[1] != nats[2], "one generator with a table of ids, one with bit tokens"
    assert text.count("\n| ") == 9 + 4
    assert (tmp_path / "results" / "generate-smoke" / "tiny-bits" / "classes.png").stat().st_size > 1000


def test_tokenizers_smoke(trained_weights, class_folder, tmp_path, monkeypatch):
    before_importing("diffusers")
    pytest.importorskip("diffusers")
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(trained_weights))
    found, text = run_by_command("tokenizers", class_folder, tmp_path)
    arms = ["pretrained", "posttrained", "convolutional"]
    assert [(row["arm"], row["kind"]) for row in found["rows"]] == [
        (arm, kind) for arm in arms for kind in ("reconstructed", "generated")
    ]
    assert len({row["tokenizer"] for row in found["rows"]}) == 3, "each has weights of its own"
    assert len({row["frechet_distance"] for row in found["rows"]}) == 6
    assert text.count("\n| ") == 4 + 5 + 5
    assert "FlowMo, stages 1A and 1B is " in text
    assert (tmp_path / "results" / "tokenizers-smoke" / "pretrained-reconstructed" / "classes.png").is_file()


def test_passes_smoke(evaluators, tmp_path, monkeypatch):
    recipes = ["flow", "anchored", "seek", "seek-early", "one-step", "more", "image-loss", "image-loss-more", "guided"]
    arms = [arm for arm in passes.arms_of(passes.SMOKE_NESTED) if arm.name in recipes]
    monkeypatch.setattr(passes, "arms_of", lambda base: iter(arms))
    monkeypatch.setattr(passes, "training_flops", lambda config, freeze_encoder: 5e12 if freeze_encoder else 1e12)
    study = study_of("passes", tmp_path, evaluators)
    rows, text = run_study(study, monkeypatch)
    settings = [(rate * 4 * 3 / 32**2, count) for rate in (1, 2) for count in (1, 2)]
    assert [(row["recipe"], row["rate"], row["passes"]) for row in rows] == [
        (recipe, *setting) for recipe in (*recipes, "flow") for setting in settings
    ]
    assert [row["seed"] for row in rows] == [1] * (len(rows) - 4) + [2] * 4
    assert all(row["bits_per_pixel"] == row["rate"] for row in rows)
    assert len({row["psnr"] for row in rows}) > 3 * len(recipes), "rate, passes and recipe change the images"
    assert [row["trained"] for row in rows[::4]] == [8, 8, 12, 8, 8, 8, 4, 8, 8, 4]
    quarters = {("image-loss", 1), ("flow", 2)}
    assert {(row["recipe"], row["seed"]) for row in rows if not row["last"]} == quarters
    kept = ("flow", "seek-early", "one-step", "more", "image-loss-more")
    tflop = {row["recipe"]: row["tflop"] for row in rows if row["seed"] == 1}
    assert (tflop["flow"], tflop["seek"], tflop["anchored"]) == (8, 8 + 5 * 4, 8)
    assert study.out.joinpath("passes-smoke-rates.png").stat().st_size > 3000
    flow, seek, *controls = (Config.from_yaml(study.folder(f"{name}-seed1") / "config.json") for name in kept)
    for control in controls:
        assert control.model.ema_decay ** (4 / 128) == pytest.approx(seek.model.ema_decay), "per step of 4 images"
        assert control.model.train == "decoder", "a stage of its own: fresh optimizer and EMA, as stage 1B has"
    with pytest.raises(StudyError, match=r"was trained with opt\.lr=0\.001\. Remove it"):
        study.train(flow.override("opt.lr=1"), "flow-seed1")
    assert text.count("\n| flow, loss on the image |") == 2 + 1, "a short training is in the last two tables alone"
    assert text.count("\n| flow |") == 4 + 4 + 2, "two metrics at two rates; at two lengths, gains and crossing"
    assert all(study.folder(f"ids2{stem}.png").stat().st_size > 3000 for stem in ("", "-first"))


def test_discriminator_smoke(evaluators, tmp_path, monkeypatch):
    """Halves of the training without a discriminator are equal, and it changes the second half."""
    pytest.importorskip("diffusers")
    study = study_of("discriminator", tmp_path, evaluators)
    rows, text = run_study(study, monkeypatch)
    kinds = [f"{kind}-{word}" for kind in ("flowmo", "convolutional") for word in ("without", "with")]
    lengths = dict.fromkeys(kinds, (4, 8)) | {"flowmo-without": (4, 8, 12)}
    assert [(row["arm"], row["images"]) for row in rows] == [(kind, n) for kind in kinds for n in lengths[kind]]
    psnr = {(row["arm"], row["images"]): row["psnr"] for row in rows}
    for kind in ("flowmo", "convolutional"):
        assert psnr[f"{kind}-with", 4] == psnr[f"{kind}-without", 4]
        assert psnr[f"{kind}-with", 8] != psnr[f"{kind}-without", 8]
    flops = read_results(study)["flops"]
    assert all(flops[f"{kind}-with"] > flops[f"{kind}-without"] for kind in ("flowmo", "convolutional"))
    assert {row["bits_per_pixel"] for row in rows} == {4 * 36 / 32**2}
    assert text.count("FlowMo, with a discriminator") == 1 + 2 * 3, "the table, and three metrics of two comparisons"
    assert text.count("\n| FlowMo, without a discriminator | 1 | 12 |") == 1, "a longer training is in the last table"
    assert text.count("\n| FlowMo, without a discriminator |") == 1 + 3
    tflop = {(row["arm"], row["images"]): discriminator.tflop(row, flops) * 1e12 for row in rows}
    assert tflop["flowmo-with", 4] == tflop["flowmo-without", 4] == 4 * flops["flowmo-without"], "none joined yet"
    assert tflop["flowmo-with", 8] == 8 * flops["flowmo-with"]
