"""Sources of pictures: folders, tars and tars of tars, and what is refused."""

import io
import json
import pickle
import shutil
import tarfile

import pytest
import torch

from flowmo.cli import main
from flowmo.data import DataError, TarSource, Views, batches, build_index, default_index, open_source
from flowmo.pictures import PictureError, read_picture


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def nested(tmp_path, picture_files):
    """As ImageNet's: one tar a class inside a tar, and a file that is no picture."""
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


def test_a_tar_of_tars_is_read_in_place(nested, picture_files):
    assert main(["index", str(nested)]) == 0
    source = open_source(nested)
    assert len(source) == 5
    for i, file in enumerate(picture_files[:5]):
        assert source.read(i).tobytes() == read_picture(file).tobytes()
        assert source.name(i).endswith(f"n{i // 3}/{file.name}")


def test_the_same_batches_as_from_a_folder(nested, tmp_path, picture_files):
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in picture_files[:5]:
        shutil.copy(file, folder)
    default_index(nested).write_text(json.dumps(build_index(nested)))
    streams = [batches(Views(open_source(path), 32, True, True), 4, 3, 0, 2) for path in (nested, folder)]
    for _ in range(4):
        assert torch.equal(*(next(stream) for stream in streams))


def test_a_source_travels_to_another_process(nested):
    default_index(nested).write_text(json.dumps(build_index(nested)))
    source = TarSource(nested)
    first = source.read(0).tobytes()
    assert pickle.loads(pickle.dumps(source)).read(0).tobytes() == first


def test_index_of_the_authors_format_under_another_name(nested, tmp_path):
    index = tmp_path / "imagenet_train_index_overall.json"
    index.write_text(json.dumps(list(reversed(build_index(nested)))))
    assert len(open_source(nested, index)) == 5


def test_a_damaged_picture_is_named(nested):
    entries = build_index(nested)
    entries[0]["size"] //= 2
    default_index(nested).write_text(json.dumps(entries))
    source = open_source(nested)
    position = next(i for i in range(5) if entries[0]["name"] in source.name(i))
    with pytest.raises(PictureError, match=entries[0]["name"]):
        source.read(position)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("[]", "no pictures"),
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


def test_a_tar_without_an_index_says_how_to_make_it(nested):
    with pytest.raises(DataError, match="flowmo index"):
        open_source(nested)


def test_tars_that_cannot_be_indexed(tmp_path, capsys):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    (tmp_path / "text.tar").write_text("this is no tar" * 100)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        add(tar, "a.jpg", b"x" * 1000)
    for name in ("empty.tar", "text.tar", "packed.tar", "none.tar"):
        assert main(["index", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err
        assert not default_index(tmp_path / name).exists()


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_source(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no pictures"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"neither a folder .* nor a \.tar"):
        open_source(tmp_path / "notes.txt")
