"""Folders of tokens: as a PyTorch dataset, read with NumPy, written in parts by several jobs, exported."""

import gc
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT, run_command
from torch.utils.data import DataLoader, DistributedSampler, Subset

from flowmo.data import DataError, TokenDataset, open_source
from flowmo.data.token_files import Part, TokenMetadata, manifest, pack_shard, read_token_metadata
from flowmo.distributed import World
from flowmo.generate.tokenize import tokenize

sys.path.insert(0, str(ROOT / "examples"))

ABOUT = TokenMetadata(
    tokenizer="ab" * 8, model="tiny", image_size=32, tokens=6, sub_tokens=2, id_bits=9, classes=CLASSES, source="s",
    count=11, shard_size=4,
)  # fmt: skip
UNREADABLE = 5


def write_tokens(folder, about=ABOUT):
    """A folder of random ids, whose sample 5 is unreadable. Returns ids and labels of all samples."""
    generator = np.random.default_rng(0)
    ids = generator.integers(about.vocab_size, size=(about.count, about.tokens, about.sub_tokens))
    labels = np.arange(about.count) % 3 if about.classes else np.full(about.count, -1)
    labels[UNREADABLE] = -2
    folder.mkdir()
    (folder / "tokens.json").write_text(manifest(about, complete=True))
    for number in range(about.shards):
        name, samples = about.shard(number)
        (folder / name).write_bytes(pack_shard(about, number, ids[samples], labels[samples]))
    return ids, labels


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tokens"


@pytest.fixture
def contents(folder):
    return write_tokens(folder)


@pytest.fixture
def source(class_folder):
    return open_source(class_folder)


def readable(contents):
    return [(torch.from_numpy(ids), int(label)) for ids, label in zip(*contents, strict=True) if label != -2]


def assert_same(items, expected):
    assert len(items) == len(expected)
    for (ids, label), (wanted_ids, wanted) in zip(items, expected, strict=True):
        assert ids.dtype == torch.int64
        assert torch.equal(ids, wanted_ids)
        assert label == wanted


def test_the_identity_of_tokens_is_that_of_their_samples():
    elsewhere = replace(ABOUT, precision="float32 (cuda)", source="moved", shard_size=2)
    assert elsewhere.samples_identity() == replace(ABOUT, precision="float32 (cpu)").samples_identity()
    for change in ({"items": "cd" * 8}, {"seed": 1}, {"tokenizer": "cd" * 8}, {"count": 10}):
        assert replace(ABOUT, **change).samples_identity() != ABOUT.samples_identity(), change


# As a PyTorch dataset


def test_items(folder, contents):
    dataset, expected = TokenDataset(folder), readable(contents)
    assert_same(list(dataset), expected)
    assert_same([dataset[index] for index in range(-10, 0)], expected)
    assert_same([dataset[np.int64(3)], dataset[torch.tensor(4)]], expected[3:5])
    assert dataset.labels.tolist() == [label for _, label in expected]
    assert_same(list(Subset(dataset, range(2, 9, 3))), expected[2:9:3])
    for index in (10, -11):
        with pytest.raises(IndexError, match=f"no item {index} of 10"):
            dataset[index]
    for index in (slice(0, 2), [1, 2], 1.0, "1", None):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            dataset[index]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers(folder, contents, context):
    """Batches are stacked ids and labels, also after this process has opened shards of its own."""
    dataset, expected = TokenDataset(folder, verify=False), readable(contents)
    assert_same([dataset[0]], expected[:1])
    batches = list(DataLoader(dataset, 4, num_workers=1, multiprocessing_context=context))
    assert [tuple(ids.shape) for ids, _ in batches] == [(4, 6, 2), (4, 6, 2), (2, 6, 2)]
    rows = [row for ids, labels in batches for row in zip(ids, labels.tolist(), strict=True)]
    assert_same(rows, expected)


def test_ranks_and_pickles(folder, contents):
    dataset, expected = TokenDataset(folder), readable(contents)
    list(dataset)
    content = pickle.dumps(dataset)
    assert len(content) < 4000, "shards are not copied"
    assert_same(list(pickle.loads(content)), expected)
    seen = [index for rank in range(2) for index in DistributedSampler(dataset, 2, rank)]
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize("verify", [True, False])
def test_a_large_folder_fills_neither_memory_nor_the_table_of_files(folder, verify):
    about = replace(ABOUT, tokens=4096, count=60, shard_size=1)
    write_tokens(folder, about)
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.is_dir() else 0
    tracemalloc.start()
    dataset = TokenDataset(folder, verify=verify)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * about.shard_bytes(0), "of 60 shards"
    assert sum(len(ids) for ids, _ in dataset) == 59 * 4096
    assert not before or len(list(descriptors.iterdir())) == before


def test_the_documented_lines_of_numpy_read_a_folder(folder, contents, monkeypatch):
    guide = (ROOT / "docs" / "guides" / "tokens.md").read_text()
    (lines,) = re.findall(r"^```python\n(import json, .*?)```", guide, re.DOTALL | re.MULTILINE)
    assert "flowmo" not in lines
    monkeypatch.chdir(folder.parent)
    found = {}
    exec(lines, found)
    for name, expected in zip(("ids", "labels"), contents, strict=True):
        np.testing.assert_array_equal(found[name], expected)


# In parts


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def test_parts_are_shares():
    for total, count in ((13, 16), (16, 16), (98, 16), (3, 1)):
        covered = [number for part in range(1, count + 1) for number in Part(part, count).shards(total)]
        assert covered == list(range(total))
        assert all(shard in Part(1, count).owner(shard, total).shards(total) for shard in range(total))
    for text, message in (
        ("0/16", "run from 1 to 16"),
        ("17/16", "from 1 to 16"),
        ("3", "is not a part"),
        ("a/b", "is not a part"),
    ):
        with pytest.raises(DataError, match=message):
            Part.parse(text)


def test_ids_do_not_depend_on_how_the_work_is_split(tiny, source, tmp_path):
    tokenize(tiny, source, tmp_path / "whole", flip=True, shard_size=2, batch_size=1)
    whole = shards(tmp_path / "whole")
    assert len(whole) == 6
    for count, batch_size in ((2, 1), (4, 2), (7, 16)):
        out = tmp_path / f"parts of {count}"
        for number in range(count, 0, -1):
            tokenize(tiny, source, out, flip=True, shard_size=2, batch_size=batch_size, part=Part(number, count))
        assert shards(out) == whole
        assert read_token_metadata(out) == read_token_metadata(tmp_path / "whole")
        assert_same(list(TokenDataset(out)), list(TokenDataset(tmp_path / "whole")))
        assert json.loads((out / "tokens.json").read_text())["complete"]


class ThreadWorld(World):
    """Ranks that are threads of this process."""

    meeting, shared = threading.Barrier(2), []

    def barrier(self):
        self.meeting.wait(60)

    def broadcast(self, value):
        if self.main:
            self.shared[:] = [value]
        self.barrier()
        return self.shared[0]


def test_ranks_share_a_part(tiny, source, tmp_path):
    tokenize(tiny, source, tmp_path / "whole", shard_size=1)
    for part in (Part(2, 2), Part(1, 2)):
        with ThreadPoolExecutor(2) as pool:
            ranks = [
                pool.submit(
                    tokenize, tiny, source, tmp_path / "out", shard_size=1, part=part, world=ThreadWorld(rank, 2)
                )
                for rank in range(2)
            ]
        assert all(rank.result() == read_token_metadata(tmp_path / "whole") for rank in ranks)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_a_job_redoes_what_a_kill_left(tiny, source, tmp_path, monkeypatch):
    """Whole shards are kept, a damaged one is written again, and shards of other parts are left alone."""
    tokenize(tiny, source, tmp_path / "whole", shard_size=1)
    out, encode, calls = tmp_path / "out", type(tiny).encode, []

    def counted(self, images):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(type(tiny), "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(tiny, source, out, shard_size=1, part=Part(2, 2))
    (out / ".tokens-00005.bin.half").write_bytes(b"half of a shard")
    assert [*shards(out)] == ["tokens-00003.bin"]
    tokenize(tiny, source, out, shard_size=1, part=Part(2, 2))
    assert len(calls) == 4
    (out / "tokens-00004.bin").write_bytes(shards(out)["tokens-00004.bin"][:-1])
    tokenize(tiny, source, out, shard_size=1, part=Part(2, 2))
    assert len(calls) == 5
    with pytest.raises(DataError, match=r"not finished, 3 of 6 shards are missing: part 1/2\. Run"):
        TokenDataset(out)
    tokenize(tiny, source, out, shard_size=1)
    assert len(calls) == 8, "a whole pass writes what no part has written"
    assert shards(out) == shards(tmp_path / "whole")
    assert_same(list(TokenDataset(out)), list(TokenDataset(tmp_path / "whole")))


def test_folders_of_jobs_become_one(tiny, source, tmp_path):
    """Without a common file system, files of all jobs are copied together. Those of other tokens are named."""
    for number in (1, 2, 3):
        tokenize(tiny, source, tmp_path / str(number), shard_size=1, part=Part(number, 3))
    with pytest.raises(DataError, match=r"missing: part 1/3, part 3/3\."):
        TokenDataset(tmp_path / "2")
    for number in (1, 3):
        shutil.copytree(tmp_path / str(number), tmp_path / "2", dirs_exist_ok=True)
    assert len(TokenDataset(tmp_path / "2")) == 6
    with torch.no_grad():
        next(tiny.parameters()).add_(1)
    tokenize(tiny, source, tmp_path / "other", shard_size=1, part=Part(3, 3))
    with pytest.raises(DataError, match=r"holds other tokens \(tokenizer"):
        tokenize(tiny, source, tmp_path / "2", shard_size=1, part=Part(3, 3))
    shutil.copy(tmp_path / "other" / "tokens-00005.bin", tmp_path / "2")
    with pytest.raises(
        DataError, match=rf"tokens-00005\.bin: belongs to another tokenizer .* \({tiny.identity()}, not"
    ):
        TokenDataset(tmp_path / "2")
    shutil.copy(tmp_path / "other" / "part-00003-of-00003.json", tmp_path / "2")
    with pytest.raises(DataError, match=r"part-00003-of-00003\.json is of other tokens .*\(tokenizer"):
        TokenDataset(tmp_path / "2")


def test_a_missing_shard_is_named(folder, contents):
    (folder / "tokens-00001.bin").unlink()
    with pytest.raises(DataError, match=r"1 of 3 shards are missing: tokens-00001\.bin\. Run"):
        TokenDataset(folder)
    with pytest.raises(DataError, match=r"contains no tokens\.json. Make tokens with `flowmo tokenize"):
        TokenDataset(folder.parent)


def test_sizes_that_could_not_be_read_again_are_refused(tiny, source, tmp_path):
    for crops, shard_size, message in (
        (1 << 20, 1, r"^There are more than 1048576 shards\. Choose a larger --shard-size\.$"),
        (1 << 25, 1 << 28, r"^A shard has more than .* bytes\. Choose a smaller --shard-size\.$"),
        (1, 0, r"^Each of .*, 0 must be a whole number from 1 to 2\^32 − 1\.$"),
    ):
        with pytest.raises(DataError, match=message):
            tokenize(tiny, source, tmp_path / "out", crops=crops, shard_size=shard_size)
    assert not (tmp_path / "out").exists()


def test_ids_of_another_precision_are_refused(tiny, source, tmp_path):
    def write(folder, number, precision):
        tokenize(tiny.set_precision(precision), source, tmp_path / folder, shard_size=1, part=Part(number, 2))

    write("a", 1, "float32")
    assert read_token_metadata(tmp_path / "a").precision == "float32 (cpu)"
    with pytest.raises(
        DataError, match=r"other tokens \(precision 'float32 \(cpu\)', not 'bfloat16 autocast \(cpu\)'\)"
    ):
        write("a", 2, "bfloat16")
    write("b", 2, "bfloat16")
    for file in (tmp_path / "b").glob("*0000[2-5]*"):
        shutil.copy(file, tmp_path / "a")
    with pytest.raises(DataError, match=r"part-00002-of-00002\.json is of other tokens .*precision 'bfloat16"):
        TokenDataset(tmp_path / "a")


@pytest.mark.parametrize("precision", ["float32 (cuda)", "", "bfloat16 autocast (cpu) and float32 (cpu)", None])
def test_folders_of_other_devices_and_older_versions_load_and_resume(tiny, source, tmp_path, precision):
    out = tmp_path / "out"
    tokenize(tiny, source, out, shard_size=2)
    tree = json.loads((out / "tokens.json").read_text())
    assert tree.pop("precision") == "float32 (cpu)"
    (out / "tokens.json").write_text(json.dumps(tree if precision is None else {**tree, "precision": precision}))
    (out / "tokens-00001.bin").unlink()
    tokenize(tiny, source, out, shard_size=2)
    assert len(TokenDataset(out)) == 6
    assert read_token_metadata(out).precision == (precision or "")


# Commands, exports, examples


def test_the_command_writes_a_part(class_folder, tiny_model, tmp_path, capsys):
    (class_folder / CLASSES[0] / "0.jpg").write_bytes(b"no image")
    words = ("tokenize", class_folder, "--out", tmp_path / "out", "--model", tiny_model, "--shard-size", "2")
    status, out, err = run_command(capsys, *words, "--part", "2/2", "--json")
    assert status == 0, err
    about = json.loads(out)
    assert (about["samples"], about["readable"], about["missing_shards"]) == (3, 3, 2)
    assert about["precision"] == "float32 (cpu)"
    status, out, err = run_command(capsys, *words, "--part", "1/2")
    assert "part 1/2, 4 samples, 1 unreadable" in out
    assert "missing" not in out
    assert "0.jpg: not an image" in err
    assert len(TokenDataset(tmp_path / "out")) == 6
    status, _, err = run_command(capsys, *words, "--part", "0/2")
    assert (status, err) == (2, "flowmo: There is no part 0/2. The parts of 2 run from 1 to 2.\n")
    (tmp_path / "out" / "tokens-00003.bin").unlink()
    status, out, err = run_command(capsys, *words, "--precision", "bfloat16")
    assert status == 2
    assert "holds other tokens (precision 'float32 (cpu)', not 'bfloat16 autocast (cpu)')" in err
    assert run_command(capsys, *words)[0] == 0
    for image in class_folder.rglob("*.jpg"):
        image.write_bytes(b"no image")
    status, _, err = run_command(capsys, "tokenize", class_folder, "--out", tmp_path / "none", "--model", tiny_model)
    assert (status, "flowmo: 7 of the 7 images of a shard cannot be read" in err) == (2, True)


@pytest.mark.filterwarnings("ignore:unclosed file .*tar:ResourceWarning")  # by webdataset
@pytest.mark.parametrize("classes", [CLASSES, ()])
def test_export_to_webdataset(folder, tmp_path, capsys, classes):
    webdataset = pytest.importorskip("webdataset")
    expected = readable(write_tokens(folder, replace(ABOUT, classes=classes)))
    words = ("data", "export", folder, tmp_path / "out", "--to", "webdataset")
    assert run_command(capsys, *words)[0] == 0
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    gc.collect()
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(11) if i != UNREADABLE]
    assert samples[0]["npy"].dtype == np.int16
    assert_same([(torch.from_numpy(s["npy"]).long(), s.get("cls", -1)) for s in samples], expected)


@pytest.mark.parametrize("classes", [CLASSES, ()])
def test_export_to_datasets(folder, tmp_path, capsys, classes):
    datasets = pytest.importorskip("datasets")
    expected = readable(write_tokens(folder, replace(ABOUT, classes=classes)))
    assert run_command(capsys, "data", "export", folder, tmp_path / "out", "--to", "datasets")[0] == 0
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    if classes:
        assert tuple(rows.features["label"].names) == CLASSES
    assert_same([(row["ids"], int(row.get("label", -1))) for row in rows.with_format("torch")], expected)


def test_an_id_beyond_the_vocabulary_is_refused(folder):
    write_tokens(folder)
    about = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps({**about, "id_count": 300}))
    dataset = TokenDataset(folder)
    with pytest.raises(DataError, match="beyond 299"):
        [dataset[item] for item in range(len(dataset))]


def test_an_export_overwrites_nothing(folder, contents, tmp_path, capsys):
    words = ("data", "export", folder, tmp_path / "out", "--to", "webdataset", "--json")
    assert len(json.loads(run_command(capsys, *words)[1])["files"]) == 3
    (tmp_path / "file").write_text("mine")
    words = ("data", "export", folder, tmp_path / "file", "--to", "webdataset")
    assert run_command(capsys, *words)[::2] == (2, f"flowmo: {tmp_path}/file is not empty. Name an empty folder.\n")
    for out in (tmp_path / "out", folder):
        before = {path: path.read_bytes() for path in out.iterdir()}
        words = ("data", "export", folder, out, "--to", "webdataset")
        assert run_command(capsys, *words)[::2] == (2, f"flowmo: {out} is not empty. Name an empty folder.\n")
        assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_slurm_array(class_folder, tiny_model, tmp_path, capsys):
    """Programs named srun and flowmo take the place of SLURM's and ours, and write down what they are given."""
    for name, body in (("srun", '"$@"'), ("flowmo", f'printf "%s\\n" "$@" > "{tmp_path}/words"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = ("bash", str(ROOT / "examples" / "slurm_tokenize.sh"), str(class_folder), str(tmp_path / "out"))
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    jobs = [{"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "2"} for number in (1, 2)]
    jobs[1] |= {"SLURM_ARRAY_TASK_COUNT": "1", "PARTS": "2", "SLURM_CPUS_PER_TASK": "0"}  # repeated alone
    jobs[0] |= {"SLURM_CPUS_PER_TASK": "0"}
    for job in jobs:
        subprocess.run([*script, "--model", tiny_model, "--shard-size", "3"], env={"PATH": path, **job}, check=True)
        assert run_command(capsys, *(tmp_path / "words").read_text().splitlines())[0] == 0
    assert len(TokenDataset(tmp_path / "out")) == 6


def test_datasets_map(class_folder, tiny, tiny_model, tmp_path, monkeypatch, capsys):
    """Its ids are those of ``flowmo tokenize``. After a kill, done parts stay and the unfinished one is redone."""
    datasets = pytest.importorskip("datasets")
    datasets_map = pytest.importorskip("datasets_map")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenize(tiny, open_source(class_folder), tmp_path / "tokens")
    encode, calls = type(tiny).encode, []

    def counted(self, images):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(type(tiny), "encode", counted)
    words = [str(class_folder), str(tmp_path / "out"), "--parts", "2", "--model", str(tiny_model), "--device", "cpu"]
    with pytest.raises(KeyboardInterrupt):
        datasets_map.main(words)
    datasets_map.main([*words, "--part", "1"])
    assert "is there already" in capsys.readouterr().out
    datasets_map.main(words)
    assert calls == [3, 3, 3]
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train").with_format("torch")
    assert_same([(row["ids"], int(row["label"])) for row in rows], list(TokenDataset(tmp_path / "tokens")))
    with pytest.raises(SystemExit, match="Name another folder"):
        datasets_map.main([*words, "--parts", "3"])
    with pytest.raises(SystemExit):
        datasets_map.main([*words, "--part", "0"])
    assert "--part is a number from 1 to 2" in capsys.readouterr().err


def test_what_becomes_readable_is_tokenized_by_the_next_call(class_folder, tiny, tmp_path):
    bad = min((class_folder / CLASSES[0]).iterdir())
    content = bad.read_bytes()
    bad.write_bytes(b"no image")
    for _ in range(2):
        tokenize(tiny, open_source(class_folder), tmp_path / "out", shard_size=3)
        assert len(TokenDataset(tmp_path / "out")) == 5
    bad.write_bytes(content)
    tokenize(tiny, open_source(class_folder), tmp_path / "out", shard_size=3)
    assert len(TokenDataset(tmp_path / "out")) == 6


def test_a_source_that_goes_away_is_no_shard(class_folder, tiny, tmp_path):
    for name in CLASSES[1:]:
        for path in (class_folder / name).iterdir():
            path.write_bytes(b"")
    with pytest.raises(DataError, match=r"4 of the 6 images of a shard cannot be read.*One is .*the file is empty"):
        tokenize(tiny, open_source(class_folder), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin"))


def test_a_folder_of_tokens_holds_one_source(class_folder, tiny, tmp_path):
    """Of the same name and size, on any machine: names below the root, and their labels, in order."""
    tokenize(tiny, open_source(class_folder), tmp_path / "out", shard_size=3)
    shutil.copytree(class_folder, tmp_path / "copy")
    tokenize(tiny, open_source(tmp_path / "copy"), tmp_path / "out", shard_size=3)
    first = min((tmp_path / "copy" / CLASSES[0]).iterdir())
    first.rename(first.with_name("z.jpg"))
    with pytest.raises(DataError, match="other images, or in another order"):
        tokenize(tiny, open_source(tmp_path / "copy"), tmp_path / "out", shard_size=3)
    tree = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert len(tree.pop("items")) == 16
    (tmp_path / "out" / "tokens.json").write_text(json.dumps(tree))  # of an earlier version
    tokenize(tiny, open_source(tmp_path / "copy"), tmp_path / "out", shard_size=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_are_one_line(workers, tiny_model, tmp_path, capsys):
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "0.npy", np.zeros((40, 40, 1), np.uint8))
    words = ["tokenize", tmp_path / "arrays", "--output", tmp_path / "out", "--model", tiny_model]
    status, _, error = run_command(capsys, *words, "--workers", workers)
    assert (status, error) == (2, f"flowmo: {tmp_path}/arrays/0.npy: has 1 channel, but the model takes 3.\n")
