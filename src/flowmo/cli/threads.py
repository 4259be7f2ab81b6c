"""How many threads a command takes beside other processes.

The threads of an operation wait for the last of them. Beside a busy neighbour one of them often waits for its core, and
then all do: a network becomes several times slower on all cores than on the free ones.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

from flowmo.cli.output import warn

STAT, QUOTA = Path("/proc/stat"), Path("/sys/fs/cgroup/cpu.max")
NAMED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
ADAPT = ("reconstruct", "encode", "decode", "generate")
"""Short commands. They take the cores that are free when they start."""
ADVISE = ("train", "evaluate", "tokenize", "bench", "demo")
"""Long commands. Load at the start says little, and the number of threads may change the last bits of a resumed run."""
SHORTEST = 0.3
"""Seconds over which load can be measured."""


class Load(NamedTuple):
    """CPU seconds of other processes so far, on the CPUs that this process may use."""

    at: float
    others: float

    @classmethod
    def now(cls) -> Load | None:
        """``None`` if the system is not Linux."""
        try:
            chosen = {f"cpu{index}" for index in os.sched_getaffinity(0)}
            rows = [line.split() for line in STAT.read_text().splitlines()]
            # user, nice, system, idle, iowait, irq, softirq, steal
            ticks = sum(sum(map(int, row[1:9])) - int(row[4]) - int(row[5]) for row in rows if row[0] in chosen)
            return cls(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK") - time.process_time())
        except (OSError, AttributeError):
            return None


def quota() -> float:
    """CPUs that a container may use; infinite without a limit."""
    try:
        time_us, period_us = QUOTA.read_text().split()
        return int(time_us) / int(period_us)
    except (OSError, ValueError):  # "max"
        return math.inf


def choose(command: str, before: Load | None) -> None:
    """Set torch's threads for a command, unless the environment names them.

    Args:
        before: load when the process started. Other processes are measured from then, while torch is imported.
    """
    if command not in ADAPT + ADVISE or any(name in os.environ for name in NAMED):
        return
    import torch

    cores, after = torch.get_num_threads(), Load.now()
    free = allowed = max(1, round(min(cores, quota())))
    if before and after and after.at - before.at > SHORTEST:
        busy = (after.others - before.others) / (after.at - before.at)
        free = max(1, min(allowed, round(cores - busy)))
    if command in ADAPT:
        allowed = free
    elif free < allowed:
        warn(f"Other processes keep {cores - free} of {cores} cores busy. {NAMED[0]}={free} may be faster.")
    if allowed < cores:
        torch.set_num_threads(allowed)
