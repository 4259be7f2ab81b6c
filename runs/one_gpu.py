"""Spends some minutes of one GPU well: checks, measures, trains and evaluates, without a network.

    python runs/one_gpu.py --minutes 9 --out OUT --pictures packs/*.zip
    python runs/one_gpu.py --dry-run --minutes 3 --out out            # everything in little, on a CPU
    python runs/one_gpu.py --join OUT nano.safetensors                # the weights, from their pieces
    python runs/one_gpu.py --table OUT/results.json docs/performance.md

The parts, in this order: ``check`` runs tests/gpu, ``measure`` times training and inference, ``train`` trains a recipe
for all the time that remains, ``finish`` evaluates it on held-out images. A second call resumes the training.
OUT gets at most 8 files of at most 16 MiB; see docs/training.md, "One GPU, no network, half an hour".
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from gpu_parts import (
    PARTS,
    ROOT,
    Job,
    check_pieces,
    describe_sources,
    join_weights,
    missing_weights,
    read_results,
    run_part,
)
from gpu_parts import write_results as write
from gpu_table import fill_table
from pack_images import MIB, pack

from flowmo.errors import FlowMoError

SHARES = {"check": (0.3, 120), "measure": (0.25, 240), "finish": (0.15, 180)}
"""Share of the time and most seconds of each part beside ``train``, which takes what remains; without it, the shares
divide all of the time."""
GRACE = 10
"""Seconds after its time in which a part may end by itself."""
START_METHOD = "spawn"
"""Of the parts' processes: CUDA does not survive a fork."""


def end_of(part: str, parts: list[str], minutes: float, now: float, deadline: float) -> float:
    """When a part should end.

    Args:
        parts: all parts of this call.
        now: when the part begins.
        deadline: when the last part should end.
    """
    most = {name: min(share * 60 * minutes, seconds) for name, (share, seconds) in SHARES.items() if name in parts}
    if "train" not in parts:  # it would take what the others leave
        most = {name: 60 * minutes * SHARES[name][0] / sum(SHARES[other][0] for other in parts) for name in parts}
    if part == "train":
        return deadline - most.get("finish", 0)
    return deadline if part == parts[-1] else min(now + most[part], deadline)


def run(job: Job, parts: list[str], minutes: float) -> list[str]:
    """Run the parts one after another, each in a process of its own. Returns those that did not end well."""
    deadline = time.time() + 60 * minutes - GRACE
    describe(job, minutes)
    bad = []
    for part in parts:
        until = end_of(part, parts, minutes, time.time(), deadline)
        print(f"--- {part}, {until - time.time():.0f} s", flush=True)
        if not run_process(replace(job, part=part, until=until)):
            bad.append(part)
    return bad


def run_process(job: Job) -> bool:
    """Run one part. One that does not end in time is ended, and one that died is told of. True if it ended well."""
    write(job, {**read_results(job).get(job.part, {}), "status": "running", "traceback": None})
    process = multiprocessing.get_context(START_METHOD).Process(target=run_part, args=(job,))
    process.start()
    process.join(max(job.left, 1) + GRACE)
    late = process.is_alive()
    if late:
        process.terminate()
        process.join(GRACE)
        process.kill()
        process.join()
    found = read_results(job)[job.part]
    if late and found["status"] == "running":
        write(job, {**found, "status": "ended by the clock"})
    elif process.exitcode and found["status"] == "running":
        write(job, {**found, "status": "failed", "traceback": f"The process ended with code {process.exitcode}."})
    status = read_results(job)[job.part]["status"]
    print(f"{job.part}: {status}", flush=True)
    return status == "done"


def describe(job: Job, minutes: float) -> None:
    """Record the code and this call, and remove what a killed call left half-written."""
    for name in ("results.json", "metrics.jsonl", "weights"):
        for path in (*job.out.glob(f".{name}.*"), *job.state.glob(f".{name}.*")):
            path.unlink(missing_ok=True)
    commit = ""
    with suppress(OSError):  # there may be no git
        words = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    calls = read_results(job).get("run", {}).get("calls", [])
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    about = {"commit": commit or None, "sources": describe_sources()}
    write(replace(job, part="run"), {**about, "calls": [*calls, {"began": now, "minutes": minutes}]})


def ready(job: Job, parts: list[str]) -> Job:
    """The job with what a dry run lacks.

    Raises:
        FlowMoError: something that a part needs is not there. Nothing has been spent yet.
    """
    if not {"train", "finish"} & set(parts):
        return job
    if job.dry_run and not job.packs:
        packs = pack(job.state / "packs", [ROOT / "examples" / "pictures"], [], 160, MIB)
        job = replace(job, packs=tuple(path for path, _ in packs))
    if not job.packs:
        raise FlowMoError(
            "There are no images to train on. Make a pack with runs/pack_images.py, give --pictures PACK."
        )
    gone = [path for path in (*job.packs, *([job.start] if job.start else [])) if not path.exists()]
    if gone:
        raise FlowMoError(f"{gone[0]} is not there.")
    lacking = missing_weights(job.recipe())
    if lacking and not job.dry_run:
        raise FlowMoError(f"{lacking}. runs/pack_weights.py makes a small file of them.")
    check_pieces(job.recipe())
    more = ["opt.lpips_weight=0"] if lacking else []
    if job.recipe().trainer.compile and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        print("There is no C compiler, which torch.compile needs. Training without it.", flush=True)
        more.append("trainer.compile=false")
    return replace(job, settings=(*job.settings, *more))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="time for all parts together (9)")
    parser.add_argument("--out", type=Path, help="folder of the files to bring back")
    parser.add_argument(
        "--pictures", type=Path, nargs="*", default=[], metavar="PACK", help="packs or folders of images"
    )
    parser.add_argument("--start", type=Path, metavar="WEIGHTS", help="weights or checkpoint to start training from")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="parts to run (all)")
    parser.add_argument("--dry-run", action="store_true", help="run everything in little, on the CPU")
    parser.add_argument(
        "--later", type=float, default=0, metavar="MINUTES", help="training that follows in later calls, in minutes (0)"
    )
    parser.add_argument(
        "--config", type=Path, default=ROOT / "configs" / "nano_gpu.yaml", help="recipe (nano_gpu.yaml)"
    )
    parser.add_argument("--settings", nargs="*", default=[], metavar="NAME=VALUE", help="settings over the recipe's")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path("results/one_gpu"),
        help="folder of checkpoints (results/one_gpu; a dry run adds /dry_run)",
    )
    parser.add_argument("--join", type=Path, nargs=2, metavar=("DIR", "OUT"), help="put the pieces of weights together")
    parser.add_argument(
        "--table", type=Path, nargs=2, metavar=("RESULTS", "PAGE"), help="fill the table of a page from results.json"
    )
    return parser


def main() -> int:
    arguments = parser().parse_args()
    try:
        if arguments.join:
            join_weights(*arguments.join)
            return 0
        if arguments.table:
            fill_table(*arguments.table)
            return 0
        if arguments.out is None:
            raise FlowMoError("Name the folder of the files to bring back: --out DIR.")
        job = Job(
            part="run",
            out=arguments.out.resolve(),
            state=(arguments.state / "dry_run" if arguments.dry_run else arguments.state).resolve(),
            until=0.0,
            packs=tuple(path.resolve() for path in arguments.pictures),
            start=arguments.start and arguments.start.resolve(),
            later=60 * arguments.later,
            config=arguments.config.resolve(),
            settings=tuple(arguments.settings),
            dry_run=arguments.dry_run,
        )
        parts = [part for part in PARTS if part in arguments.only]
        return bool(run(ready(job, parts), parts, arguments.minutes))
    except FlowMoError as error:
        print(f"one_gpu: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
