"""Training through Inductor, which compiles some dozens of C++ files. Other tests of compiled blocks stop before it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import PICTURES

from flowmo import Config
from flowmo.train.trainer import Trainer


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_train_alike(tiny_config: Config, tmp_path):
    """In a process of its own: what the compiler sets up in a process must not reach the other tests."""
    config = tiny_config.override(
        f"data.train={PICTURES}",
        *("data.global_batch_size=4", "data.num_workers=0", "opt.lpips_weight=0", "opt.mup_base_width=0"),
        *("trainer.activation_checkpointing=true", "trainer.checkpoint_keeps=products", "trainer.sample_every=0"),
        *("trainer.max_steps=2", "trainer.log_every=1", "trainer.enable_bfloat16=false", "trainer.tensorboard=false"),
    )
    Trainer(config, tmp_path / "eager", report=lambda line: None).train()
    settings = tmp_path / "settings.yaml"
    settings.write_text(config.override("trainer.compile=true").to_json())
    command = [sys.executable, "-m", "flowmo.train", "--config", settings, "--results-dir", tmp_path]
    command += ["--experiment-name", "compiled", "--device", "cpu"]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("eager", "compiled")]
    eager, compiled = ([json.loads(line)["loss"] for line in each] for each in lines)
    assert compiled == pytest.approx(eager, rel=1e-4)
