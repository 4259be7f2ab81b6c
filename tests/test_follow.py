"""Evaluation of a run's checkpoints as they come."""

import json
import tarfile
import threading
import time

import pytest
from conftest import PICTURES
from processes import run_ranks

import flowmo
from flowmo.checkpoint import CheckpointError
from flowmo.checkpoint.run_folder import has_ended
from flowmo.data import build_index
from flowmo.distributed import join
from flowmo.evaluate import follow
from flowmo.evaluate.follow import LOG, Follower
from flowmo.evaluate.reconstruction import EvaluationError, Evaluators
from flowmo.train.trainer import Trainer

EVALUATION = ("eval.subsample_rate=3", "eval.sampling.sample_steps=1")


@pytest.fixture
def config(tiny_config):
    return tiny_config.override(
        *(f"data.train={PICTURES}", f"data.val={PICTURES}", "data.num_workers=0", "data.global_batch_size=2"),
        *("opt.lpips_weight=0", "trainer.duration=4 steps", "trainer.checkpoint_every=1 step", "trainer.keep_last=2"),
        *("trainer.sample_every=0", "trainer.tensorboard=false"),
    )


def logged(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_every_checkpoint_of_a_run_once_until_it_ends(config, tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.02)
    run, said = tmp_path / "run", []
    settings = (f"eval.eval_dir={run}", "eval.continuous=true", *EVALUATION)
    follower = Follower(settings, tmp_path / "evaluation", Evaluators(), report=said.append)
    thread = threading.Thread(target=follower.evaluate)
    thread.start()
    while not said:  # it waits for a run that is not there yet
        time.sleep(0.01)
    assert "waiting" in said[0]
    Trainer(config, run, report=lambda line: None).train()
    assert has_ended(run)
    thread.join(60)
    assert not thread.is_alive()
    lines = logged(tmp_path / "evaluation")
    names = [line["checkpoint"] for line in lines]
    assert names == sorted(set(names))
    assert names[-1] == "00000004.pth"
    assert all(line.get("removed") or line["images"] == 2 for line in lines)
    assert logged(run) == lines
    before = len(lines)
    follower.evaluate()
    assert len(logged(run)) == before


def test_two_runs_in_one_folder_are_both_evaluated(config, tmp_path):
    """Their checkpoints have the same names. So have those of one run that are sampled in two ways."""
    for seed, name in enumerate("ab"):
        Trainer(config.override(f"trainer.seed={seed}"), tmp_path / name, report=lambda line: None).train()
    folder, again = tmp_path / "evaluation", (("a", ()), ("b", ()), ("a", ("eval.sampling.guidance=2",)))
    for count in range(2):
        for name, more in again:
            settings = (f"eval.eval_dir={tmp_path / name}", "eval.continuous=true", *EVALUATION, *more)
            Follower(settings, folder, Evaluators(), report=lambda line: None).evaluate()
        lines = logged(folder)
        assert [line["checkpoint"] for line in lines] == 3 * ["00000003.pth", "00000004.pth"], count
    assert len({line["psnr"] for line in lines}) == 4, "one step has no guidance"


def test_a_run_that_goes_on_has_not_ended(config, tmp_path):
    Trainer(config, tmp_path, report=lambda line: None).train()
    assert has_ended(tmp_path)
    run = Trainer(config.override("trainer.duration=6 steps"), tmp_path, report=lambda line: None)
    run.asked_to_stop = True
    run.train()
    assert not has_ended(tmp_path)


def test_the_newest_and_a_named_one(config, tmp_path):
    run = tmp_path / "run"
    Trainer(config, run, report=lambda line: None).train()
    Follower((f"eval.eval_dir={run}", *EVALUATION), tmp_path / "a", Evaluators(), report=lambda line: None).evaluate()
    assert [line["checkpoint"] for line in logged(tmp_path / "a")] == ["00000004.pth"]
    named = f"eval.force_ckpt_path={run}/checkpoints/00000003.pth"
    settings = (named, f"data.val={PICTURES}", *EVALUATION)
    Follower(settings, tmp_path / "b", Evaluators(), report=lambda line: None).evaluate()
    assert [line["checkpoint"] for line in logged(tmp_path / "b")] == ["00000003.pth"]
    assert [line["precision"] for line in logged(tmp_path / "b")] == ["float32 (cpu)"]
    Trainer(config.override("data.val=''"), tmp_path / "bare", report=lambda line: None).train()
    with pytest.raises(EvaluationError, match="no held-out images"):
        Follower((f"eval.eval_dir={tmp_path}/bare",), tmp_path / "c", Evaluators()).evaluate()


@pytest.mark.parametrize("origin", ["settings", "checkpoint", "run"])
def test_the_index_of_the_held_out_tar(origin, config, tmp_path, picture_files, monkeypatch):
    """An index that names two of the tar's three pictures, wherever source and index are named."""
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for file in picture_files[:3]:
            tar.add(file, file.name)
    (tmp_path / "two.json").write_text(json.dumps(build_index(tmp_path / "val.tar")[0][:2]))
    both = (f"data.val={tmp_path}/val.tar", f"data.val_index={tmp_path}/two.json")
    run = tmp_path / "run"
    Trainer(config.override(*both), run, report=lambda line: None).train()
    settings, loaded = (f"eval.eval_dir={run}", "eval.sampling.sample_steps=1"), flowmo.load

    def without_paths(path, *settings, **options):
        tokenizer = loaded(path, *settings, **options)
        tokenizer.config = tokenizer.config.override("data.val=''", "data.val_index=''")
        return tokenizer

    if origin == "settings":
        settings = (*settings, *both)
        (run / "config.json").unlink()
    if origin == "run":  # of another version, which has one more setting
        saved = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**saved, "model": {**saved["model"], "old_setting": 1}}))
    if origin != "checkpoint":
        monkeypatch.setattr("flowmo.load", without_paths)
    Follower(settings, tmp_path / "a", Evaluators(), report=lambda line: None).evaluate()
    assert [line["images"] for line in logged(tmp_path / "a")] == [2]
    # Another source in the settings does not take over the index of the one it replaces.
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(picture_files[3], "other.jpg")
    (tmp_path / "other.index.json").write_text(json.dumps(build_index(tmp_path / "other.tar")[0]))
    settings = (*settings[:2], f"data.val={tmp_path}/other.tar")
    Follower(settings, tmp_path / "b", Evaluators(), report=str).evaluate()
    assert logged(tmp_path / "b")[0]["images"] == 1


def test_nothing_to_evaluate(tmp_path):
    with pytest.raises(EvaluationError, match="Name images, or a run"):
        Follower((), tmp_path, Evaluators())
    with pytest.raises(EvaluationError, match="There is no run"):
        Follower((f"eval.eval_dir={tmp_path}/none",), tmp_path, Evaluators()).evaluate()
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="has no checkpoint yet"):
        Follower((f"eval.eval_dir={tmp_path}/empty",), tmp_path, Evaluators()).evaluate()


@pytest.mark.parametrize("cut", ['{"checkpoint": "0000', '{"checkpoint": "00000003.pth", "images": 2}'])
def test_a_kill_cuts_a_line_of_the_log_off(cut, config, tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.02)
    run, folder = tmp_path / "run", tmp_path / "a"
    Trainer(config, run, report=lambda line: None).train()
    folder.mkdir()
    for log in (folder / LOG, run / LOG):
        log.write_text('{"checkpoint": "00000002.pth"}\n' + cut)
    settings = (f"eval.eval_dir={run}", "eval.continuous=true", *EVALUATION)
    Follower(settings, folder, Evaluators(), report=lambda line: None).evaluate()
    complete = cut.endswith("}")
    lines = (folder / LOG).read_text().splitlines()
    assert lines == (run / LOG).read_text().splitlines()
    assert lines[1] == cut
    added = [json.loads(line)["checkpoint"] for line in lines[2:]]
    assert added == (["00000004.pth"] if complete else ["00000003.pth", "00000004.pth"])


def test_a_checkpoint_that_is_removed_meanwhile(config, tmp_path, monkeypatch):
    """Runs keep the newest few; one that goes while it is read is told and passed over, a damaged one is an error."""
    run, said = tmp_path / "run", []
    Trainer(config, run, report=lambda line: None).train()
    newest = run / "checkpoints" / "00000004.pth"
    follower = Follower((f"eval.eval_dir={run}", *EVALUATION), tmp_path / "a", Evaluators(), report=said.append)
    content = newest.read_bytes()
    newest.write_bytes(content[:1000])
    with pytest.raises(CheckpointError):
        follower.evaluate()
    newest.write_bytes(content)

    def gone(*arguments, **settings):
        newest.unlink()
        raise CheckpointError("no such file")

    monkeypatch.setattr("flowmo.load", gone)
    follower.evaluate()
    assert said[-1] == "00000004.pth was removed before it was evaluated"
    assert [(line["checkpoint"], line["removed"]) for line in logged(tmp_path / "a")] == [("00000004.pth", True)]


def follow_where_one_rank_comes_too_late(run, folder):
    """Rank 1 finds the checkpoint gone that rank 0 has loaded."""
    loaded = flowmo.load

    def load(path, *settings, **options):
        if world.main:
            tokenizer = loaded(path, *settings, **options)
            path.unlink()
            world.barrier()
            return tokenizer
        world.barrier()
        return loaded(path, *settings, **options)

    flowmo.load = load
    with join() as world:
        settings = (f"eval.eval_dir={run}", *EVALUATION)
        Follower(settings, folder, Evaluators(), world, report=lambda line: None).evaluate()


def test_a_checkpoint_that_one_rank_cannot_load(config, tmp_path):
    Trainer(config, tmp_path / "run", report=lambda line: None).train()
    run_ranks(follow_where_one_rank_comes_too_late, tmp_path / "run", tmp_path / "a")
    assert [(line["checkpoint"], line["removed"]) for line in logged(tmp_path / "a")] == [("00000004.pth", True)]
