"""Many processes under ``torchrun``, and processes that fail together."""

import os
import subprocess
import sys

from conftest import PICTURES, ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
LEAVE = """
import torch
import torch.distributed as dist
from flowmo.distributed import join
with join() as world:
    torch.kept = dist.group.WORLD  # as FSDP2's mesh keeps it
    for _ in range(20):
        world.sum(torch.ones(1))
"""


def run(*words, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*TORCHRUN, *words], env=environment, capture_output=True, text=True, timeout=300, **options)


def test_processes_end_while_the_group_is_kept(tmp_path):
    """Without the pause at the end one of the eight aborted in each of 12 tries."""
    script = tmp_path / "leave.py"
    script.write_text(LEAVE)
    done = run("--nproc-per-node=8", script)
    assert done.returncode == 0, done.stderr


def test_every_script_starts():
    """Each in a process of its own, from another folder."""
    scripts = [path for folder in ("benchmarks", "runs") for path in sorted((ROOT / folder).glob("*.py"))]
    scripts = [path for path in scripts if "ArgumentParser(" in path.read_text()]
    assert len(scripts) > 20
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    for script in scripts:
        words = [sys.executable, script, "--help"]
        done = subprocess.run(words, env=environment, cwd="/", capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{script.name}: {done.stderr}"
        assert "usage: " in done.stdout


def test_a_batch_that_does_not_divide(tiny_config, tmp_path):
    settings = tmp_path / "settings.yaml"
    config = tiny_config.override(f"data.train={PICTURES}", "data.global_batch_size=5", "opt.lpips_weight=0")
    settings.write_text(config.to_json())
    done = run("--nproc-per-node=2", "-m", "flowmo.train", "--config", settings, "--device", "cpu", cwd=tmp_path)
    assert done.returncode != 0
    assert "flowmo: A batch of 5 cannot be split over 2 processes. Write data.global_batch_size=4 or" in done.stderr
