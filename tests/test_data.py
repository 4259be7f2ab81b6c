"""Image sources: folders, tars and tars of tars, and which inputs are refused."""

import io
import json
import os
import pickle
import shutil
import tarfile

import pytest
import torch
from PIL import Image

from flowmo.cli import main
from flowmo.data import (
    DataError,
    ImageDataset,
    TarSource,
    batches,
    build_index,
    default_index,
    epoch_order,
    open_source,
)
from flowmo.data.sources.tar_index import MAX_UNINDEXED_BYTES
from flowmo.evaluate.metrics.pairs import psnr
from flowmo.images import ImageError, read_image


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def nested(tmp_path, picture_files):
    """Like ImageNet: one tar per class inside a tar, and a file that is no image."""
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w") as outer:
        add(outer, "readme.txt", b"hello")
        for number, group in enumerate((picture_files[:3], picture_files[3:5])):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for file in group:
                    add(tar, file.name, file.read_bytes())
            add(outer, f"n{number}.tar", inner.getvalue())
    return path


def test_random_crops_reach_every_position_as_often(tmp_path):
    """Of 7 × 4 pixels there are 4 crops; rounding would give the outer two half of their share."""
    image = Image.new("RGB", (7, 4))
    for column in range(7):
        image.paste((30 * column,) * 3, (column, 0, column + 1, 4))
    image.save(tmp_path / "a.png")
    views = ImageDataset(open_source(tmp_path), 4, random_crop=True)
    first = torch.stack([views[0, seed][0, 0, 0] for seed in range(2000)])
    shares = (((first + 1) * 127.5).round() / 30).long().bincount(minlength=4) / 2000
    assert len(shares) == 4
    assert (shares - 0.25).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_a_tar_of_tars_is_read_in_place(nested, picture_files):
    assert main(["data", "index", str(nested)]) == 0
    source = open_source(nested)
    assert len(source) == 5
    for i, file in enumerate(picture_files[:5]):
        assert source.read(i).tobytes() == read_image(file).tobytes()
        assert source.name(i).endswith(f"n{i // 3}/{file.name}")


def test_the_same_batches_as_from_a_folder(nested, tmp_path, picture_files):
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in picture_files[:5]:
        shutil.copy(file, folder)
    default_index(nested).write_text(json.dumps(build_index(nested)[0]))
    streams = [batches(ImageDataset(open_source(path), 32, True, True), 4, 3, 0, 2) for path in (nested, folder)]
    for _ in range(4):
        assert torch.equal(*(next(stream) for stream in streams))


def test_a_source_travels_to_another_process(nested):
    default_index(nested).write_text(json.dumps(build_index(nested)[0]))
    source = TarSource([nested])
    first = source.read(0).tobytes()
    assert pickle.loads(pickle.dumps(source)).read(0).tobytes() == first


def test_index_of_the_authors_format_under_another_name(nested, tmp_path):
    index = tmp_path / "imagenet_train_index_overall.json"
    index.write_text(json.dumps(list(reversed(build_index(nested)[0]))))
    assert len(open_source(nested, index)) == 5


def test_a_damaged_image_is_named(nested):
    entries = build_index(nested)[0]
    with open(nested, "r+b") as file:
        file.seek(entries[0]["offset"])
        file.write(bytes(16))
    source = open_source(nested)
    position = next(i for i in range(5) if entries[0]["name"] in source.name(i))
    with pytest.raises(ImageError, match=entries[0]["name"]):
        source.read(position)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("[]", "no images"),
        ("{", "not an index"),
        ('[{"name": "a.jpg"}]', "not an index"),
        ('[{"name": "a.jpg", "offset": 0, "size": 100000000}]', "lies outside"),
        ('[{"name": "a.jpg", "offset": -1, "size": 1}]', "lies outside"),
    ],
)
def test_bad_indices(nested, index, sentence):
    default_index(nested).write_text(index)
    with pytest.raises(DataError, match=sentence):
        open_source(nested)


def test_a_tar_without_an_index_is_looked_through(nested, picture_files):
    source = open_source(nested)
    assert [source.read(i).tobytes() for i in range(5)] == [read_image(file).tobytes() for file in picture_files[:5]]


def test_a_very_large_tar_without_an_index_says_how_to_make_it(nested):
    os.truncate(nested, MAX_UNINDEXED_BYTES + 1)  # a hole, which takes no room on the disk
    with pytest.raises(DataError, match="flowmo data index"):
        open_source(nested)


def test_tars_that_cannot_be_indexed(tmp_path, capsys):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    (tmp_path / "text.tar").write_text("this is no tar" * 100)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        add(tar, "a.jpg", b"x" * 1000)
    for name in ("empty.tar", "text.tar", "packed.tar", "none.tar"):
        assert main(["data", "index", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err
        assert not default_index(tmp_path / name).exists()


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_source(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no images"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"neither a folder .* nor a \.tar"):
        open_source(tmp_path / "notes.txt")


# Classes, WebDataset shards, Hugging Face datasets


def test_folders_are_classes(tmp_path, picture_files):
    for i, file in enumerate(picture_files[:3]):
        (tmp_path / f"class{i % 2}" / "deeper").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / f"class{i % 2}" / "deeper")
    source = open_source(tmp_path)
    assert source.classes == ("class0", "class1")
    assert sorted(source.label(i) for i in range(3)) == [0, 0, 1]
    shutil.copy(picture_files[3], tmp_path)
    source = open_source(tmp_path)
    assert source.classes == ("class0", "class1")
    assert [source.label(i) for i in range(4) if source.files[i].parent == tmp_path] == [None]


def test_inner_tars_are_classes(nested):
    assert main(["data", "index", str(nested)]) == 0
    source = open_source(nested)
    assert source.classes == ("n0", "n1")
    assert [source.label(i) for i in range(5)] == [0, 0, 0, 1, 1]


def test_imagenet_names_are_classes(tmp_path, picture_files):
    """The authors' index names files without their folder."""
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w") as tar:
        for wordnet in ("n02102040", "n01440764"):
            add(tar, f"{wordnet}_10.JPEG", picture_files[0].read_bytes())
    assert main(["data", "index", str(path)]) == 0
    source = open_source(path)
    assert source.classes == ("n01440764", "n02102040")
    assert [source.label(i) for i in range(2)] == [0, 1]


@pytest.fixture
def shards(tmp_path, picture_files):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for i, file in enumerate(picture_files[2 * shard : 2 * shard + 2]):
                key = f"{shard}{i}.variant"
                add(tar, f"{shard}{i}.cls", str(shard + 4).encode())
                add(tar, f"{key}.jpg", file.read_bytes())
                add(tar, f"{shard}{i}.json", b"{}")
    return folder


@pytest.mark.parametrize("spec", ["", "train-{000..002}.tar", "train-*.tar"])
@pytest.mark.parametrize("indexed", [False, True])
def test_shards_are_one_source(shards, picture_files, spec, indexed):
    if indexed:
        assert main(["data", "index", *map(str, sorted(shards.glob("*.tar")))]) == 0
    source = open_source(shards / spec if spec else shards)
    assert len(source) == 6
    assert [source.label(i) for i in range(6)] == [4, 4, 5, 5, 6, 6]
    assert len(source.classes) == 7
    for i, file in enumerate(picture_files[:6]):
        assert source.read(i).tobytes() == read_image(file).tobytes()
    batch = next(batches(ImageDataset(pickle.loads(pickle.dumps(source)), 32), 6, 0, 0, workers=2))
    assert len({image.numpy().tobytes() for image in batch}) == 6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("train-{000..003}.tar", r"train-003.tar: no such file"),
        ("train-{5..2}.tar", "is not a valid range"),
        ("other-*.tar", "no file matches this pattern"),
        ("train-{0..99999999999}.tar", "is not a valid range"),
    ],
)
def test_shards_that_are_not_there(shards, spec, message):
    with pytest.raises(DataError, match=message):
        open_source(shards / spec)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its files open
def test_webdataset_reads_the_same_samples(shards):
    """Beside the reference implementation of the format."""
    webdataset = pytest.importorskip("webdataset")
    source = open_source(shards)
    theirs = webdataset.WebDataset(str(shards / "train-{000..002}.tar"), shardshuffle=False)
    labels = {sample["__key__"].rpartition("/")[2]: int(sample["cls"]) for sample in theirs}
    for i in range(len(source)):
        key = source.entries[i].name.partition(".")[0]
        assert labels[key] == source.label(i)


@pytest.fixture
def saved(tmp_path, picture_files):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"name": ["a", "b", "c"], "image": [str(file) for file in picture_files[:3]], "label": [1, 0, 1]},
        features=datasets.Features(
            name=datasets.Value("string"), image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"])
        ),
    )
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_hugging_face_dataset(saved, picture_files):
    source = open_source(f"hf:{saved}:train")
    assert (len(source), source.classes) == (3, ("cat", "dog"))
    assert [source.label(i) for i in range(3)] == [1, 0, 1]
    for i, file in enumerate(picture_files[:3]):
        assert source.read(i).tobytes() == read_image(file).tobytes()
    batch = next(batches(ImageDataset(source, 32), 3, 0, 0, workers=1))
    assert torch.equal(batch, torch.stack([ImageDataset(source, 32)[i, 0] for i in epoch_order(3, 0, 0)]))


def test_hugging_face_datasets_that_do_not_work(saved, tmp_path):
    with pytest.raises(DataError, match=r"no split 'test'\. It has train"):
        open_source(f"hf:{saved}:test")
    with pytest.raises(DataError, match="cannot be loaded"):
        open_source(f"hf:{tmp_path}")


# Decoding large JPEGs at a reduced size


def test_a_draft_looks_like_the_full_image(tmp_path, picture_files):
    """Twice the needed side or more is decoded; after resampling the difference is that of a good JPEG."""
    image = read_image(picture_files[0]).resize((1024, 768), Image.Resampling.LANCZOS)
    image.save(tmp_path / "large.jpg", quality=95)
    assert read_image(tmp_path / "large.jpg", side=96).size == (256, 192)
    assert read_image(tmp_path / "large.jpg", side=97).size == (512, 384)
    assert read_image(tmp_path / "large.jpg").size == (1024, 768)
    whole, draft = (ImageDataset(open_source(tmp_path), 96, draft=draft)[0, 0] for draft in (False, True))
    assert psnr(whole[None], draft[None]) > 35


def test_draft_leaves_other_formats_alone(tmp_path, picture_files):
    read_image(picture_files[0]).resize((800, 800)).save(tmp_path / "large.png")
    assert read_image(tmp_path / "large.png", side=16).size == (800, 800)


def test_training_reads_what_people_have(tmp_path, picture_files):
    """Odd images become what a viewer shows, through the training path: no crash, no black square."""
    base = read_image(picture_files[0]).resize((80, 60))
    base.convert("CMYK").save(tmp_path / "cmyk.jpg")
    base.convert("L").point(lambda v: v * 257, "I").convert("I;16").save(tmp_path / "sixteen.png")
    base.convert("P").save(tmp_path / "palette.png", transparency=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(tmp_path / "rotated.jpg", exif=exif)
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    base.save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("RGB", base.size)])
    source = open_source(tmp_path)
    views = ImageDataset(source, 16, draft=True)
    for i in range(len(source)):
        image, bad = views.load(i, 0)
        assert not bad, bad
        assert image.shape == (3, 16, 16)
        assert image.mean() > -0.95
    assert source.read([p.name for p in source.files].index("rotated.jpg")).size == (60, 80)
