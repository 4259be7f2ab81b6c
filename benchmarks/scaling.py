"""Strong and weak scaling of training: the real command on 1, 2, … processes, images a second beside perfect scaling.

    python benchmarks/scaling.py --data PICTURES                                     # nano, 1 and 2 CPU processes
    python benchmarks/scaling.py --data PICTURES --device cuda --processes 1 2 4 8 --config configs/lo.yaml

Strong: one global batch, shared. Weak: one batch a process. Every process has a CPU core, or a GPU, of its own;
the first lines of a run's log, while kernels warm up, are left out. The perceptual network is left out, too, so that
no weights are needed: the exchange of gradients takes a larger share of a step than in training with it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WARM_UP = 2
"""Lines of the log that do not count."""


def rate(processes: int, batch: int, arguments: argparse.Namespace) -> float:
    """Images a second of one run, the median over its lines."""
    with tempfile.TemporaryDirectory() as folder:
        lengths = (
            f"trainer.duration={arguments.steps} steps",
            f"trainer.log_every={max(arguments.steps // 10, 1)} steps",
        )
        command = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"),
            *("-m", "flowmo.train", "--config", arguments.config, "--device", arguments.device),
            *("--results-dir", folder, "--experiment-name", "scaling", f"data.train={arguments.data}"),
            *(f"data.global_batch_size={batch}", "data.max_microbatch=0", *lengths, "trainer.sample_every=0"),
            *(
                "trainer.best_metric=",
                "trainer.patience=0",
                "opt.lpips_weight=0",
                "opt.warmup=0",
                "opt.cooldown=0",
                *arguments.settings,
            ),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        lines = (Path(folder) / "scaling" / "metrics.jsonl").read_text().splitlines()
        rates = [line["images_per_second"] for line in map(json.loads, lines) if "images_per_second" in line]
        return statistics.median(rates[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="training pictures")
    parser.add_argument("--config", default="configs/nano.yaml", help="recipe (configs/nano.yaml)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="how many (1 2)")
    parser.add_argument("--batch", type=int, default=16, help="images per process; strong: of the most processes (16)")
    parser.add_argument("--steps", type=int, default=30, help="steps of each run (30)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("settings", nargs="*", help="section.name=value")
    arguments = parser.parse_args()
    most = max(arguments.processes)
    rows = []
    for processes in arguments.processes:
        for kind, batch in (("strong", arguments.batch * most), ("weak", arguments.batch * processes)):
            found = rate(processes, batch, arguments)
            first = next((row["images_per_second"] for row in rows if row["kind"] == kind), found)
            perfect = first * processes / arguments.processes[0]
            rows.append({"kind": kind, "processes": processes, "batch": batch, "images_per_second": found})
            rows[-1]["of_perfect"] = found / perfect
            if not arguments.json:
                print(
                    f"{kind:6} {processes} × {batch // processes:3}  {found:8.1f} images/s  {found / perfect:.0%}",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
