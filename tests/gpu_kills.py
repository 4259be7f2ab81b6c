"""Kills ``runs/one_gpu.py`` at random moments; its results stay whole, and the next call goes on.

``kill -9`` goes to the calling process alone, as a scheduler's may, and the part that it started ends by itself.
``tests/test_one_gpu.py`` does this twice; often::

    python tests/gpu_kills.py --kills 20

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
from conftest import PICTURES, ROOT, TINY

sys.path.insert(0, str(ROOT / "runs"))
import one_gpu

from flowmo import load

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many (20)")
    parser.add_argument("--longest", type=float, default=20.0, help="most seconds before one (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    one_gpu.START_METHOD, one_gpu.GRACE = "fork", 5
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
        images = 0
        for _ in range(arguments.kills):
            process = call(folder, 5, "train")
            time.sleep(draw.uniform(0, arguments.longest))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            now = trained(folder)
            assert now >= images, f"{now} images after {images}"
            images = now
        _, status = os.waitpid(call(folder, 0.3, "train", "finish"), 0)
        assert status == 0, f"the last call ended with {os.waitstatus_to_exitcode(status)}"
        assert trained(folder) > images
        results = json.loads((folder / "out" / "results.json").read_text())
        assert [row["steps"] for row in results["finish"]["rows"]] == [1, 25]
        left = sorted(path.name for path in (folder / "out").iterdir())
        assert left == ["metrics.jsonl", "results.json", "samples.png", "weights.0"], left
        one_gpu.join_weights(folder / "out", folder / "whole.safetensors")
        load(folder / "whole.safetensors")
    print(f"{arguments.kills} kills, {images} images before the last call and {results['train']['images']} after it")


if __name__ == "__main__":
    main()
