"""Several ranks on this machine, forked from one process that has imported what they need.

For tests of the ranks' work. ``torchrun`` would import PyTorch anew for itself and for each rank.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from conftest import forecast_nothing

from flowmo.cli import main

PRELOADED = ["flowmo.train.trainer", "flowmo.cli", "torch._dynamo", "torch.distributed.fsdp"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(function: Callable[..., Any], *arguments: Any, count: int = 2) -> None:
    """Call a function of a module in ``count`` ranks, whose environment is that of ``torchrun``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    world = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = []
    for rank in range(count):
        names = {name: str(value) for name, value in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()}
        ranks.append(context.Process(target=_rank, args=({**os.environ, **names}, os.getcwd(), function, arguments)))
        ranks[-1].start()
    for rank in ranks:
        rank.join(300)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0] * count


def _rank(environment: dict[str, str], folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    forecast_nothing()
    function(*arguments)


def command(words: list[str], output: Path) -> None:
    """``flowmo`` with these words, as a rank. What rank 0 prints goes to a file."""
    with (output if os.environ["RANK"] == "0" else Path(os.devnull)).open("w") as file, redirect_stdout(file):
        status = main(words)
    sys.exit(status)
