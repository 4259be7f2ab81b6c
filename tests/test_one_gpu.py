"""``runs/one_gpu.py`` and what it stands on: packs, crops on a device, a run that ends by the clock, its files."""

import json
import math
import shutil
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY
from PIL import Image

from flowmo import FlowMo, load, preset, save
from flowmo.distributed import World
from flowmo.images import to_tensor
from flowmo.losses.perceptual import BACKBONES, HEADS, LPIPS

sys.path.insert(0, str(ROOT / "runs"))
import gpu_images
import gpu_parts
import gpu_table
import nano_pictures
import one_gpu
import pack_images
import pack_weights
from gpu_parts import Job


def smooth(seed, width, height):
    """An image that compresses as a photograph does."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(40):
        smooth(i, 90 + i, 60).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def serial(monkeypatch):
    """Pools of processes as plain loops."""

    class Serial:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, function, items, _=1):
            return [function(item) for item in items]

        def imap(self, function, items, _=1):
            return map(function, items)

    monkeypatch.setattr(nano_pictures, "Pool", Serial)
    monkeypatch.setattr(pack_images, "Pool", Serial)


# Packs


@pytest.mark.usefixtures("serial")
def test_packs_hold_every_photograph_once_and_keep_to_their_size(photographs, tmp_path):
    most = 20_000
    written = pack_images.pack(tmp_path / "packs", [photographs], [], 48, most)
    assert len(written) > 2
    names, sizes = [], []
    for path, count in written:
        assert path.stat().st_size <= most
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert len(archive.namelist()) == count
            for name in archive.namelist():
                with Image.open(archive.open(name)) as image:
                    assert min(image.size) == 48
                    sizes.append(image.size)
                names.append(name)
    assert len(set(names)) == len(names) == 40
    wanted = sorted((48 * (90 + i) / 60, 48) for i in range(40))
    assert all(abs(w - v) <= 0.5 and h == 48 for (w, h), (v, _) in zip(sorted(sizes), wanted, strict=True))
    for path, _ in written[:-1]:
        assert path.stat().st_size > 0.8 * most, "as many as fit"
    assert list((tmp_path / "packs").glob("*.partial")) == []


@pytest.mark.usefixtures("serial")
def test_packs_leave_out_what_looks_like_a_held_out_image(photographs, tmp_path, capsys):
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    with Image.open(photographs / "07.png") as image:
        image.resize((64, 40)).save(held_out / "other_name.jpg", quality=80)
    (photographs / "broken.jpg").write_bytes(b"no image")
    written = pack_images.pack(tmp_path / "packs", [photographs], [held_out], 48, 1 << 20)
    assert [count for _, count in written] == [39]
    told = capsys.readouterr().out
    assert "07.png looks like" in told
    assert "unreadable" in told


def test_an_image_that_is_small_already_is_copied_byte_for_byte(tmp_path):
    path = tmp_path / "small.jpg"
    smooth(1, 60, 48).save(path, quality=60)
    assert pack_images.encode(path, 48) == path.read_bytes()
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(1, 60, 48).save(turned, quality=60, exif=exif)
    content = pack_images.encode(turned, 48)
    assert content != turned.read_bytes(), "a turned image is stored upright"
    (tmp_path / "upright.jpg").write_bytes(content)
    with Image.open(tmp_path / "upright.jpg") as image:
        assert image.size == (48, 60)


def test_packed_weights_change_lpips_by_less_than_a_thousandth(trained_weights, tmp_path, picture_files):
    written = pack_weights.pack_weights(tmp_path, ["alex"], trained_weights)
    assert sum(path.stat().st_size for path in written) < 5.5 * 2**20
    x = to_tensor(Image.open(picture_files[0]).convert("RGB").resize((96, 96)))[None]
    y = (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    expected, found = (LPIPS("alex", folder, download=False)(x, y) for folder in (trained_weights, tmp_path))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


# Crops


def arrays(count=5):
    return [np.random.default_rng(i).integers(0, 256, (20 + i, 33 - 2 * i, 3), np.uint8) for i in range(count)]


def find(crop, image):
    """Where a crop lies in an image: (top, left), by trying every place."""
    side = crop.shape[0]
    for top in range(image.shape[0] - side + 1):
        for left in range(image.shape[1] - side + 1):
            if np.array_equal(image[top : top + side, left : left + side], crop):
                return top, left
    return None


def test_crops_are_parts_of_the_images_and_every_place_comes():
    images, side = arrays(), 16
    crops = gpu_images.DeviceCrops(images, side, 3, True, torch.device("cpu"))
    seen, places, mirrored = [], set(), 0
    for position in range(0, 300, 3):
        batch = crops.batch(position, 3)
        assert batch.shape == (3, 3, side, side)
        for i, crop in enumerate(batch):
            pixels = ((crop + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            index = int(crops.chosen(position + i, 1))
            place, flipped = find(pixels, images[index]), find(pixels[:, ::-1], images[index])
            assert (place is None) != (flipped is None)
            mirrored += place is None
            places.add((index, *(place or flipped)))
            seen.append(index)
    for start in range(0, 300, 5):
        assert sorted(seen[start : start + 5]) == [0, 1, 2, 3, 4], "each image once per epoch"
    assert 100 < mirrored < 200
    for i, image in enumerate(images):
        assert {top for index, top, _ in places if index == i} == set(range(image.shape[0] - side + 1))


def test_crops_depend_on_the_position_alone():
    crops = [gpu_images.DeviceCrops(arrays(), 16, 3, True, torch.device("cpu")) for _ in range(2)]
    straight = [crops[0].batch(position, 4) for position in range(0, 40, 4)]
    torch.testing.assert_close(crops[1].batch(36, 4), straight[9], rtol=0, atol=0)
    assert not torch.equal(straight[0], straight[5])
    assert gpu_images.DeviceCrops(arrays(), 16, 3, False, torch.device("cpu")).batch(0, 4).shape == (4, 3, 16, 16)


@pytest.mark.usefixtures("serial")
def test_a_later_pack_changes_no_earlier_split(photographs, tmp_path):
    (first, _), *_ = pack_images.pack(tmp_path / "a", [photographs], [], 48, 1 << 20)
    second = shutil.copy(first, tmp_path / "b.zip")
    train, held_out, counts = gpu_images.load_packs([first], 48)
    more, more_held_out, _ = gpu_images.load_packs([first, Path(second)], 48)
    assert counts == {"images": 39, "held_out": 1, "too_small": 0}
    for few, many in ((train, more), (held_out, more_held_out)):
        assert all(np.array_equal(a, b) for a, b in zip(few.images, many.images, strict=False))
    assert len(gpu_images.load_packs([first], 48, only_held_out=True)[1]) == 1
    with pytest.raises(gpu_images.DataError, match=r"40 are smaller.*--side 64"):
        gpu_images.load_packs([first], 64)
    (tmp_path / "broken.zip").write_bytes(b"PK")
    with pytest.raises(gpu_images.DataError, match="is no pack of images"):
        gpu_images.load_packs([tmp_path / "broken.zip"], 48)


# The clock


@pytest.fixture
def recipe(tmp_path):
    """A recipe of a tiny model, as a file."""
    settings = {
        **TINY,
        "data": {**TINY["data"], "global_batch_size": 4},
        "opt": {"lpips_weight": 0, "mup_base_width": 0, "lr": 1e-3, "cooldown": 0.5},
        "trainer": {"enable_bfloat16": False},
        "eval": {"sampling": {"sample_steps": 1}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def job(recipe, tmp_path):
    return Job("train", tmp_path / "out", tmp_path / "state", 0.0, config=recipe, dry_run=True)


class Clock:
    """Time that passes by a second for every question."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        self.now += 1.0
        return self.now

    perf_counter = monotonic = time


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(gpu_parts, "time", clock)
    return clock


def timed_run(job, clock, seconds, later=0.0):
    """A run of so many seconds, one a step, and the learning rate of each of its steps."""
    images = gpu_images.MemoryImages([np.full((32, 32, 3), 9 * i, np.uint8) for i in range(8)])
    job = Job(**{**job.__dict__, "until": clock.now + seconds, "later": later})
    run = gpu_parts.TimedTrainer(job, World(), images, images)
    rates = []
    step = gpu_parts.Trainer._step

    def watched(self, *arguments):
        result = step(self, *arguments)
        rates.append(self.optimizers[0].param_groups[0]["lr"])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_parts.Trainer, "_step", watched)
        run.train()
    return run, rates


def test_a_run_ends_by_the_clock_and_its_rate_falls_in_time(job, clock):
    run, rates = timed_run(job, clock, 30)
    assert 24 <= len(rates) <= 30
    assert run.images == 4 * len(rates)
    assert rates[0] == rates[len(rates) // 3] == 1e-3
    assert rates[3 * len(rates) // 4] == pytest.approx(0.5e-3, rel=0.15)
    assert rates[-1] < 0.2e-3
    found = json.loads((job.out / "results.json").read_text())["train"]
    assert found["images"] == run.images
    assert found["weights"]["pieces"] == 1


def test_a_second_call_goes_on_along_the_schedule_that_the_first_was_told(job, clock):
    first, early = timed_run(job, clock, 25, later=25)
    assert min(early) > 0.9e-3, "the rate does not fall while time is to come"
    second, late = timed_run(job, clock, 25)
    assert second.images == first.images + 4 * len(late)
    assert second.task.seconds == pytest.approx(first.task.seconds + len(late), abs=3)
    assert late[-1] < 0.2e-3
    third, again = timed_run(job, clock, 25)
    assert again[0] > 0.5e-3, "a call that was not announced raises the rate again"
    assert third.images > second.images


def test_a_later_call_trains_beyond_the_recipes_length(job, clock):
    job = Job(**{**job.__dict__, "settings": ("trainer.duration=8 images",)})
    first, _ = timed_run(job, clock, 10)
    second, rates = timed_run(job, clock, 10)
    assert first.images > 8
    assert second.images == first.images + 4 * len(rates) > first.images


def test_a_later_call_measures_what_the_first_left_out(job, monkeypatch):
    job = Job(**{**job.__dict__, "part": "measure", "until": time.time() + 60})
    done = []

    def row(name):
        if name == "second" and not done.count("cut"):
            done.append("cut")
            raise KeyboardInterrupt
        done.append(name)
        return [{"images_per_second": len(done)}]

    names = ("first", "second", "third")
    monkeypatch.setattr(gpu_parts, "measurements", lambda *_: [(name, partial(row, name)) for name in names])
    monkeypatch.setattr(gpu_parts, "matrix_rate", lambda *_: 1e12)
    with pytest.raises(KeyboardInterrupt):
        gpu_parts.measure_part(job)
    assert gpu_parts.read_results(job)["measure"]["left_out"] == ["second", "third"]
    gpu_parts.measure_part(job)
    assert done == ["first", "cut", "second", "third"]
    found = gpu_parts.read_results(job)["measure"]
    assert [row["name"] for row in found["rows"]] == list(names)
    assert not found["left_out"]
    monkeypatch.setattr(gpu_parts, "describe_sources", lambda *folders: "other code")
    gpu_parts.measure_part(job)
    assert done[4:] == list(names), "rows of other code do not count"


def test_a_run_starts_from_weights(job, clock, tmp_path):
    torch.manual_seed(5)
    tokenizer = FlowMo(job.recipe())
    save(tokenizer, tmp_path / "start.safetensors")
    job = Job(**{**job.__dict__, "start": tmp_path / "start.safetensors", "settings": ("opt.lr=1e-30",)})
    run, _ = timed_run(job, clock, 5)
    for name, value in tokenizer.state_dict().items():
        torch.testing.assert_close(run.ema.state[name], value, msg=name)


def test_each_part_gets_its_share_and_training_the_rest():
    parts = list(gpu_parts.PARTS)
    ends = {}
    now, deadline = 0.0, 27 * 60.0
    for part in parts:
        ends[part] = now = one_gpu.end_of(part, parts, 27, now, deadline)
    assert ends == {"check": 120, "measure": 360, "train": 27 * 60 - 180, "finish": 27 * 60}
    assert one_gpu.end_of("train", ["train"], 9, 0, 540) == 540
    assert one_gpu.end_of("measure", parts, 3, 0.0, 170) == 45
    assert one_gpu.end_of("measure", ["check", "measure"], 8, 120, 470) == 470, "no time is left over"
    assert one_gpu.end_of("check", ["check", "measure"], 8, 0.0, 470) == pytest.approx(480 * 0.3 / 0.55)


# Files


def test_weights_come_back_in_pieces(job, monkeypatch, capsys):
    monkeypatch.setattr(gpu_parts, "PIECE", 20_000)
    torch.manual_seed(0)
    tokenizer = FlowMo(job.recipe()).eval()
    monkeypatch.setattr(gpu_parts, "MOST_PIECES", 99)
    (job.out).mkdir()
    (job.out / "weights.9").write_bytes(b"of another run")
    told = gpu_parts.write_weights(tokenizer, job)
    job.record(weights=told)
    assert told["pieces"] == math.ceil(told["bytes"] / 20_000) > 2
    monkeypatch.setattr(sys, "argv", ["one_gpu.py", "--join", str(job.out), str(job.out / "whole.safetensors")])
    assert one_gpu.main() == 0
    joined = load(job.out / "whole.safetensors")
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(joined.state_dict()[name], value.half().float()), name
    Job(**{**job.__dict__, "part": "finish"}).record(weights={**told, "sha256": "of an earlier call"})
    assert one_gpu.main() == 0
    (job.out / "weights.1").write_bytes(b"damaged")
    assert one_gpu.main() == 1
    (job.out / "weights.1").unlink()
    assert one_gpu.main() == 1
    printed = capsys.readouterr().err
    assert "are not those that results.json describes" in printed
    assert "lacks weights.1" in printed
    monkeypatch.setattr(gpu_parts, "MOST_PIECES", 2)
    monkeypatch.setattr(gpu_parts, "PIECE", size := told["bytes"] // 2 + 2**20)
    gpu_parts.check_pieces(job.recipe())
    monkeypatch.setattr(gpu_parts, "PIECE", size - 2**20)
    with pytest.raises(gpu_parts.FlowMoError, match="more than 2 pieces"):
        gpu_parts.check_pieces(job.recipe())


def test_results_survive_an_empty_out_folder(job):
    """A later call may start with another folder for what is brought back."""
    job.record(images=3)
    shutil.rmtree(job.out)
    Job(**{**job.__dict__, "part": "finish"}).record(rows=[])
    assert json.loads((job.out / "results.json").read_text()) == {"train": {"images": 3}, "finish": {"rows": []}}


def test_what_is_missing_is_told_before_any_time_is_spent(job, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    words = ["one_gpu.py", "--out", str(job.out), "--config", str(recipe)]
    for more, told in (
        ([], "There are no images to train on"),
        (["--pictures", str(tmp_path / "none.zip")], "none.zip is not there"),
        (["--pictures", str(recipe), "--settings", "opt.lpips_weight=0.1"], "pack_weights.py"),
    ):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        assert one_gpu.main() == 1
        assert told in capsys.readouterr().err
    assert not job.out.exists()


def test_a_table_is_filled_from_results(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu_table.BEGIN}\nold\n{gpu_table.END}\nafter\n")
    row = {"name": "lo, stage 1A", "microbatch": 4, "images_per_second": 12.34, "matrix_share": 0.41}
    memory = {"memory_gib": 46.2, "predicted_gib": 45.0, "first_step_seconds": 1.5}
    results = {
        "run": {"commit": "abc", "sources": "def"},
        "measure": {
            "device": "NVIDIA H100",
            "torch": "2.11",
            "matrix_rates": {"bfloat16_tflops": 790.0, "tf32_tflops": 400.0, "float32_tflops": 50.0},
            "rows": [{**row, **memory}, {"name": "hi", "traceback": "…"}],
            "left_out": ["lo, compiled"],
        },
        "finish": {
            "rows": [
                {
                    "steps": 1,
                    "images": 9,
                    "bits_per_pixel": 0.07,
                    "psnr": 21.5,
                    "ssim": 0.6,
                    "lpips_alex": None,
                    "lpips_vgg": 0.3,
                }
            ]
        },
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    gpu_table.fill_table(tmp_path / "results.json", page)
    text = page.read_text()
    assert text.startswith(f"before\n{gpu_table.BEGIN}\n")
    assert text.endswith(f"{gpu_table.END}\nafter\n")
    assert "old" not in text
    assert "| lo, stage 1A | 4 | 12.3 | 41% | 46.2 | 45 | 1.5 |" in text
    assert "| 1 | 9 | 0.0700 | 21.50 | 0.600 | – | 0.300 |" in text
    assert "Not measured: hi; lo, compiled." in text
    assert "NVIDIA H100, torch 2.11, abc. Matrix rate: 790 TFLOP/s in bfloat16" in text
    gpu_table.fill_table(tmp_path / "results.json", page)
    assert page.read_text() == text
    (tmp_path / "bare.md").write_text("nothing")
    with pytest.raises(gpu_table.FlowMoError, match="has no lines"):
        gpu_table.fill_table(tmp_path / "results.json", tmp_path / "bare.md")


def test_the_mean_of_two_networks_needs_the_weights_of_both(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "cache"))
    config = preset("native").override("opt.lpips_mode=vgg+alex")
    for names, _ in (files[net] for net in ("vgg", "alex") for files in (BACKBONES, HEADS)):
        assert names[0] in gpu_parts.missing_weights(config)
        (tmp_path / names[0]).touch()
    assert gpu_parts.missing_weights(config) is None
