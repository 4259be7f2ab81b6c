"""What can happen to a training run: kills, full and read-only disks, data that go away or hang, clocks that jump."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY

from flowmo import CheckpointError, Config
from flowmo.checkpoint import files as checkpoint
from flowmo.checkpoint.run_folder import best_checkpoint, listing
from flowmo.data import DataError, FolderSource, ImageDataset, TarSource, batches
from flowmo.data.transforms import time_limit
from flowmo.images import ImageError
from flowmo.train.failures import plain_errors
from flowmo.train.schedule import BatchPlan
from flowmo.train.state import FolderLock, tidy
from flowmo.train.trainer import Trainer, TrainingError

HERE = Path(__file__).parent


def quiet(_):
    pass


@pytest.fixture
def folder(tmp_path, picture_files):
    (tmp_path / "pictures").mkdir()
    for file in picture_files[:4]:
        shutil.copy(file, tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture
def config(folder):
    return Config.from_dict(TINY).override(
        f"data.train={folder}",
        "data.global_batch_size=4",
        "data.num_workers=0",
        "opt.lpips_weight=0",
        "opt.mup_base_width=0",
        "trainer.max_steps=4",
        "trainer.log_every=2",
        "trainer.sample_every=0",
        "trainer.checkpoint_every=2",
        "trainer.enable_bfloat16=false",
        "trainer.tensorboard=false",
    )


def last(run_folder):
    content = checkpoint.read_pth(listing(run_folder / "checkpoints")[-1])
    return {f"{part}.{name}": x for part in ("model", "ema", "optimizer") for name, x in content[part].items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


# Disks


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a small file system over a folder, or changes how it is mounted."""
    places = []

    def mount(place, options):
        again = place in places
        place.mkdir(parents=True, exist_ok=True)
        words = ["mount", "-o", f"remount,{options}", place] if again else ["mount", "-t", "tmpfs", "-o", options]
        words += [] if again else ["tmpfs", place]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("may not mount file systems here")
        places.append(place)

    yield mount
    for place in set(places):
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(not shutil.which("mount"), reason="has no mount")
def test_a_disk_fills_up_is_made_read_only_and_mended(config, mounted, tmp_path):
    Trainer(config, tmp_path / "whole", report=quiet).train()
    size = listing(tmp_path / "whole" / "checkpoints")[-1].stat().st_size
    checkpoints = tmp_path / "run" / "checkpoints"
    mounted(checkpoints, f"size={int(size * 1.5)}")
    with pytest.raises(CheckpointError, match=r"No space left.*00000002.pth is sound"):
        Trainer(config, tmp_path / "run", report=quiet).train()
    assert [path.name for path in checkpoints.iterdir()] == ["00000002.pth"]
    mounted(checkpoints, "ro")
    with pytest.raises(CheckpointError, match=r"Read-only file system.*00000002.pth is sound"):
        Trainer(config, tmp_path / "run", report=quiet).train()
    mounted(checkpoints, f"rw,size={size * 4}")
    Trainer(config, tmp_path / "run", report=quiet).train()
    assert same(last(tmp_path / "run"), last(tmp_path / "whole"))


def test_a_file_in_the_way_of_the_checkpoints(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    with pytest.raises(CheckpointError, match="There is none yet") as error:
        Trainer(config, tmp_path / "run", report=quiet).train()
    assert len(str(error.value).splitlines()) == 1


# Data


def test_a_picture_that_disappears_is_named_and_left_out(config, folder, tmp_path):
    lines = []
    run = Trainer(config.override("data.max_bad_share=0.5"), tmp_path / "run", report=lines.append)
    gone = sorted(folder.glob("*"))[0]
    gone.unlink()
    run.train()
    assert [line for line in lines if line == f"left out: {gone}: no such file."]
    assert run.step == 4


def test_a_tar_that_disappears_is_named(picture_files, tmp_path):
    tar = tmp_path / "a.tar"
    subprocess.run(["tar", "cf", tar, "-C", picture_files[0].parent, picture_files[0].name], check=True)
    source = TarSource([tar])
    tar.unlink()
    with pytest.raises(ImageError, match=rf"{tar}:{picture_files[0].name}: cannot be read"):
        source.read(0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe with a name")
def test_a_source_that_hangs_is_named(folder):
    """A pipe that nobody writes to: opening it waits for ever, as a server that has gone does."""
    source = FolderSource(folder)
    source.files[0].unlink()
    os.mkfifo(source.files[0])
    image, bad = ImageDataset(source, 32, timeout=0.3).load(0, seed=0)
    assert image.shape == (3, 32, 32)
    assert list(bad) == [str(source.files[0])]
    assert "not read within 0.3 s (data.read_timeout)" in bad[str(source.files[0])]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_library_that_swallows_the_time_limit_is_stopped_again():
    def swallow():
        try:
            time.sleep(10)
        except Exception:  # as Pillow does with damaged metadata
            time.sleep(10)

    with pytest.raises(ImageError, match="a: not read within"), time_limit(0.1, "a"):
        swallow()


def test_a_source_that_is_slow_for_ever_ends_in_one_line(folder):
    class Slow(FolderSource):
        def read(self, index, side=None, pixels=None):
            time.sleep(100)

    views = ImageDataset(Slow(folder), 32, timeout=0.05)
    stream = batches(views, 2, seed=0, start=0, workers=0)
    with pytest.raises(DataError, match=r"8 images in a row cannot be read. The first: .*not read within"):
        next(stream)


FATAL = """
import os, signal, sys, torch
from flowmo.data import DataError, batches
from flowmo.train.failures import plain_errors
from flowmo.train.schedule import BatchPlan

class Items:
    def __len__(self):
        return 4
    def load(self, index, seed):
        if index == 2:  # takes its reader with it
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1), {}

try:
    with plain_errors(BatchPlan(1, 1, 1), lambda: 1):
        for _ in batches(Items(), 1, seed=0, start=0, workers=1):
            pass
except DataError as error:
    os.write(1, str(error).encode())
    os._exit(0)
"""


def test_a_worker_killed_alone_ends_the_run_in_one_line():
    done = subprocess.run([sys.executable, "-c", FATAL], capture_output=True, text=True, timeout=120)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1), done.stderr
    assert done.stdout.startswith("Data loading failed: ")
    assert done.stdout.endswith("Run the same command again to resume from the last checkpoint.")


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="another matter"), plain_errors(BatchPlan(1, 1, 1), lambda: 1):
        raise RuntimeError("another matter")
    with pytest.raises(TrainingError, match="gloo"), plain_errors(BatchPlan(1, 1, 1), lambda: 1):
        raise TrainingError("gloo")


# Clocks


def test_clocks_that_jump_change_nothing(config, monkeypatch, tmp_path):
    Trainer(config, tmp_path / "whole", report=quiet).train()
    real, jumps = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(jumps) * 10**8)
    Trainer(config.override("trainer.max_steps=2"), tmp_path / "broken", report=quiet).train()
    newest = listing(tmp_path / "broken" / "checkpoints")[-1]
    os.utime(newest, (0, 0))  # as if the clock had been set back before it was written
    Trainer(config, tmp_path / "broken", report=quiet).train()
    assert same(last(tmp_path / "broken"), last(tmp_path / "whole"))
    assert [path.stem for path in listing(tmp_path / "broken" / "checkpoints")] == ["00000002", "00000004"]


def test_a_second_sigterm_does_not_interrupt_the_last_checkpoint(config, monkeypatch, tmp_path):
    """torchrun sends SIGTERM to a process and to its group."""
    run = Trainer(config.override("trainer.checkpoint_every=40"), tmp_path / "run", report=quiet)
    save, step = run.save, run._step

    def interrupted_step(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    def interrupted_save():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
        return save()

    monkeypatch.setattr(run, "_step", interrupted_step)
    monkeypatch.setattr(run, "save", interrupted_save)
    run.train()
    assert [path.stem for path in run.checkpoints()] == ["00000001"]


def test_the_best_checkpoint_of_a_former_stage_is_not_that_of_the_run(config, tmp_path):
    judged = (f"data.val={config.data.train}", "trainer.best_metric=psnr", "eval.images=2")
    Trainer(config.override(*judged), tmp_path / "run", report=quiet).train()
    assert (tmp_path / "run" / "best").is_file()
    later = config.override("model.train=decoder", "trainer.max_steps=6", "trainer.keep_last=1")
    Trainer(later, tmp_path / "run", report=quiet).train()
    assert best_checkpoint(tmp_path / "run").stem == "00000006"


def test_copies_of_checkpoints_are_left_alone(config, tmp_path):
    Trainer(config, tmp_path / "run", report=quiet).train()
    folder = tmp_path / "run" / "checkpoints"
    for name in ("00000004_backup.pth", "00000004.copy.pth", "9.old.pth"):
        shutil.copy(folder / "00000004.pth", folder / name)
    again = Trainer(config.override("trainer.max_steps=8", "trainer.keep_last=1"), tmp_path / "run", report=quiet)
    assert again.step == 4
    again.train()
    names = ["00000004.copy.pth", "00000004_backup.pth", "00000008.pth", "9.old.pth"]
    assert sorted(path.name for path in folder.iterdir()) == names


@pytest.mark.parametrize(("number", "refused"), [(errno.EAGAIN, True), (errno.EACCES, True), (errno.ENOLCK, False)])
def test_a_file_system_without_locks_is_no_other_run(number, refused, monkeypatch, tmp_path):
    def lockf(descriptor, kind):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("flowmo.train.state.fcntl.lockf", lockf)
    if not refused:
        FolderLock(tmp_path)
        return
    with pytest.raises(TrainingError, match="another run is writing there"):
        FolderLock(tmp_path)


def test_files_that_nfs_keeps_for_a_reader_stay(tmp_path):
    for name in (".nfs0000000000a1", ".00000004.pth.ab12"):
        (tmp_path / name).touch()
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".nfs0000000000a1"]
