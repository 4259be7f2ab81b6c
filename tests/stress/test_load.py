"""A little of the load that ``tests/stress/load.py`` puts on the web page and the command line."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import load as loads
import pytest

GROWTH = 96 << 20
"""Bytes that neither may grow by, whatever the number of pictures."""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures memory through Linux' /proc")
def test_pictures_through_the_command_line(tmp_path):
    files, process, held, printed = loads.encode(tmp_path, 300)
    assert process.returncode == 0, printed
    assert loads.check_files(tmp_path, files, every=3) == 300
    assert printed.splitlines()[-1].startswith("300 images: ")
    assert held[-1] - held[0] < GROWTH


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures memory through Linux' /proc")
def test_an_interrupt_leaves_whole_files_only(tmp_path):
    files, process, _, printed = loads.encode(tmp_path, 200, interrupt_at=40)
    assert process.returncode == 130, printed
    assert printed.splitlines()[-1] == "flowmo: interrupted"
    assert 40 <= loads.check_files(tmp_path, files, every=3) < 200
    shutil.rmtree(tmp_path / "out")


def test_requests_at_once_each_get_their_own_picture():
    """In a process of its own, with which the page's threads and sockets end."""
    command = [sys.executable, "-W", "ignore", loads.__file__, "page", "--count", "24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    answered = re.search(r"24 requests at once, .* memory (\d+) -> (\d+) MiB", done.stdout)
    before, after = (int(number) << 20 for number in answered.groups())
    assert after - before < GROWTH
