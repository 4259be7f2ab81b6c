"""Memory that is freed and taken again, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

from flowmo.train import resume
from flowmo.train.memory import machine_memory
from flowmo.train.trainer import Trainer

FAULTS = """
import resource, torch
import flowmo.train.trainer  # as in a run, because the layout of the heap decides
from flowmo.train.memory import keep_freed_memory

def faults():
    for i in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        a = torch.zeros(50_000_000)
        del a
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
assert keep_freed_memory()
print(given_back, min(faults() for _ in range(3)))  # a busy system may take them back once
"""


def test_freed_memory_is_kept():
    """The fourth time that 200 MB are taken and cleared, their pages are still there; otherwise they come anew."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc on Linux can be told so")

    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < 100 < given_back


MIB = 1 << 20
PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
UNLIMITED_V1 = "9223372036854771712"  # the largest multiple of a page: what version 1 says without a limit


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "max"}, PHYSICAL),
        ("0::/\n", {"memory.max": f"{64 * MIB}"}, 64 * MIB),
        ("0::/\n", {"memory.max": f"{2 * PHYSICAL}"}, PHYSICAL),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": f"{96 * MIB}", "memory.max": "max"}, 96 * MIB),
        ("0::/a/b\n", {"a/b/memory.max": f"{32 * MIB}", "a/memory.max": f"{96 * MIB}"}, 32 * MIB),
        ("0::/kubepods/pod1/c1\n", {"memory.max": f"{48 * MIB}"}, 48 * MIB),  # the path is the host's
        ("0::/../../c1\n", {"memory.max": f"{48 * MIB}"}, 48 * MIB),
        ("3:cpu:/x\n4:memory:/x\n", {"memory/x/memory.limit_in_bytes": f"{80 * MIB}"}, 80 * MIB),
        ("4:memory:/docker/1\n", {"memory/memory.limit_in_bytes": f"{80 * MIB}"}, 80 * MIB),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": UNLIMITED_V1}, PHYSICAL),
        ("2:cpu,memory:/\n", {"cpu,memory/memory.limit_in_bytes": f"{16 * MIB}"}, 16 * MIB),
        ("4:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": f"{8 * MIB}"}, 8 * MIB),  # both versions
        ("1:name=systemd:/\n0::/a\n", {"unified/a/memory.max": f"{24 * MIB}"}, 24 * MIB),
        ("3:cpu:/x\n", {"cpu/x/memory.limit_in_bytes": "1"}, PHYSICAL),  # not of the memory controller
        (None, {}, PHYSICAL),
    ],
)
def test_the_limit_of_a_container_is_the_machines_memory(groups, files, expected, tmp_path):
    """File names and contents as in the kernel's cgroup-v1/memory.rst and cgroup-v2.rst."""
    if groups is not None:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, content in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert machine_memory(tmp_path) == expected


@pytest.mark.usefixtures("forecasts")
def test_a_run_plans_with_the_limit(monkeypatch, tiny_config, tmp_path, class_folder):
    """The micro-batch of a run without one shrinks with the memory of the container."""
    settings = (f"data.train={class_folder}", "data.batch_size=64", "opt.lpips_weight=0", "data.num_workers=0")
    sizes = []
    for limit in (64 * 1024 * MIB, 1):
        monkeypatch.setattr(resume, "machine_memory", lambda limit=limit: limit)
        run = Trainer(tiny_config.override(*settings), tmp_path / str(limit), report=lambda line: None)
        sizes.append(run.plan.microbatch)
    assert sizes[0] > sizes[1]
