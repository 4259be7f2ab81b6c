"""How many threads a command takes beside other processes.

The threads of an operation wait for the last of them. Beside a busy neighbour one of them often waits for its core, and
then all do: a network becomes several times slower on all cores than on the free ones.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

from flowmo.cli.output import warn

STAT = Path("/proc/stat")
QUOTAS = (("/sys/fs/cgroup/cpu.max",), ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"))
"""Files with a container's CPU time and the period that it is for, of cgroups 2 and 1."""
NAMED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
ADAPT = ("reconstruct", "encode", "decode", "generate")
"""Short commands. They take the cores that are free when they start."""
ADVISE = ("train", "evaluate", "tokenize", "bench", "demo")
"""Long commands. Load at the start says little, and the number of threads may change the last bits of a resumed run."""
SHORTEST = 0.3
"""Seconds over which load can be measured."""


class Load(NamedTuple):
    """CPU seconds so far: of all processes on this process's CPUs, and its own."""

    at: float
    busy: float
    own: float

    @classmethod
    def now(cls) -> Load | None:
        """``None`` if the system does not tell."""
        try:
            return cls(time.monotonic(), busy_seconds(STAT.read_text(), cpus()), time.process_time())
        except (OSError, ValueError):
            return None


def cpus() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def busy_seconds(stat: str, chosen: set[int]) -> float:
    """Seconds that the ``chosen`` CPUs were not idle, from the text of ``/proc/stat``."""
    ticks = 0
    for name, *columns in (line.split() for line in stat.splitlines() if line.startswith("cpu")):
        if name[3:].isdigit() and int(name[3:]) in chosen:
            user, nice, system, _, _, interrupts, soft, stolen = map(int, columns[:8])
            ticks += user + nice + system + interrupts + soft + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


def quota() -> float:
    """CPUs that a container may use; infinite without a limit."""
    for files in QUOTAS:
        try:
            time_us, period_us = " ".join(Path(file).read_text() for file in files).split()
            return float("inf") if time_us in ("max", "-1") else int(time_us) / int(period_us)
        except (OSError, ValueError):
            continue
    return float("inf")


def free_cores(before: Load, after: Load, cores: int) -> int:
    """Cores that other processes left free between two moments, at least 1."""
    others = (after.busy - before.busy - (after.own - before.own)) / (after.at - before.at)
    return max(1, min(cores, round(cores - others)))


def choose(command: str, before: Load | None) -> None:
    """Set torch's threads for a command, unless the environment names them.

    Args:
        before: load when the process started. Other processes are measured from then, while torch is imported.
    """
    if command not in ADAPT + ADVISE or any(name in os.environ for name in NAMED):
        return
    import torch

    cores = torch.get_num_threads()
    allowed = max(1, round(min(cores, quota())))
    after = Load.now()
    if before and after and after.at - before.at > SHORTEST:
        free = free_cores(before, after, cores)
        if command in ADAPT:
            allowed = min(allowed, free)
        elif free < allowed:
            advice = f"Other processes keep {cores - free} of {cores} cores busy. {NAMED[0]}={free} may be faster."
            warn(advice)
    if allowed < cores:
        torch.set_num_threads(allowed)
