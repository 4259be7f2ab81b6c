"""What training sees of people's folders and tars, beside the libraries that define the formats."""

import io
import json
import os
import random
import shutil
import tarfile
from collections import Counter

import pytest
from conftest import CASES, run_command
from PIL import Image

from flowmo.cli import main
from flowmo.data import DataError, build_index, default_index, open_source
from flowmo.data.sources.base import identity_of
from flowmo.model.torchvision_import import before_importing


def png(shade=0):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, 0, 0)).save(content, "PNG")
    return content.getvalue()


def write_tar(path, members):
    """``members``: name to content; ``None`` is an image of its own shade."""
    with tarfile.open(path, "w") as tar:
        for shade, (name, content) in enumerate(members.items()):
            content = png(shade) if content is None else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_index(tar):
    """An index of all members of ``tar``, as a program without our rules writes it."""
    with tarfile.open(tar) as file:
        rows = [{"name": m.name, "offset": m.offset_data, "size": m.size} for m in file]
    default_index(tar).write_text(json.dumps(rows))
    return tar


def write_folder(root, *names):
    for shade, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(shade))
    return root


def seen(source):
    """Base name and class name of each item."""
    labels = [source.label(i) for i in range(len(source))]
    names = [source.name(i).replace(":", "/").rpartition("/")[2] for i in range(len(source))]
    return [(name, None if label is None else source.classes[label]) for name, label in zip(names, labels, strict=True)]


def show(capsys, source):
    status, out, err = run_command(capsys, "data", "show", source, "--json")
    return json.loads(out) if status == 0 else err


# The small inputs that people's files look like


@pytest.fixture(params=["looked through", "indexed"])
def cases(request, tmp_path, capsys):
    """The cases, as they come and with an index beside each tar."""
    for case in CASES.iterdir():
        (tmp_path / case.name).write_bytes(case.read_bytes())
    if request.param == "indexed":
        main(["data", "index", *[str(tar) for tar in tmp_path.glob("*.tar") if tar.name != "dots.tar"]])
        capsys.readouterr()
    return tmp_path


def test_the_cases_that_are_sources(cases, capsys, tiny_model):
    expected = json.loads((cases / "expected.json").read_text())
    tars = {name for name in expected if name.endswith(".tar")}
    assert tars == {"dots.tar", "appledouble.tar", "masks.tar", "one_label_missing.tar", "hidden.tar"}

    error = show(capsys, cases / "dots.tar")
    assert "a key ends at the base name's first dot" in error
    assert error.count("\n") == 1
    status, _, err = run_command(capsys, "data", "index", cases / "dots.tar")
    assert (status, "first dot" in err) == (2, True)

    found = show(capsys, cases / "appledouble.tar")
    assert (found["count"], [item["label"] for item in found["items"]]) == (2, [0, 1])
    assert len(found["left_out"]) == 4

    found = show(capsys, cases / "masks.tar")
    assert [item["label"] for item in found["items"]] == [0, 1, 2]
    assert [item["name"][-7:] for item in found["items"]] == ["000.jpg", "001.jpg", "002.jpg"]
    assert [row["name"][-11:] for row in found["left_out"]] == ["000.seg.png", "001.seg.png", "002.seg.png"]

    found = show(capsys, cases / "one_label_missing.tar")
    assert [item["label"] for item in found["items"]] == [3, None, 0]
    words = ["tokenize", cases / "one_label_missing.tar", "--out", cases / "tokens", "--model", tiny_model]
    status, _, err = run_command(capsys, *words)
    assert (status, err.count("\n")) == (2, 1)
    assert "001.jpg has no label" in err
    assert run_command(capsys, *words, "--no-labels")[0] == 0

    with tarfile.open(cases / "hidden.tar") as tar:
        tar.extractall(cases / "unpacked", filter="data")
    for source in (cases / "unpacked" / "pictures", cases / "hidden.tar"):
        found = show(capsys, source)
        assert (found["count"], found["classes"]) == (2, ["a", "b"])
        assert [item["label"] for item in found["items"]] == [0, 1]


# Hidden files and folders


HIDDEN = (
    *("._1.png", ".DS_Store.png", "a/._1.png", "a/.thumbnails/1.png", ".ipynb_checkpoints/1-checkpoint.png"),
    *("__MACOSX/a/1.png", "a/__MACOSX/._1.png", "a/@eaDir/1.png/SYNOPHOTO_THUMB_M.png", "$RECYCLE.BIN/1.png"),
    ".Trash-1000/files/1.png",
)
SHOWN = ("a/1.png", "b/1.png", "b/deeper/a..b.png", "b/_2.png", "__background__/1.png")


@pytest.mark.parametrize("form", ["folder", "tar", "tar from .", "index from before"])
def test_hidden_files_and_folders_are_left_out(form, tmp_path):
    names = (*SHOWN, *HIDDEN)
    if form == "folder":
        source = open_source(write_folder(tmp_path / ".cache" / "set", *names))  # the folder itself may be hidden
        for name in HIDDEN:
            path = tmp_path / ".cache" / "set" / name
            assert any(str(above) in source.left_out for above in (path, *path.parents)), name
    else:
        prefix = "./" if form == "tar from ." else ""
        tar = write_tar(tmp_path / "set.tar", {prefix + name: None for name in names})
        if form == "index from before":
            write_index(tar)
        source = open_source(tar)
        assert len(source.left_out) == len(HIDDEN)
    assert source.classes == ("__background__", "a", "b")
    assert len(source) == len(SHOWN)


def test_hidden_files_as_hugging_face_leaves_them_out(tmp_path):
    """Beside datasets' ImageFolder. It leaves out more: every folder that begins with two underscores."""
    datasets = pytest.importorskip("datasets")
    names = [name for name in (*SHOWN, *HIDDEN) if "@eaDir" not in name and "$" not in name and "__back" not in name]
    names.remove("b/deeper/a..b.png")  # two depths: datasets would drop all labels
    write_folder(tmp_path / "set", *names)
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache")
    ).cast_column("image", datasets.Image(decode=False))
    source = open_source(tmp_path / "set")
    ours = {source.name(i): source.classes[source.label(i)] for i in range(len(source))}
    assert ours == {row["image"]["path"]: theirs.features["label"].names[row["label"]] for row in theirs}


# Class folders


def test_links_are_followed_as_torchvision_does(tmp_path):
    before_importing("torchvision")
    folder = pytest.importorskip("torchvision.datasets.folder")
    elsewhere = write_folder(tmp_path / "elsewhere", "1.png", "deeper/2.png")
    root = write_folder(tmp_path / "set", "cat/1.png")
    (root / "dog").symlink_to(elsewhere)
    (root / "cat" / "linked.png").symlink_to(elsewhere / "1.png")
    (root / "cat" / "more").symlink_to(elsewhere / "deeper")
    source = open_source(root)
    classes, numbers = folder.find_classes(str(root))
    theirs = folder.make_dataset(str(root), numbers, folder.IMG_EXTENSIONS)
    assert list(source.classes) == classes == ["cat", "dog"]
    assert sorted((source.name(i), source.label(i)) for i in range(len(source))) == sorted(theirs)
    (root / "dog" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    assert "broken link" in open_source(root).left_out[str(root / "dog" / "broken.png")]


@pytest.mark.parametrize("target", [".", "..", "/", "../b"])
def test_links_that_go_around_in_a_circle(target, tmp_path):
    root = write_folder(tmp_path / "set", "a/1.png", "b/2.png")
    (root / "a" / "link").symlink_to(target)
    (root / "b" / "link").symlink_to("../a")
    source = open_source(root)
    assert {name.rpartition("/")[2] for name in map(source.name, range(len(source)))} == {"1.png", "2.png"}
    assert "a link to a folder around it" in source.left_out.values()


def test_a_relative_root(tmp_path, monkeypatch):
    monkeypatch.chdir(write_folder(tmp_path, "a/1.png", "b/c/2.png"))
    assert seen(open_source(".")) == [("1.png", "a"), ("2.png", "b")]


def test_a_huge_member_of_a_tar_is_left_out(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", {"1.png": None, "2.png": None})
    with tarfile.open(tar, "a") as more:
        huge = tarfile.TarInfo("3.png")
        huge.size = 70_000
        more.addfile(huge, io.BytesIO(bytes(70_000)))
    monkeypatch.setattr("flowmo.data.sources.tar_index.MAX_IMAGE_BYTES", 65_536)
    source = open_source(tar)
    assert len(source) == 2
    assert list(source.left_out.values()) == ["has 70000 bytes, more than 65536"]


def test_names_that_are_too_long(tmp_path):
    root = write_folder(tmp_path / "set", "1.png")
    for name in ("notes.txt", "2.png", "3.npy"):
        (root / name).symlink_to("x" * 300)
    source = open_source(root)
    assert len(source) == 1
    assert {name.rpartition("/")[2] for name in source.left_out} == {"notes.txt", "2.png", "3.npy"}
    for path in ("x" * 300, f"{'x' * 300}.tar", f"{'x' * 300}-{{0..1}}.tar", f"{'x' * 300}-*.tar"):
        with pytest.raises(DataError, match=r"no such|no file matches"):
            open_source(tmp_path / path)
    tar = write_tar(tmp_path / f"{'x' * 250}.tar", {"1.png": None})
    assert len(open_source(tar)) == 1
    with pytest.raises(DataError, match="no such index"):
        open_source(tar, tmp_path / ("x" * 300))


def test_what_is_no_image_is_named(tmp_path):
    root = write_folder(tmp_path / "set", "a/1.png", "b/2.png")
    (root / "a" / "notes.txt").write_text("x")
    (root / "empty").mkdir()
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    left_out = {name.rpartition("/")[2]: reason for name, reason in open_source(root).left_out.items()}
    assert left_out.keys() == {"notes.txt", "empty", "folder.png", "pipe.png"}
    assert "not an image" in left_out["notes.txt"]
    assert "no class" in left_out["empty"]


NUMBERED = [str(n) for n in (0, 1, 2, 3, 9, 10, 11, 20, 99, 100)]


@pytest.mark.parametrize("form", ["folder", "tar", "tar of tars", "index", "words"])
def test_numbers_sort_as_numbers_in_every_source(form, tmp_path):
    names = {name: f"{name}/{i}.png" for i, name in enumerate(sorted(NUMBERED))}
    if form == "folder":
        source = open_source(write_folder(tmp_path / "set", *names.values()))
    elif form in ("tar", "index"):
        tar = write_tar(tmp_path / "set.tar", dict.fromkeys(names.values()))
        if form == "index":
            (tmp_path / "other.json").write_text(json.dumps(build_index(tar)[0]))
        source = open_source(tar, tmp_path / "other.json" if form == "index" else None)
    elif form == "tar of tars":
        inner = {f"{n}.tar": write_tar(tmp_path / "x", {f"{i}.png": None}).read_bytes() for i, n in enumerate(names)}
        source = open_source(write_tar(tmp_path / "set.tar", inner))
    else:
        members = {f"{i}.png": None for i in range(len(names))}
        members |= {f"{i}.cls": name.encode() for i, name in enumerate(names)}
        source = open_source(write_tar(tmp_path / "set.tar", members))
        assert source.classes == tuple(map(str, range(101)))
    if form != "words":
        assert list(source.classes) == NUMBERED
    assert {(name, label) for name, label in seen(source)} == {(f"{i}.png", n) for i, n in enumerate(names)}


def test_numbers_go_before_names(tmp_path):
    source = open_source(write_folder(tmp_path, *(f"{n}/1.png" for n in ("10", "9", "007", "7", "cat", "Cat", "1a"))))
    assert source.classes == ("007", "7", "9", "10", "1a", "Cat", "cat")


def test_hugging_face_labels_keep_the_order_of_the_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    labels = datasets.ClassLabel(names=["2", "10", "1"])
    features = datasets.Features(image=datasets.Image(), label=labels, mask=datasets.Image())
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(4)], "label": [1, -1, None, 2]}
    rows["mask"] = [{"bytes": b"damaged, but not asked for", "path": None}] * 4
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    source = open_source(f"hf:{tmp_path / 'saved'}")
    assert source.classes == ("2", "10", "1")
    assert [source.label(i) for i in range(4)] == [1, None, None, 2]
    assert all(source.file(i).read() == png(i) for i in range(4))
    assert len(open_source(f"hf:{tmp_path / 'saved'}:train")) == 4
    with pytest.raises(DataError, match="one dataset without splits"):
        open_source(f"hf:{tmp_path / 'saved'}:test")


def test_an_index_is_of_one_tar_and_a_name_is_not_empty(tmp_path):
    folder = write_folder(tmp_path, "a/1.png")
    for name in (folder, "hf:someone/something"):
        with pytest.raises(DataError, match=r"index\.json: an index is of a single tar"):
            open_source(name, "index.json")
    with pytest.raises(DataError, match="is empty"):
        open_source("")


# WebDataset


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its files open
def test_samples_and_labels_as_webdataset_groups_them(tmp_path):
    """Random tars beside the library: the same samples have an image KEY.png and the same label, or we refuse."""
    webdataset = pytest.importorskip("webdataset")
    rng, refused, compared = random.Random(0), 0, 0
    for number in range(300):
        members = {}
        for sample in range(rng.randint(1, 4)):
            folder = rng.choice(["", "x/", "./y/", ".hidden/", "__MACOSX/"])
            key = f"{folder}{rng.choice(['s', '._s', 'p.q'])}{sample}"
            if rng.random() < 0.9:
                members[f"{key}.png"] = None
            for suffix in ("seg.png", "b.png", "jpg"):
                if rng.random() < 0.2:
                    members[f"{key}.{suffix}"] = None
            members[f"{key}.{rng.choice(['cls', 'CLS', 'cls', 'json'])}"] = str(rng.randint(0, 9)).encode()
        path = write_tar(tmp_path / f"{number}.tar", members)
        theirs = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
        # The library leaves out hidden files, and keeps hidden folders.
        theirs = [sample for sample in theirs if not sample["__key__"].startswith((".hidden", "__MACOSX"))]
        images = Counter()  # of a key: the library makes two samples of it where another's members lie between
        for sample in theirs:
            images[sample["__key__"]] += sum(suffix.endswith(("png", "jpg")) for suffix in sample)
        try:
            source, message = open_source(path), ""
        except DataError as error:
            message = str(error)
        if message:
            refused += 1
            assert "contains no images" in message or "first dot" in message
            assert "contains no images" in message or max(images.values()) > 1, (members.keys(), message)
            continue
        expected = {}
        for sample in theirs:
            for suffix in {"png", "jpg"} & sample.keys():
                expected[f"{sample['__key__']}.{suffix}"] = int(sample["cls"]) if "cls" in sample else None
        if not expected:
            continue  # dotted images alone
        names = [source.entries[i].name for i in range(len(source))]
        assert set(names) == expected.keys(), members.keys()
        if any(label is not None for label in expected.values()):  # otherwise the folders are the classes
            assert {name: source.label(i) for i, name in enumerate(names)} == expected, members.keys()
        compared += 1
    assert compared > 40
    assert refused > 10


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["0.png", "0.mask.png", "0.cls", "1.png", "1.cls"], [("0.png", "3"), ("1.png", "3")]),
        (["0.png", "0.cls", "1.seg.png", "1.cls"], [("0.png", "3")]),  # a sample that has lost its image
        (["0.view.png", "0.cls", "1.view.png", "1.cls"], [("0.view.png", "3"), ("1.view.png", "3")]),
        (["0.v2.png", "0.v2.cls"], [("0.v2.png", "3")]),
        (["0.png", "0.cls", "0.coarse.cls"], [("0.png", "3")]),
        (["0.png", "0.edited.png"], [("0.png", None)]),
        (["a.1.png", "a.2.png"], [("a.1.png", None), ("a.2.png", None)]),  # no WebDataset
        (["a.png", "a.jpg", "readme.txt"], [("a.jpg", None), ("a.png", None)]),
        (["0.png", "0.jpg", "0.seg.png"], [("0.jpg", None), ("0.png", None), ("0.seg.png", None)]),
        (["0.png", "0.cls", "0.png", "0.cls"], "0.png is there twice"),
        (["0.png", "0.jpg", "0.cls"], "0.png and 0.jpg are of one sample, '0'"),
        (["0.left.png", "0.right.png", "0.json"], "are of one sample, '0': in a WebDataset a key ends at"),
        (["0.png", "0.fine.cls", "0.coarse.cls"], "0.fine.cls and 0.coarse.cls are of one sample"),
    ],
)
def test_images_and_labels_of_a_sample(members, expected, tmp_path):
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for name in members:
            content = b"5" if "coarse" in name else png() if name.endswith(("png", "jpg")) else b"3"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            open_source(path)
        return
    source = open_source(path)
    assert seen(source) == expected
    kept = {name for name, _ in expected}
    images = {name for name in members if name.endswith(("png", "jpg"))}
    assert {name.partition(":")[2] for name in source.left_out} >= images - kept


PLAIN = {"photo.png": None, "photo.jpg": None, "a.v1.png": None, "a.v2.png": None}
SAMPLES = {"0.png": None, "0.seg.png": None, "0.cls": b"3"}


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    ("outer", "inner"),
    [({}, {"c1.tar": PLAIN, "c2.tar": SAMPLES}), (PLAIN, {"in/c.tar": SAMPLES}), (SAMPLES, {"in/c.tar": PLAIN})],
    ids=["beside each other", "in a plain tar", "in a WebDataset"],
)
def test_each_inner_tar_is_a_webdataset_or_not(outer, inner, indexed, tmp_path):
    packed = {name: write_tar(tmp_path / "x", members).read_bytes() for name, members in inner.items()}
    tar = write_tar(tmp_path / "set.tar", outer | packed)
    rows, left_out = build_index(tar)
    assert [name.rpartition("/")[2] for name in left_out] == ["0.seg.png"]
    if indexed:
        default_index(tar).write_text(json.dumps(rows))
    assert dict(seen(open_source(tar))) == {"0.png": "3"} | dict.fromkeys(PLAIN)


def test_arrays_are_left_out_beside_the_images_of_another_inner_tar(tmp_path):
    inner = {f"{n}.tar": write_tar(tmp_path / "x", {n: None}).read_bytes() for n in ("0.npy", "1.png")}
    rows, left_out = build_index(write_tar(tmp_path / "set.tar", inner))
    assert [row["name"] for row in rows] == ["1.png/1.png"]
    assert [*left_out] == ["0.npy/0.npy"]


def test_an_index_from_before_is_read_by_the_same_rules(tmp_path):
    tar = write_tar(tmp_path / "set.tar", {"0.png": None, "0.seg.png": None, "1.png": None, "._1.png": None})
    with tarfile.open(tar) as file:
        rows = [{"name": m.name, "offset": m.offset_data, "size": m.size, "label": 4} for m in file]
    default_index(tar).write_text(json.dumps(rows))
    assert seen(open_source(tar)) == [("0.png", "4"), ("1.png", "4")]


def test_an_index_of_hidden_files_contains_no_images(tmp_path):
    tar = write_index(write_tar(tmp_path / "set.tar", {"._1.png": None, "a/.thumbnails/1.png": None}))
    with pytest.raises(DataError, match=r"set\.index\.json: the index contains no images"):
        open_source(tar)


def test_an_index_of_members_without_an_image_suffix(tmp_path, capsys):
    tar = write_index(write_tar(tmp_path / "set.tar", {"a": None, "b": None}))
    assert [image.size for image in map(open_source(tar).read, range(2))] == [(8, 8)] * 2
    found = show(capsys, tar)
    assert found["count"] == 2
    (row,) = found["left_out"]
    assert row["name"] == str(tar)
    assert "contains no images" in row["reason"]


def test_an_item_without_an_image_suffix_is_not_left_out(tmp_path):
    tar = write_index(write_tar(tmp_path / "set.tar", {"a": None, "b.png": None}))
    source = open_source(tar)
    assert len(source) == 2
    assert not source.left_out


def test_hidden_shards_are_left_out(tmp_path):
    write_tar(tmp_path / "a-0.tar", {"0.png": None, "0.cls": b"1"})
    (tmp_path / "._a-0.tar").write_bytes(b"AppleDouble")
    assert seen(open_source(tmp_path)) == [("0.png", "1")]


def test_one_index_for_several_shards_is_refused(tmp_path):
    for name in ("0", "1"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": None})
    for source in (tmp_path, tmp_path / "*.tar", tmp_path / "{0..1}.tar"):
        with pytest.raises(DataError, match=r"none\.json: .* 2 tars.*flowmo data index"):
            open_source(source, tmp_path / "none.json")
    (tmp_path / "one.json").write_text(json.dumps(build_index(tmp_path / "0.tar")[0]))
    assert seen(open_source(tmp_path / "0*.tar", tmp_path / "one.json")) == [("0.png", None)]


def test_a_folder_of_shards_and_of_class_folders_is_refused(tmp_path):
    write_tar(write_folder(tmp_path, "cat/1.png") / "a.tar", {"0.png": None})
    with pytest.raises(DataError, match="contains shards and folders of images"):
        open_source(tmp_path)


# Labels


@pytest.mark.parametrize("missing", [None, b"", b" \n"], ids=["no file", "empty", "blank"])
@pytest.mark.parametrize("labels", [(b"3", b"0"), (b"cat", b"dog")], ids=["numbers", "words"])
def test_one_missing_label_costs_no_other(labels, missing, tmp_path, tiny, capsys):
    members = {"0.png": None, "0.cls": labels[0], "1.png": None, "2.png": None, "2.cls": labels[1]}
    if missing is not None:
        members["1.cls"] = missing
    source = open_source(write_tar(tmp_path / "set.tar", members))
    words = [label.decode() for label in labels]
    assert seen(source) == [("0.png", words[0]), ("1.png", None), ("2.png", words[1])]
    status, out, _ = run_command(capsys, "data", "show", tmp_path / "set.tar")
    assert status == 0
    assert f"without a label: 1 images, the first {tmp_path / 'set.tar'}:1.png" in out


def test_an_image_outside_the_class_folders_costs_no_label(tmp_path):
    source = open_source(write_folder(tmp_path, "cat/1.png", "dog/2.png", "3.png"))
    assert sorted(seen(source)) == [("1.png", "cat"), ("2.png", "dog"), ("3.png", None)]


def test_a_stray_image_in_a_tars_only_folder_costs_no_label(tmp_path):
    members = dict.fromkeys(("train/cat/1.png", "train/dog/2.png", "train/cover.png"))
    source = open_source(write_tar(tmp_path / "set.tar", members))
    assert sorted(seen(source)) == [("1.png", "cat"), ("2.png", "dog"), ("cover.png", None)]


def test_folders_inside_a_tars_classes_are_no_classes(tmp_path):
    source = open_source(write_tar(tmp_path / "set.tar", dict.fromkeys(("cat/1.png", "cat/2.png", "cat/close/3.png"))))
    assert sorted(seen(source)) == [("1.png", "cat"), ("2.png", "cat"), ("3.png", "cat")]


def test_a_copy_has_the_identity_of_its_original(tmp_path):
    """Training compares it between machines, and at a resume."""
    names = ("shard0/0.png", "shard0/1.png")
    folders = [write_folder(tmp_path / name, *names) for name in "ab"]
    tars = [write_tar(tmp_path / f"{name}.tar", dict.fromkeys(names)) for name in "ab"]
    found = {identity_of(open_source(source), labels=True) for source in (*folders, *tars)}
    assert len(found) == 1
    other = write_folder(tmp_path / "c", "shard1/0.png", "shard1/1.png")
    assert identity_of(open_source(other), labels=False) not in found
    assert identity_of(open_source(other), labels=False) != identity_of(open_source(folders[0]), labels=False)


def test_a_copy_of_a_hugging_face_dataset_has_its_identity(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image())
    for name, shade in (("a", 1), ("b", 2)):
        rows = {"image": [{"bytes": png(shade + i), "path": None} for i in range(2)]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / name)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    first, *same, other = (
        identity_of(open_source(f"hf:{tmp_path / name}"), labels=True) for name in ("a", "copy", "a:train", "b")
    )
    assert same == [first, first]
    assert other != first


def test_a_label_of_minus_one_is_no_class(tmp_path):
    members = {"0.png": None, "0.cls": b"cat", "1.png": None, "1.cls": b"-1"}
    source = open_source(write_tar(tmp_path / "set.tar", members))
    assert [source.label(index) for index in range(2)] == [0, None]


def test_labels_in_words_and_in_numbers_do_not_mix(tmp_path):
    members = {"0.png": None, "0.cls": b"3", "1.png": None, "1.cls": b"cat"}
    with pytest.raises(DataError, match=r"0\.png has the label 3, .*1\.png has 'cat'"):
        open_source(write_tar(tmp_path / "set.tar", members))


# The command


def test_data_show_for_people(tmp_path, capsys):
    root = write_folder(tmp_path / "set", *(f"{n}/{i}.png" for n in (2, 10) for i in range(15)), "2/._1.png")
    status, out, err = run_command(capsys, "data", "show", root)
    assert (status, err) == (0, "")
    assert out.splitlines()[:3] == [f"{root}: 30 images, 2 classes", "class 0, 2: 15 images", "class 1, 10: 15 images"]
    assert "… and 10 more" in out
    assert f"left out: {root / '2' / '._1.png'} (hidden)" in out


def test_data_show_is_what_a_run_trains_on(class_folder, capsys):
    found, source = show(capsys, class_folder), open_source(class_folder)
    assert found["count"] == len(source) == 6
    assert found["classes"] == list(source.classes)
    assert found["items"] == [{"name": source.name(i), "label": source.label(i)} for i in range(6)]
    assert "no such folder" in show(capsys, class_folder / "none")


def test_data_index_names_what_it_leaves_out(tmp_path, capsys):
    tar = write_tar(tmp_path / "set.tar", {"0.png": None, "0.seg.png": None, "0.cls": b"1", "._0.png": None})
    status, out, _ = run_command(capsys, "data", "index", tar)
    assert status == 0
    assert "left out: 0.seg.png (beside 0.png" in out
    assert "left out: ._0.png (hidden)" in out


def packed(path, names, folder=None, links=()):
    """A tar of PNGs, each of its own size."""
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(names):
            stream = io.BytesIO()
            Image.new("RGB", (40 + i, 40)).save(stream, "PNG")
            member = tarfile.TarInfo(name)
            member.size = len(stream.getvalue())
            tar.addfile(member, io.BytesIO(stream.getvalue()))
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE, target
            tar.addfile(member)
    return path


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("damage", ["flipped", "cut", "hole", "concatenated"])
def test_a_tar_that_ends_early_is_refused(damage, nested, tmp_path):
    """tarfile takes any header that it cannot read for the end of the archive."""
    path = packed(tmp_path / "set.tar", [f"{i}.png" for i in range(6)])
    with tarfile.open(path) as tar:
        third = tar.getmembers()[3].offset
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[third + 5] ^= 1
    elif damage == "cut":
        del data[third + 100 :]
    elif damage == "hole":
        data[third : third + 512] = bytes(512)
    else:
        data += bytes(data)
    path.write_bytes(data)
    if nested:
        with tarfile.open(tmp_path / "outer.tar", "w") as tar:
            tar.add(path, "class.tar")
        path = tmp_path / "outer.tar"
    with pytest.raises(DataError, match="damaged header at byte" if damage in ("flipped", "cut") else "behind the end"):
        open_source(path)


def test_a_tar_without_a_mark_of_its_end_is_read(tmp_path):
    path = packed(tmp_path / "set.tar", ["0.png", "1.png"])
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + -(-last.size // 512) * 512])
    assert len(open_source(path)) == 2


def test_the_index_of_another_tar_is_refused(tmp_path):
    names = [f"c{i}/{i}.png" for i in range(8)]
    path = packed(tmp_path / "set.tar", names)
    default_index(path).write_text(json.dumps(build_index(path)[0]))
    assert len(open_source(path)) == 8
    packed(path, names[::-1])
    with pytest.raises(DataError, match="Make it again with: flowmo data index"):
        open_source(path)


def test_hard_links_and_replaced_members(tmp_path):
    """As tar extracts them: a link is a file, and of two members of one name the last counts."""
    path = packed(tmp_path / "set.tar", ["a/1.png", "a/2.png", "a/1.png"], links=[("b/1.png", "a/2.png")])
    source = open_source(path)
    assert source.classes == ("a", "b")
    assert [source.entries[i].name for i in range(3)] == ["a/1.png", "b/1.png", "a/2.png"]
    assert [source.read(i).width for i in range(3)] == [42, 41, 41]
    default_index(path).write_text(json.dumps(build_index(path)[0]))
    assert len(open_source(path)) == 3
    assert open_source(packed(tmp_path / "absolute.tar", ["/1.png", "/2.png"])).classes == ()


def test_a_range_with_wildcards(tmp_path):
    for name in ("s-0-x.tar", "s-1-y.tar", "s-2-z.tar"):
        packed(tmp_path / name, [f"{name}.png"])
    assert len(open_source(tmp_path / "s-{0..1}-*.tar")) == 2
    with pytest.raises(DataError, match=r"s-3-\*\.tar: no file matches"):
        open_source(tmp_path / "s-{2..3}-*.tar")


def test_the_own_index_of_a_tar_of_links_is_read(tmp_path):
    """As a store of files by content packs them: each name is a link to another."""
    links = [(f"train/c{i}/{i}.png", f"blobs/{i % 2}.png") for i in range(6)]
    path = packed(tmp_path / "set.tar", ["blobs/0.png", "blobs/1.png"], links=links)
    default_index(path).write_text(json.dumps(build_index(path)[0]))
    source = open_source(path)
    assert len(source) == 8
    assert {source.read(i).width for i in range(8)} == {40, 41}


def test_a_link_to_what_is_no_file_is_left_out(tmp_path):
    with tarfile.open(packed(tmp_path / "set.tar", ["0.png"]), "a") as tar:
        for name, kind, target in (("l.png", tarfile.SYMTYPE, "0.png"), ("m.png", tarfile.LNKTYPE, "l.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    source = open_source(tmp_path / "set.tar")
    assert len(source) == 1
    assert len(source.left_out) == 2


def test_a_note_that_is_there_twice_is_no_sample(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("README.md", "0.png", "0.cls", "README.md", "1.png", "1.cls"):
            content = png() if name.endswith("png") else b"3"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert len(open_source(tmp_path / "set.tar")) == 2


def test_a_range_in_a_folder_with_brackets(tmp_path):
    (tmp_path / "d[1]").mkdir()
    for i in range(2):
        packed(tmp_path / "d[1]" / f"s-{i}.tar", [f"{i}.png"])
    assert len(open_source(tmp_path / "d[1]" / "s-{0..1}.tar")) == 2
