"""Memory on a CPU: how much there is, and how a process deals with what it frees."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""glibc's names for what ``mallopt`` sets."""
LARGE = 1 << 30


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for what is allocated next, rather than give it back; whether it can.

    A training step frees and takes again hundreds of megabytes. Given back, they return as pages that the kernel
    clears one by one at their first touch, which costs a compiled step on a CPU about a sixth of its time.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    settings = ((MMAP_THRESHOLD, LARGE), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 1 << 26))
    return all(library.mallopt(name, value) for name, value in settings)


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: the machine's, or the limit of a container around it.

    Args:
        root: where ``proc`` and ``sys`` are mounted.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> Iterator[int]:
    """The memory limits of this process's control groups, of version 1 and 2, and of all groups around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux, or no /proc
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:  # "0::/path" of version 2, "7:memory:/path" of version 1
        _, controllers, path = line.split(":", 2)
        if not controllers:
            places, name = (mounts, mounts / "unified"), "memory.max"
        elif "memory" in controllers.split(","):
            places, name = (mounts / "memory", mounts / controllers), "memory.limit_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for place in places:
            # In a container the path may be the host's, which is not there; the container's own group is the root.
            for folder in (place / group, *(place / above for above in group.parents)):
                try:
                    limit = (folder / name).read_text().strip()
                except OSError:
                    continue
                if limit.isdecimal():  # not "max"
                    yield int(limit)
