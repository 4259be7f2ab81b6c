"""Kills ``runs/one_gpu.py`` at random moments; its results stay whole, and the next call goes on.

``kill -9`` goes to the calling process alone, as a scheduler's may, and the part that it started ends by itself.
``tests/stress/test_kills.py`` does this twice; often::

    python tests/stress/gpu_kills.py --kills 20

Processes are forked from one that has imported everything, so that most of their time is training.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import PICTURES, ROOT, TINY

sys.path.insert(0, str(ROOT / "runs"))
import gpu_parts
import one_gpu

from flowmo import load

WAITED = 300.0
"""Seconds after which a call that should have written a checkpoint is taken to hang."""

RECIPE = {
    **TINY,
    "data": {**TINY["data"], "global_batch_size": 4},
    "opt": {"lpips_weight": 0, "mup_base_width": 0},
    "trainer": {"enable_bfloat16": False},
    "eval": {"sampling": {"sample_steps": 1}},
}


def call(folder: Path, minutes: float, *parts: str) -> int:
    """Start a call of the script; the number of its process."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        words = ["--dry-run", "--minutes", str(minutes), "--only", *parts, "--pictures", str(PICTURES)]
        words += ["--out", str(folder / "out"), "--state", str(folder / "state"), "--config", str(folder / "tiny.yaml")]
        sys.argv = ["one_gpu.py", *words]
        os._exit(one_gpu.main())
    return process


def trained(folder: Path) -> int:
    """Images that the results tell of, which must be whole."""
    path = folder / "out" / "results.json"
    return json.loads(path.read_text()).get("train", {}).get("images", 0) if path.exists() else 0


def wait_for_more(folder: Path, images: int) -> None:
    """Return once the results tell of more images than before."""
    limit = time.monotonic() + WAITED
    while trained(folder) <= images:
        assert time.monotonic() < limit, f"no checkpoint after {images} images within {WAITED:g} s"
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many (20)")
    parser.add_argument("--longest", type=float, default=10.0, help="most seconds before one (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    one_gpu.START_METHOD = "fork"
    gpu_parts.PERIODS["checkpoint"] = 0.5
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
        images, reached = 0, set()
        for kill in range(arguments.kills):
            process = call(folder, 60, "train")
            if kill % 2:
                wait_for_more(folder, images)
                time.sleep(draw.uniform(0, 1))
            else:
                time.sleep(draw.uniform(0, arguments.longest))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            now = trained(folder)
            assert now >= images, f"{now} images after {images}"
            reached.add(images := now)
        process = call(folder, 60, "train")
        wait_for_more(folder, images)
        (folder / "state" / "dry_run" / "train" / "stop").touch()
        assert os.waitpid(process, 0)[1] == 0
        assert os.waitpid(call(folder, 60, "finish"), 0)[1] == 0
        results = json.loads((folder / "out" / "results.json").read_text())
        assert [row["steps"] for row in results["finish"]["rows"]] == [1, 25]
        left = sorted(path.name for path in (folder / "out").iterdir())
        assert left == ["metrics.jsonl", "results.json", "samples.png", "weights.0"], left
        one_gpu.join_weights(folder / "out", folder / "whole.safetensors")
        load(folder / "whole.safetensors")
    print(f"{arguments.kills} kills at {len(reached)} different checkpoints, then {results['train']['images']} images")


if __name__ == "__main__":
    main()
