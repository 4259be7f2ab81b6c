"""Processes on this machine, forked from one that has imported what they need.

For tests of what separate processes do. A fresh interpreter would first import PyTorch for three seconds or more, and
``torchrun`` would do so for itself and for each rank.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from conftest import forecast_nothing

from flowmo.cli import main

PRELOADED = ["flowmo.train.trainer", "flowmo.cli", "torch._dynamo", "torch.distributed.fsdp"]
SECONDS = 300


def fork(function: Callable[..., Any], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Start a process that calls a function of a module in this process's folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_child, args=(os.getcwd(), function, arguments))
    process.start()
    return process


def _child(folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    function(*arguments)


def exit_code(process: multiprocessing.process.BaseProcess) -> int | None:
    """Exit code of a process, which is killed if it does not end."""
    process.join(SECONDS)
    process.kill()
    process.join()
    return process.exitcode


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(function: Callable[..., Any], *arguments: Any, count: int = 2, nodes: int = 1) -> None:
    """Call a function of a module in ``count`` ranks, whose environment is that of ``torchrun``."""
    each = count // nodes
    world = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": each, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = []
    for rank in range(count):
        names = {name: str(value) for name, value in {**world, "RANK": rank, "LOCAL_RANK": rank % each}.items()}
        ranks.append(fork(_rank, {**os.environ, **names}, function, arguments))
    assert [exit_code(rank) for rank in ranks] == [0] * count


def _rank(environment: Mapping[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    forecast_nothing()
    function(*arguments)


def command(words: list[str], output: Path) -> None:
    """``flowmo`` with these words, as a rank. What rank 0 prints goes to a file."""
    with (output if os.environ["RANK"] == "0" else Path(os.devnull)).open("w") as file, redirect_stdout(file):
        status = main(words)
    sys.exit(status)


def run_program(
    program: str | list[Any], content: bytes = b"", environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[bytes]:
    """Run ``flowmo`` with a list of words, or lines of Python, with ``content`` on standard input.

    The standard streams are files, and everything written to their descriptors is returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("in", "out", "error")]
        Path(paths[0]).write_bytes(content)
        words = program if isinstance(program, str) else [str(word) for word in program]
        code = exit_code(fork(_program, words, paths, dict(environment)))
        return subprocess.CompletedProcess(words, code, *(Path(path).read_bytes() for path in paths[1:]))


def run_at_terminal(words: list[Any], terminal: str, environment: Mapping[str, str]) -> int | None:
    """Run ``flowmo`` with these words at a terminal, a device. Returns its exit code."""
    return exit_code(fork(_program, [str(word) for word in words], [terminal] * 3, dict(environment)))


def _program(program: str | list[str], paths: list[str], environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(paths):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOCTTY)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(descriptor, mode) for descriptor, mode in enumerate("rww"))
    if isinstance(program, str):
        exec(program, {"__name__": "__main__"})
    else:
        sys.exit(main(program))
