"""Training runs and ``runs/one_gpu.py`` killed at random moments; the same commands go on to the same end."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_distributed import TORCHRUN, base, environment, last_weights, photographs, start  # noqa: F401  # fixtures

from flowmo.checkpoint.run_folder import listing
from flowmo.data import TokenDataset, open_source
from flowmo.data.token_files import Part
from flowmo.generate.tokenize import tokenize

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def run(script: str, *words: str) -> list[str]:
    """Lines that a script of this folder prints."""
    command = [sys.executable, str(HERE / script), *words]
    variables = {**os.environ, "PYTHONPATH": str(HERE.parent.parent / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("way", ["1", "2-ddp", "2-fsdp"])
def test_kills_in_every_stage(way):
    """By one process and by two; every end is that of an unbroken run, bit for bit."""
    rows = run("kills.py", "--kills", "8", "--steps", "12", "--way", way)
    assert [row.split()[0] for row in rows] == ["pretrain", "posttrain", "distill", "generator", "in"]
    assert "'kills': 8" in rows[-1]


def test_kills_leave_whole_results_and_the_next_call_goes_on():
    assert "2 kills" in "\n".join(run("gpu_kills.py", "--kills", "2", "--longest", "6"))


def kill_family(pid):
    """SIGKILL to torchrun and its workers, which live in sessions of their own."""
    os.kill(pid, signal.SIGSTOP)  # or it would restart, or report, the workers killed first
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one_of_them in (*map(int, children), pid):
        os.kill(one_of_them, signal.SIGKILL)


def newest(run):
    """Step of a run's newest checkpoint, 0 without one."""
    found = listing(run / "checkpoints")
    return int(found[-1].stem) if found else 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes to kill through Linux' /proc")
@pytest.mark.parametrize(("parallel", "kills", "steps", "longest"), [("ddp", 20, 240, 0.2), ("fsdp", 6, 30, 0.5)])
def test_kills_at_random_moments_lose_nothing(base, tmp_path, parallel, kills, steps, longest):  # noqa: F811
    """Two processes under torchrun, all killed at random moments, many of them inside a save."""
    config = base.override(
        f"trainer.parallel={parallel}",
        f"trainer.max_steps={steps}",
        "trainer.checkpoint_every=1",
        "trainer.sample_every=0",
        "trainer.log_every=1000",
        f"opt.freeze_encoder_after={steps // 2} steps",
    )
    settings = tmp_path / "settings.yaml"
    settings.write_text(config.to_json())
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "flowmo.train", "--config", settings]
    command += ["--results-dir", tmp_path, "--experiment-name"]
    moments = random.Random(parallel)
    reached = []
    for _ in range(kills):
        with start([*command, "killed"]) as process:
            for line in process.stdout:
                if "from step" in line:  # it is about to train
                    break
            wanted = (reached[-1] if reached else 0) + moments.randrange(3)
            while newest(tmp_path / "killed") < wanted and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, longest))
            assert process.poll() is None, "the run ended before its kill: make it longer"
            kill_family(process.pid)
        reached.append(newest(tmp_path / "killed"))
    assert reached == sorted(reached), "a kill lost a checkpoint"
    assert len(set(reached)) > 2, f"kills between hardly different checkpoints: {reached}"
    for name in ("killed", "whole"):
        done = subprocess.run([*command, name], env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert left == {path.name for path in listing(tmp_path / "killed" / "checkpoints")}, "leftovers of killed saves"
    for ema in (False, True):
        expected = last_weights(tmp_path / "whole", ema)
        assert all(torch.equal(v, expected[k]) for k, v in last_weights(tmp_path / "killed", ema).items())


@pytest.mark.parametrize("jobs", [1, 3])
def test_killed_jobs_tokenize_to_the_same_bytes(tiny, class_folder, tmp_path, jobs):
    source, out, moments = open_source(class_folder), tmp_path / "out", random.Random(jobs)
    settings = {"crops": 5, "flip": True, "shard_size": 2}
    torch.set_num_threads(1)  # others would not live on in a fork

    def start_jobs():
        parts = [Part(number, jobs) for number in range(1, jobs + 1)]
        fork = multiprocessing.get_context("fork").Process
        processes = [fork(target=tokenize, args=(tiny, source, out), kwargs={**settings, "part": p}) for p in parts]
        for process in processes:
            process.start()
        return processes

    tokenize(tiny, source, tmp_path / "whole", **settings)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    kills = 0
    for _ in range(12):
        processes = start_jobs()
        time.sleep(moments.uniform(0, 0.3))
        for process in processes:
            kills += process.is_alive()
            process.kill()
            process.join()
    for process in start_jobs():
        process.join()
        assert process.exitcode == 0
    assert kills > jobs
    assert {name: (out / name).read_bytes() for name in whole} == whole
    assert len(TokenDataset(out)) == 60
