"""Memory: how much a process may use, how much it has used, and how a CPU process keeps what it frees."""

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# mallopt options of glibc and their values
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
MALLOPT = ((MMAP_THRESHOLD, 1 << 30), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 1 << 26))


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next allocation. Return whether it does.

    A training step frees and allocates hundreds of megabytes. Returned to the kernel, their pages are cleared again at
    first touch, which takes about a sixth of a compiled step on a CPU.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(name, value) for name, value in MALLOPT)


def used_memory(device: torch.device) -> int:
    """Return the process's peak memory in bytes: on its GPU if it has one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process may use: the machine's, or the limit of its container.

    Args:
        root: where ``proc`` and ``sys`` are mounted.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Yield the memory limits of this process's cgroups (versions 1 and 2) and of their parents."""
    groups, mounts = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)  # "0::/path" in version 2, "7:memory:/path" in version 1
        if not controllers:
            bases, name = (mounts, mounts / "unified"), "memory.max"
        elif "memory" in controllers.split(","):
            bases, name = (mounts / "memory", mounts / controllers), "memory.limit_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        # in a container the path may be the host's; the parents then end at the container's own root
        for file in (base / part / name for base in bases for part in (group, *group.parents)):
            limit = file.read_text().strip() if file.is_file() else "max"
            if limit.isdecimal():
                yield int(limit)
