"""Real processes under ``torchrun``: equal results on one and two, exact resume, signals, two "nodes"."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import TINY, run_command
from processes import run_program, run_ranks
from several_runs import train_all

import flowmo
from flowmo import CheckpointError, Config
from flowmo.checkpoint import files as checkpoint
from flowmo.checkpoint.run_folder import listing
from flowmo.distributed import DistributedError, join
from flowmo.train.trainer import Trainer, TrainingError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
HERE = Path(__file__).parent


def quiet(_):
    pass


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    target = tmp_path_factory.mktemp("pictures")
    for file in sorted((HERE.parent / "examples" / "pictures").glob("*.jpg"))[:5]:
        shutil.copy(file, target)
    return target


@pytest.fixture(scope="module")
def base(photographs):
    return Config.from_dict(TINY).override(
        f"data.train={photographs}",
        "data.global_batch_size=4",
        "data.max_microbatch=4",
        "data.num_workers=0",
        "opt.lpips_weight=0",
        "opt.lr=2e-4",
        "opt.mup_base_width=0",
        "opt.max_grad_norm=1",
        "opt.freeze_encoder_after=4 steps",
        "trainer.max_steps=6",
        "trainer.log_every=1",
        "trainer.sample_every=5",
        "eval.sampling.sample_steps=2",
        "trainer.checkpoint_every=3",
        "trainer.enable_bfloat16=false",
        "trainer.tensorboard=false",
    )


CODEBOOK = ["model.quantization_type=vq", "model.vq_entries=8", "opt.freeze_encoder_after=6 steps"]


def same_way(config):
    """How the runs below differ; name -> settings."""
    return {
        "ddp": [],
        "fsdp": ["trainer.parallel=fsdp"],
        "ddp-passes": ["data.max_microbatch=1", "trainer.activation_checkpointing=true"],
        "fsdp-passes": ["data.max_microbatch=1", "trainer.activation_checkpointing=true", "trainer.parallel=fsdp"],
    }


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    """Folder of the runs of ``same_way`` on two processes, and of some others that tests below name.

    Each process is alone on its node.
    """
    results = tmp_path_factory.mktemp("two")
    (results / "base.yaml").write_text(base.to_json())
    runs = list(same_way(base).items())
    runs.append(("statistics", ["model.entropy_statistics=process", "trainer.max_steps=1"]))
    for name, settings in (("ddp", []), ("fsdp", ["trainer.parallel=fsdp"])):
        runs.append((f"{name}-broken", [*settings, "trainer.max_steps=3"]))
        runs.append((f"{name}-broken", settings))
    runs.append(("vq", [*CODEBOOK, "data.max_microbatch=1"]))
    runs.append(("vq-fsdp", [*CODEBOOK, "trainer.parallel=fsdp"]))
    (results / "runs.json").write_text(json.dumps(runs))
    run_ranks(train_all, results / "base.yaml", results / "runs.json", results, nodes=2)
    return results


@pytest.fixture(scope="module")
def one(base, tmp_path_factory):
    """The same run on one process."""
    run = Trainer(base, tmp_path_factory.mktemp("one") / "run", report=quiet)
    run.train()
    return run


def logged(folder, name):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line[name] for line in lines if name in line], dtype=torch.float64)


def last_weights(folder, ema=False):
    path = listing(folder / "checkpoints")[-1]
    return checkpoint.read(path, ema=ema)[1]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "ddp-passes", "fsdp-passes"])
def test_two_processes_train_as_one(one, two, name):
    for figure in ("loss", "flow", "codebook_entropy", "gradient_norm", "held_out_psnr", "ids_used"):
        ours, theirs = logged(one.folder, figure), logged(two / name, figure)
        assert len(ours) == (1 if figure.startswith("held") else 6)
        if (
            figure == "codebook_entropy"
        ):  # with the encoder frozen it is no loss any more, and each process logs its own
            ours, theirs = ours[:4], theirs[:4]
        torch.testing.assert_close(theirs, ours, rtol=2e-4, atol=2e-5, msg=lambda m, f=figure: f"{f}: {m}")
    # Adam turns the rounding of a gradient near zero into a whole step, so weights are compared as a whole.
    torch.manual_seed(0)
    start = flowmo.FlowMo(one.config).state_dict()
    for ema in (False, True):
        theirs, ours = last_weights(two / name, ema), last_weights(one.folder, ema)
        apart = torch.cat([(theirs[key] - ours[key]).flatten() for key in ours]).norm()
        moved = torch.cat([(start[key] - ours[key]).flatten() for key in ours]).norm()
        assert apart < 0.05 * moved, (ema, apart, moved)


def test_two_processes_have_one_codebook(base, two, tmp_path):
    """The one that a process alone has: with the pictures in one pass, in four, and on two processes."""
    run = Trainer(base.override(*CODEBOOK), tmp_path / "one", report=quiet)
    run.train()
    ours = last_weights(run.folder)
    for name in ("vq", "vq-fsdp"):
        theirs = last_weights(two / name)
        assert ours["quantizer.steps"] == theirs["quantizer.steps"] == 6
        torch.testing.assert_close(theirs["quantizer.codebook"], ours["quantizer.codebook"], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(theirs["quantizer.use"], ours["quantizer.use"], rtol=0, atol=2e-3)


def test_the_encoder_froze_in_all_of_them(one, two):
    early = checkpoint.read(listing(one.folder / "checkpoints")[0], ema=False)[1]
    late = last_weights(one.folder)
    assert not torch.equal(early["decoder.picture_out.weight"], late["decoder.picture_out.weight"])
    again = checkpoint.read(listing(two / "fsdp" / "checkpoints")[0], ema=False)[1]
    assert not torch.equal(again["encoder.code_out.weight"], late["encoder.code_out.weight"])


def test_entropies_a_process_alone_are_others(one, two):
    ours, theirs = logged(one.folder, "codebook_entropy"), logged(two / "statistics", "codebook_entropy")
    assert theirs[0] < ours[0] - 0.05  # half the pictures show less of the codebook
    torch.testing.assert_close(
        logged(two / "statistics", "flow")[0], logged(one.folder, "flow")[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_resumed_processes_end_like_unbroken_ones(two, name):
    for ema in (False, True):
        expected = last_weights(two / name, ema)
        assert all(torch.equal(v, expected[k]) for k, v in last_weights(two / f"{name}-broken", ema).items())


@pytest.mark.parametrize(("name", "settings"), [("fsdp", []), ("ddp", ["trainer.parallel=fsdp"])])
def test_one_process_goes_on_from_two(base, one, two, tmp_path, name, settings):
    """A sharded checkpoint into a whole model, and a whole one into a sharded model."""
    folder = tmp_path / name
    newest = listing(two / name / "checkpoints")[-1].name
    shutil.copytree(two / name, folder, ignore=shutil.ignore_patterns(newest))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 3))
    with join("cpu", group=True) as world:
        run = Trainer(base.override(*settings), folder, world, report=quiet)
        assert (run.step, run.images) == (3, 12)
        run.train()
    torch.testing.assert_close(logged(folder, "loss"), logged(one.folder, "loss"), rtol=2e-4, atol=2e-5)


def test_sharded_checkpoints_load_as_tokenizers(two, images):
    path = listing(two / "fsdp" / "checkpoints")[-1]
    assert path.is_dir()
    assert checkpoint.find(two / "fsdp") == path, "the folder of the run names it"
    tokenizer = flowmo.load(path)
    assert torch.isfinite(tokenizer.decode(tokenizer.encode(images[:1]), steps=2)).all()
    assert flowmo.load(path, ema=False).identity() != tokenizer.identity()


@pytest.mark.parametrize("damage", ["truncated", "missing", "code", "other"])
def test_damaged_shards_are_refused(two, tmp_path, damage):
    path = tmp_path / "00000006"
    shutil.copytree(listing(two / "fsdp" / "checkpoints")[-1], path)
    shard = sorted(path.glob("*.distcp"))[0]
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif damage == "missing":
        shard.unlink()
    elif damage == "code":
        witness = tmp_path / "ran"
        (path / ".metadata").write_bytes(f"cos\nsystem\n(S'touch {witness}'\ntR.".encode())
    else:
        (path / ".metadata").write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match="damaged or unsafe") as error:
        flowmo.load(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def start(command):
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment()
    )


def test_a_signal_to_torchrun_saves(base, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(base.override("trainer.max_steps=100000", "trainer.checkpoint_every=100000").to_json())
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "flowmo.train", "--config", settings]
    with start([*command, "--results-dir", tmp_path]) as process:
        for line in process.stdout:
            if line.startswith("step 2 "):
                process.send_signal(signal.SIGTERM)  # to the agent alone, which passes it on
                break
        rest = process.stdout.read()
    assert "Run the same command again to resume" in rest
    assert len(listing(tmp_path / "my_experiment" / "checkpoints")) == 1


def test_a_stop_file_saves(base, tmp_path):
    lines = []

    def report(line):
        lines.append(line)
        if line.startswith("step 2 "):
            (tmp_path / "run" / "stop").touch()

    run = Trainer(base, tmp_path / "run", report=report)
    run.train()
    assert run.step == 2
    assert run.checkpoints()[-1].stem == "00000002"
    Trainer(base, tmp_path / "run", report=quiet).train()
    assert listing(tmp_path / "run" / "checkpoints")[-1].stem == "00000006"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_full_disk_leaves_the_good_checkpoints(base, tmp_path, capsys, parallel):
    """Files may grow to a size that the first checkpoint has and the second, too large by a byte, has not."""
    config = base.override(f"trainer.parallel={parallel}", "trainer.max_steps=3")
    with join("cpu", group=True) as world:
        Trainer(config, tmp_path / "run", world, report=quiet).train()
    good = listing(tmp_path / "run" / "checkpoints")[-1]
    files = [good] if good.is_file() else [p for p in good.rglob("*") if p.is_file()]
    before = {file: file.read_bytes() for file in files}
    settings = tmp_path / "settings.yaml"
    settings.write_text(base.override(f"trainer.parallel={parallel}").to_json())
    command = ["train", "--config", settings, "--results-dir", tmp_path, "--experiment-name", "run", "--device", "cpu"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(len(content) for content in before.values()) // 2, hard))
    try:
        status, _, error = run_command(capsys, *command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status, error.count("\n")) == (2, 1), error
    assert "could not be written" in error
    assert f"{good} is sound" in error
    assert {file: file.read_bytes() for file in files} == before
    assert listing(tmp_path / "run" / "checkpoints") == [good]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_second_run_in_the_folder_is_refused(base, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(base.to_json())
    first = Trainer(base, tmp_path / "run", report=quiet)
    done = run_program(["train", "--config", settings, "--results-dir", tmp_path, "--experiment-name", "run"])
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"another run is writing there" in done.stderr
    first.train()
    assert Trainer(base, tmp_path / "run", report=quiet).step == 6


def test_an_unreadable_checkpoint_is_named(base, tmp_path):
    Trainer(base, tmp_path / "run", report=quiet).train()
    older, newest = listing(tmp_path / "run" / "checkpoints")
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainingError, match=rf"{newest}.*Delete it to resume from {older}"):
        Trainer(base, tmp_path / "run", report=quiet)
    newest.unlink()
    assert Trainer(base, tmp_path / "run", report=quiet).step == 3


def test_a_folder_of_something_else_is_no_checkpoint(base, two, tmp_path):
    path = tmp_path / "00000003"
    shutil.copytree(listing(two / "fsdp" / "checkpoints")[0], path)
    (path / "run.json").unlink()
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        Trainer(base, tmp_path / "run", resume_from=path, report=quiet)


def test_processes_that_cannot_meet(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(DistributedError, match="Process 0 of 2 cannot reach the others"), join("cpu"):
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_fellow_was_killed_before_they_met_does_not_wait_for_ever(monkeypatch, rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"WORLD_SIZE": 2, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("flowmo.distributed.RENDEZVOUS_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(DistributedError, match=f"Process {rank} of 2 cannot reach the others") as error, join("cpu"):
        pass
    assert "\n" not in str(error.value)


def test_ranks_wait_for_the_work_of_one(tmp_path):
    """Rank 0 evaluates, writes or plots for longer than a collective may take."""
    run_ranks(rank_0_works, tmp_path)
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["measured", "measured"]


def rank_0_works(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowmo.distributed.COLLECTIVE_TIMEOUT", timedelta(seconds=2))
        with join("cpu") as world:
            if world.main:
                time.sleep(3)
            value = world.broadcast("measured" if world.main else None)
            if world.main:
                time.sleep(3)
            world.barrier()
            assert world.any(world.main)
            (folder / str(world.rank)).write_text(value)


def test_a_world_of_two_without_an_address(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match="Process 0 of 2 cannot reach the others"), join("cpu"):
        pass


def test_the_end_of_another_process_is_told_in_one_line():
    torchs = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1.\nThis is typical"
    with pytest.raises(DistributedError, match="Another process of the run has ended") as error, join(group=True):
        raise RuntimeError(torchs)
    assert "\n" not in str(error.value)
    with pytest.raises(DistributedError, match="does not answer"), join(group=True):
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation")
    for other in ("something else", "NCCL error: out of memory"):
        with pytest.raises(RuntimeError, match=other), join(group=True):
            raise RuntimeError(other)
    with pytest.raises(DistributedError, match="gloo is ours"), join(group=True):
        raise DistributedError("gloo is ours")


def test_more_processes_than_gpus(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": str(torch.cuda.device_count())}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match="has no GPU of its own"), join("cuda"):
        pass


def test_one_device_is_not_for_several_processes(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(DistributedError, match=r"names one device for 2 processes. Write --device cuda\."),
        join("cuda:0"),
    ):
        pass
