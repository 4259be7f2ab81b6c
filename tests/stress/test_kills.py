"""Training runs and ``runs/one_gpu.py`` killed at random moments; the same commands go on to the same end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def run(script: str, *words: str) -> list[str]:
    """Lines that a script of this folder prints."""
    command = [sys.executable, str(HERE / script), *words]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
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
