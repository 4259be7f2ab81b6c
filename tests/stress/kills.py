"""Kills training runs at random moments and lets them go on; their end must be that of an unbroken run, bit for bit,
optimizer and all.

Every stage is trained by one process, by two with DDP and by two with FSDP2. ``kill -9`` goes to all of a run's
processes, or to one of two alone, whose fellow then ends by itself, or is ended as torchrun does it: before the two
have met, the other would wait for half an hour. ``tests/stress/test_kills.py`` does this a few times; often::

    python tests/stress/kills.py --kills 120

Processes are forked from one that has imported everything, so that most of their time is training.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import PICTURES, TINY, open_gates
from PIL import Image

from flowmo import Config, FlowMo, preset, save
from flowmo.checkpoint import distributed as sharded
from flowmo.checkpoint.files import read_pth
from flowmo.checkpoint.run_folder import CHECKPOINTS, listing
from flowmo.data import open_source
from flowmo.distributed import join
from flowmo.generate.tokenize import tokenize
from flowmo.train import tokenizer as tokenizer_task
from flowmo.train.state import PARTS
from flowmo.train.trainer import Trainer

WAITED = 600.0
"""Seconds after which a process that should have ended is taken to hang."""
PATIENCE = 15.0
"""Seconds that a process has to notice that its fellow was killed."""
ERRORS = Path(tempfile.gettempdir()) / f"flowmo-kills-{os.getpid()}.txt"
"""What the processes write as errors; shown where one failed by itself."""
COMMON = (
    "data.num_workers=0",
    "data.global_batch_size=4",
    "opt.mup_base_width=0",
    "opt.warmup=0",
    "opt.cooldown=0",
    "data.max_microbatch=4",  # else, and for a line of the log, a run counts its FLOPs first, longer than it trains
    "trainer.log_every=1000 steps",
    "trainer.sample_every=0",
    "trainer.checkpoint_every=2 steps",
    "trainer.enable_bfloat16=false",
    "trainer.tensorboard=false",
)
STAGES = {
    "pretrain": ("opt.lpips_weight=0", "opt.freeze_encoder_after=5 steps"),
    "posttrain": ("model.posttrain_sample=true", "model.posttrain_sample_k=2"),
    "distill": ("model.mean_velocity=true", "eval.sampling.guidance=1", "opt.teacher_steps=2", "opt.jumps=2"),
    "generator": ("generator.hidden_size=32", "generator.depth=2", "generator.num_heads=2"),
}
WAYS = {"1": (1, ()), "2-ddp": (2, ()), "2-fsdp": (2, ("trainer.parallel=fsdp",))}


def make_configs(folder: Path, steps: int) -> dict[str, Config]:
    """A short run of every stage, and what they learn from, in a folder."""
    for i, file in enumerate(sorted(PICTURES.glob("*.jpg"))[:5]):
        (folder / "pictures" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((40, 32)).save(folder / "pictures" / str(i % 2) / f"{i}.png")
    torch.manual_seed(0)
    tokenizer = open_gates(FlowMo(Config.from_dict(TINY))).eval()
    save(tokenizer, folder / "tiny.safetensors")
    tokenize(tokenizer, open_source(folder / "pictures"), folder / "tokens", model="tiny")
    common = (*COMMON, f"trainer.duration={steps} steps")
    configs = {}
    for stage, own in STAGES.items():
        generator = stage == "generator"
        base = preset("maskgit_nano") if generator else Config.from_dict(TINY)
        data = f"data.train={folder / ('tokens' if generator else 'pictures')}"
        teacher = (f"opt.teacher={folder / 'tiny.safetensors'}",) if stage == "distill" else ()
        configs[stage] = base.override(*common, *own, data, *teacher)
    return configs


class SquaredDistance(torch.nn.Module):
    """In the place of LPIPS, whose weights not every machine has."""

    name = "squared distance"

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - y).square().mean(dim=(1, 2, 3))


def fork(work: Callable[[], None]) -> int:
    """Another process that does some work and ends, with 1 and a line in ``ERRORS`` where that raises; its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(ERRORS, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def last_errors() -> str:
    """The end of what the processes wrote as errors."""
    return ERRORS.read_text(errors="replace")[-2000:]


def start(config: Config, folder: Path, processes: int) -> list[int]:
    """The processes of a run that goes on in ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        tokenizer_task.build_distance = lambda *_, **__: SquaredDistance()
        if processes > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes))
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes))
        with join("cpu", group=processes > 1) as world:
            Trainer(config, folder, world, report=lambda line: None).train()

    return [fork(lambda rank=rank: work(rank)) for rank in range(processes)]


def import_what_runs_import(config: Config, folder: Path) -> None:
    """Here, once: torch imports a third of itself on the first step, which every process would do for itself."""
    names = folder / "modules.txt"

    def work() -> None:
        with join("cpu", group=True) as world:
            Trainer(config, folder / "first", world, report=lambda line: None).train()
        names.write_text("\n".join(sys.modules))

    pid = fork(work)
    assert ended([pid], WAITED) == {pid: 0}, "a first run failed"
    for name in names.read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    shutil.rmtree(folder)


def ended(pids: Sequence[int], seconds: float) -> dict[int, int]:
    """Exit statuses of the processes that end within some seconds."""
    statuses: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(statuses) < len(pids):
        for pid in set(pids) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = status
        if time.monotonic() > until:
            break
        time.sleep(0.002)
    return statuses


def whole_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's last checkpoint."""
    path = listing(folder / CHECKPOINTS)[-1]
    if path.is_dir():
        tensors = {name: torch.empty(size) for name, size in sharded.shapes(path).items()}
        sharded.read_into(path, tensors)
        return tensors
    content = read_pth(path)
    return {f"{part}.{name}": value for part in PARTS for name, value in content[part].items()}


def same_end(folder: Path, reference: Path) -> bool:
    def compare() -> None:
        ours, theirs = whole_state(folder), whole_state(reference)
        assert ours.keys() == theirs.keys()
        assert len(ours) > 50
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    pid = fork(compare)
    return ended([pid], WAITED) == {pid: 0}


def kill_often(config: Config, processes: int, scratch: Path, kills: int, chance: random.Random) -> Counter:
    """Runs of one kind, killed so often in all; counts what happened.

    Raises:
        AssertionError: a run hangs, fails where nothing killed it, or ends otherwise than the unbroken one.
    """
    seen: Counter = Counter()
    began = time.monotonic()
    pids = start(config, scratch / "whole", processes)
    assert set(ended(pids, WAITED).values()) == {0}, f"the unbroken run failed\n{last_errors()}"
    length = time.monotonic() - began
    number = 0
    while True:
        folder = scratch / f"run{number}"
        pids = start(config, folder, processes)
        lives = chance.uniform(0, 0.8 * length) if seen["kills"] < kills else WAITED
        statuses = ended(pids, lives)
        if len(statuses) == len(pids):
            assert set(statuses.values()) == {0}, f"{folder} failed by itself\n{last_errors()}"
            assert same_end(folder, scratch / "whole"), f"{folder} ended otherwise"
            seen["ends"] += 1
            shutil.rmtree(folder)
            number += 1
            if seen["kills"] >= kills:
                return seen
            continue
        assert seen["kills"] < kills, f"{folder} hangs"
        seen["kills"] += 1
        victims = [chance.choice(pids)] if processes > 1 and chance.random() < 0.4 else pids
        victims = [pid for pid in victims if pid not in statuses]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        left = [pid for pid in pids if pid not in statuses]
        left = sorted(set(left) - ended(left, PATIENCE).keys())
        if len(victims) < len(pids):
            seen["of one of two alone"] += 1
            seen["whose fellow was ended, not by itself"] += len(left)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert len(ended(left, WAITED)) == len(left)
        checkpoints = folder / CHECKPOINTS
        seen["left half a checkpoint"] += bool(list(checkpoints.glob(".*")))
        seen["before the first checkpoint"] += not listing(checkpoints)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--way", choices=WAYS, action="append", help="processes and how they share (all ways)")
    parser.add_argument("--stage", choices=STAGES, action="append", help="what is trained (all stages)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(arguments.seed)
    ways = {way: WAYS[way] for way in arguments.way or WAYS}
    stages = arguments.stage or list(STAGES)
    each = -(-arguments.kills // (len(stages) * len(ways)))
    total: Counter = Counter()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        stack.callback(ERRORS.unlink, missing_ok=True)
        configs = make_configs(Path(scratch), arguments.steps)
        warm = configs["pretrain"].override("trainer.parallel=fsdp", "trainer.duration=2 steps")
        (Path(scratch) / "warm").mkdir()
        import_what_runs_import(warm, Path(scratch) / "warm")
        for stage, config in ((stage, configs[stage]) for stage in stages):
            for way, (processes, settings) in ways.items():
                folder = Path(scratch) / f"{stage}-{way}"
                seen = kill_often(config.override(*settings), processes, folder, each, chance)
                total += seen
                print(f"{stage:10} {way:7} {dict(seen)}", flush=True)
                shutil.rmtree(folder)
    print(f"in all     {dict(total)}; every end equal to an unbroken run's, bit for bit")


if __name__ == "__main__":
    sys.exit(main())
