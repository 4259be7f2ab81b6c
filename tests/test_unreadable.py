"""One image that cannot be read: it is named, left out of all metrics alike, and costs nothing else."""

import json
import shutil

import pytest
import torch
from conftest import run_command
from test_evaluation import Blur, Colours

from flowmo.data import open_source
from flowmo.evaluate.generation import GenerationSummary, extract_features, open_image_set
from flowmo.evaluate.reconstruction import EvaluationError, Evaluators, measure
from flowmo.evaluate.summary import Summary, notes
from flowmo.train.trainer import Trainer

BAD = {
    "text": lambda path: path.write_text("no image"),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
}


@pytest.fixture
def folders(tmp_path, picture_files):
    """The same photographs twice, and in the second folder one more, which comes last."""
    sound, spoilt = tmp_path / "sound", tmp_path / "spoilt"
    for folder in (sound, spoilt):
        folder.mkdir()
        for file in picture_files[:5]:
            shutil.copy(file, folder / file.name)
    shutil.copy(picture_files[5], spoilt / "~bad.jpg")
    return sound, spoilt


def spoil(folder, kind):
    bad = next(folder.glob("~bad.jpg"))
    BAD[kind](bad)
    return bad


@pytest.mark.parametrize("kind", list(BAD))
@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("place", ["first", "last"])
def test_every_metric_is_that_of_the_other_images(kind, batch_size, place, folders):
    """The independent value is an evaluation of a folder that never held the image."""
    sound, spoilt = folders
    bad, named = spoil(spoilt, kind), []
    if place == "first":
        bad = bad.rename(spoilt / "0bad.jpg")
    evaluators = Evaluators(features=Colours())
    found = measure(
        Blur(), open_source(spoilt), 64, evaluators, batch_size=batch_size, on_unreadable=named.append, enlarge=True
    )
    expected = measure(Blur(), open_source(sound), 64, evaluators, enlarge=True)
    assert len(named) == 1
    assert str(bad) in named[0]
    ours, theirs = (Summary.of("blur", x, evaluators.features).as_dict() for x in (found, expected))
    assert (ours.pop("unreadable"), theirs.pop("unreadable")) == (1, 0)
    if place == "first":  # this stand-in's ids depend on the index
        for key in ("ids_used", "id_entropy"):
            assert ours.pop(key) is not None
            del theirs[key]
    for key, value in theirs.items():
        assert ours[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
    assert "1 images left out: unreadable or too small" in notes([Summary.of("blur", found)])[-1]


def test_what_becomes_readable_is_measured_when_the_evaluation_goes_on(folders, tmp_path):
    _, spoilt = folders
    bad = next(spoilt.glob("~bad.jpg"))
    content = bad.read_bytes()
    spoil(spoilt, "text")
    arguments = {"folder": tmp_path / "measured", "on_unreadable": lambda message: None, "enlarge": True}
    first = measure(Blur(), open_source(spoilt), 64, Evaluators(features=Colours()), **arguments)
    bad.write_bytes(content)
    again = measure(Blur(), open_source(spoilt), 64, Evaluators(features=Colours()), **arguments)
    assert (first.unreadable, again.unreadable) == (1, 0)
    kept = torch.isin(again.rows["index"], first.rows["index"])
    assert all(torch.equal(again.rows[name][kept], first.rows[name]) for name in first.rows)


def test_where_none_can_be_read_there_are_no_metrics(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    named = []
    with pytest.raises(EvaluationError, match=r"None of the 1 images can be used"):
        measure(Blur(), open_source(tmp_path), 64, Evaluators(), on_unreadable=named.append)
    assert "a.jpg" in named[0]


def test_the_command_names_it_and_reports_all_candidates_alike(folders, tiny_model, tmp_path, capsys):
    sound, spoilt = folders
    bad = spoil(spoilt, "truncated")
    options = ("--model", tiny_model, "--no-lpips", "--features", "none", "--peers", "jpeg", "--json")
    report = ("--report", tmp_path / "report")
    status, out, err = run_command(capsys, "evaluate", spoilt, *options, *report)
    assert status == 0
    assert f"left out: {bad}: cannot be read" in err
    rows = json.loads(out)
    assert [(row["images"], row["unreadable"]) for row in rows] == [(5, 1)] * 3
    assert (tmp_path / "report" / "worst.png").is_file()
    status, out, _ = run_command(capsys, "evaluate", sound, *options)
    expected = json.loads(out)
    for key in ("psnr", "psnr_legacy", "ssim", "bits_per_pixel", "id_entropy"):
        assert [row[key] for row in rows] == [row[key] for row in expected], key


@pytest.mark.parametrize("spoilt_one", ["generated", "reference"])
def test_sets_that_are_compared(spoilt_one, folders):
    """FID and its companions equal those of a folder that never held the image."""
    sound, spoilt = folders
    spoil(spoilt, "text")
    network = Colours()
    for folder in folders:
        for file in folder.glob("*.jpg"):
            if file.name != "~bad.jpg":
                image = open_source(folder).read(0).resize((64, 48))
                image.putpixel((0, 0), (len(file.name) * 9 % 256, 0, 0))
                image.save(file.with_suffix(".png"))
                file.unlink()

    def seen(folder):
        return extract_features(open_image_set(folder), network, batch_size=2)

    pair = (spoilt, sound) if spoilt_one == "generated" else (sound, spoilt)
    ours = GenerationSummary.of(*map(seen, pair), network).as_dict()
    theirs = GenerationSummary.of(seen(sound), seen(sound), network).as_dict()
    assert ours["images"] == ours["reference_images"] == 5
    assert ours == theirs


def test_a_run_keeps_its_checkpoints(folders, tiny_config, tmp_path):
    """The image is named once; the metric is that of the run's other held-out images."""
    sound, spoilt = folders
    bad = spoil(spoilt, "truncated")
    values, lines = {}, []
    for folder in (sound, spoilt):
        settings = (f"data.train={sound}", f"data.val={folder}", "trainer.best_metric=psnr", "data.batch_size=2")
        more = ("trainer.max_steps=2", "trainer.checkpoint_every=1 steps", "opt.lpips_weight=0", "data.num_workers=0")
        run = Trainer(tiny_config.override(*settings, *more), tmp_path / "runs" / folder.name, report=lines.append)
        run.train()
        assert [path.stem for path in run.checkpoints()] == ["00000001", "00000002"]
        rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        values[folder] = [row["eval_psnr"] for row in rows if "eval_psnr" in row]
    assert len(values[sound]) == len(values[spoilt]) == 2
    assert values[spoilt] == values[sound]
    assert sum(str(bad) in line and "left out of the held-out images" in line for line in lines) == 1


def test_tokenize_names_it(class_folder, tiny_model, tmp_path, capsys):
    bad = class_folder / "n01440764" / "000.jpg"
    bad.write_bytes(b"no image")
    words = ["tokenize", class_folder, "--out", tmp_path / "tokens", "--model", tiny_model, "--flip"]
    status, out, err = run_command(capsys, *words)
    assert (status, "14 samples, 2 unreadable" in out) == (0, True)
    assert err.startswith(f"left out: {bad}: ")
    assert err.count("\n") == 1
