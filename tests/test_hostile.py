"""Files made to do harm: they run nothing, write nothing, and cost little; what comes out is one line."""

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib

import fuzz
import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoint import Trap

import flowmo
from flowmo import Config, ConfigError
from flowmo.checkpoint import CheckpointError
from flowmo.checkpoint import distributed as sharded
from flowmo.checkpoint import files as checkpoint
from flowmo.codec.context import ContextModel
from flowmo.codec.planes import PlaneModel
from flowmo.data import DataError, TarSource, build_index, default_index
from flowmo.data.npz import NpzFile
from flowmo.data.sources.webdataset import expand
from flowmo.data.tokens import TokenDataset
from flowmo.errors import FlowMoError
from flowmo.evaluate.measurement import read_parts
from flowmo.generate.generator import load_generator
from flowmo.images import ImageError, read_image
from flowmo.losses.perceptual import BACKBONES, HEADS, LPIPS, RESNET, ResNetLogits
from flowmo.model.torchvision_import import before_importing
from flowmo.train import state
from reproduce.peers.base import read_weights


def one_line(error):
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1500


def inception(folder):
    before_importing("torch_fidelity")
    pytest.importorskip("torch_fidelity")
    from flowmo.evaluate.metrics.inception import FIDInception

    FIDInception(folder, download=False)


def sharded_folder(folder, table):
    """A checkpoint folder whose table of contents, or whose only shard, is ``table``."""
    sharded.write(folder / "shards", {"model.a": torch.ones(2), "ema.a": torch.ones(2)})
    (folder / "shards" / "run.json").write_text(json.dumps({"flowmo": 2, "config": fuzz.SMALL}))
    name = table.name if table.suffix == ".distcp" else sharded.TABLE
    (folder / "shards" / name).write_bytes(table.read_bytes())
    return folder / "shards"


PLACES = {
    "tokenizer.pth": lambda file: flowmo.load(file),
    "authors.pth": lambda file: checkpoint.read_config(file),
    "generator.pth": load_generator,
    "resumed.pth": state.read_metadata,
    "context.safetensors": ContextModel.read,
    "planes.safetensors": PlaneModel.read,
    "tokenizer.safetensors": lambda file: flowmo.load(file),
    "peer.pt": read_weights,
    "whole.pt": lambda file: [*read_parts(file.parent, "x")],
    BACKBONES["alex"][0][0]: lambda file: LPIPS("alex", file.parent, download=False),
    HEADS["alex"][0][0]: lambda file: LPIPS("alex", beside_a_backbone(file), download=False),
    RESNET[0][0]: lambda file: ResNetLogits(file.parent, download=False),
    RESNET[0][1]: lambda file: ResNetLogits(file.parent, download=False),
    "inception-2015-12-05.pth": lambda file: inception(file.parent),
    "table": lambda file: flowmo.load(sharded_folder(file.parent, file)),
    "__0_0.distcp": lambda file: flowmo.load(sharded_folder(file.parent, file)),
    "pictures.npz": lambda file: list(NpzFile(file).batches(1)),
}
"""Every kind of file that could hold a pickle, and what reads it."""


def beside_a_backbone(file):
    blank = LPIPS("alex", pretrained=False)
    weights = {f"features.{name}": value for name, value in blank.network.state_dict().items()}
    torch.save(weights, file.parent / BACKBONES["alex"][0][0])
    return file.parent


@pytest.mark.parametrize("form", ["pickle", "torch", "within"])
@pytest.mark.parametrize("name", PLACES)
def test_no_file_runs_code(tmp_path, monkeypatch, name, form):
    monkeypatch.delenv("FLOWMO_WEIGHTS", raising=False)
    loot, file = tmp_path / "loot", tmp_path / name
    if form == "pickle":
        file.write_bytes(pickle.dumps(Trap(loot)))
    elif form == "torch":
        torch.save(Trap(loot), file)
    else:
        torch.save({"state_dict": {"a": torch.ones(1), "b": [Trap(loot)]}, "identity": "x"}, file)
    with pytest.raises(FlowMoError) as error:
        PLACES[name](file)
    one_line(error)
    assert str(tmp_path) in str(error.value)
    assert "no such" not in str(error.value).lower(), "it is refused for its content"
    assert not loot.exists()


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "loot"))).close()
    assert (tmp_path / "loot").exists()


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.array([Trap(tmp_path / "loot")]), sigma=np.eye(1))
    with pytest.raises(DataError, match="not a mean"):
        NpzFile(tmp_path / "a.npz").statistics("pooled")
    assert not (tmp_path / "loot").exists()


# Little files that ask for much


def tuple_bomb():
    """A pickle of a dict whose key is a tuple of 2^60 leaves."""
    doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    return b"\x80\x02}K\x01\x85" + doubled + b"K\x01s."


@pytest.mark.parametrize("kind", [2, 3])
def test_pickles_that_would_be_hashed_for_ever(tmp_path, kind):
    target = fuzz.WeightsTarget(tmp_path)
    target(bytes([kind]) + tuple_bomb())
    path = tmp_path / "a.pth" if kind == 2 else tmp_path / "sharded"
    with pytest.raises(FlowMoError, match=r"refused|unsafe"):
        flowmo.load(path)


def test_a_bomb_under_a_name_in_capitals(tmp_path):
    """PyTorch finds ``DATA.PKL`` where it looks for ``data.pkl``."""
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/DATA.PKL", tuple_bomb())
        archive.writestr("a/version", "3")
    with pytest.raises(CheckpointError, match="refused"):
        flowmo.load(tmp_path / "a.pth")


def test_a_bomb_in_a_shard(tmp_path):
    """The slice of the shard that holds one tensor, of equal length."""
    folder = tmp_path / "shards"
    sharded.write(folder, {"ema.a": torch.ones(2000)})
    (shard,) = folder.glob("*.distcp")
    (entry,) = sharded._Reader(folder).read_metadata().storage_data.values()
    bomb, padding = io.BytesIO(), 0
    while bomb.tell() != entry.length:
        padding += entry.length - bomb.tell()
        bomb = io.BytesIO()
        with zipfile.ZipFile(bomb, "w") as archive:
            archive.writestr("a/data.pkl", tuple_bomb())
            archive.writestr("a/version", "3")
            archive.writestr("a/padding", bytes(max(padding, 0)))
        bomb.seek(0, io.SEEK_END)
    shard.write_bytes(bomb.getvalue().rjust(entry.offset + entry.length, b"\0"))
    with pytest.raises(CheckpointError, match=r"unsafe \(it holds a tuple of millions"):
        sharded.read(folder, "ema.")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (torch.ones(1).expand(10**6, 10**6), "more than the file has"),
        (torch.eye(3).to_sparse(), "not dense"),
        ([[[[[[[[[[[[[[[[[[torch.ones(1)]]]]]]]]]]]]]]]]]], "nested too deeply"),
    ],
)
def test_tensors_larger_than_their_file(tmp_path, value, sentence):
    torch.save({"model_ema_state_dict": {"decoder.double_blocks.0.img_attn.qkv.weight": value}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=sentence) as error:
        flowmo.load(tmp_path / "a.pth")
    one_line(error)


@pytest.mark.parametrize(
    "change",
    [
        {"dec_depth": 10**9},
        {"enc_depth": 10**9},
        {"hidden_size": 32 * 10**15, "num_heads": 10**15},
        {"mlp_ratio": 1e300},
        {"code_length": 10**18},
    ],
)
def test_settings_larger_than_their_file(tmp_path, change):
    config = Config.from_dict({**fuzz.SMALL, "model": {**fuzz.SMALL["model"], **change}})
    header = {"__metadata__": {"format": checkpoint.FORMAT, "config": json.dumps(config.to_dict())}}
    (tmp_path / "a.safetensors").write_bytes(
        fuzz.safetensors_of({**header, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    )
    with pytest.raises(CheckpointError) as error:
        flowmo.load(tmp_path / "a.safetensors")
    one_line(error)


def test_shards_that_claim_more_than_their_folder_has(tmp_path):
    path = tmp_path / "shards"
    sharded.write(path, {"ema.a": torch.ones(2)})
    table = (path / sharded.TABLE).read_bytes()
    assert b"K\x02\x85" in table, "where the size is"
    (path / sharded.TABLE).write_bytes(table.replace(b"K\x02\x85", b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85"))
    with pytest.raises(CheckpointError, match="more than the folder has"):
        sharded.shapes(path)


def test_shards_that_point_elsewhere(tmp_path):
    path = tmp_path / "shards"
    sharded.write(path, {"ema.a": torch.ones(2)})
    table = (path / sharded.TABLE).read_bytes()
    assert table.count(b"__0_0.distcp") == 1
    (path / sharded.TABLE).write_bytes(table.replace(b"__0_0.distcp", b"../../passwd"))
    with pytest.raises(CheckpointError, match="outside the folder"):
        sharded.shapes(path)


@pytest.mark.parametrize(
    "text",
    [
        "opt: {lr: " + "9" * 400 + "}",
        "trainer: {seed: 0x" + "f" * 9000 + "}",
        "trainer: {seed: " + "1:" * 20000 + "1}",
        "trainer: {seed: 2001-99-99}",
        "preset: [1]",
        "a: !!int ''",
        "a: !!bool x",
        "a: !!python/object/apply:os.mkdir ['loot']",
        "opt: {lr: " + "[" * 5000 + "]" * 5000 + "}",
        "- " * 5000,
        "? " * 5000,
        "{" * (1 << 19),
        "a: &a [x]\nb: [*a, *a]",
        "model: &m {code_length: 4}\neval: {<<: [*m, *m]}",
        "eval: {sampling: {cfg_interval: " + "-" * 5000 + "1}}",
        "eval: {sampling: {sample_steps: 1000000000}}",
        "data: {image_size: 1000000000}",
        "[1, 2]",
    ],
)
def test_settings_made_to_do_harm(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        Config.from_yaml(tmp_path / "a.yaml")
    one_line(error)
    assert not (tmp_path / "loot").exists()


def npz_with(path, **headers):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (shape, size) in headers.items():
            member = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                member, {"descr": "|u1" if name == "arr_0" else "<f8", "fortran_order": False, "shape": shape}
            )
            archive.writestr(f"{name}.npy", member.getvalue() + bytes(size))
    return path


@pytest.mark.parametrize("shape", [(1, 2**31, 2**31, 3), (1, 2**62, 4, 3), (2, 10**5, 10**5, 3)])
def test_pictures_of_terabytes_in_an_npz(tmp_path, shape):
    with pytest.raises(DataError, match="pixels, more than"):
        NpzFile(npz_with(tmp_path / "a.npz", arr_0=(shape, 10**6)))


def test_a_header_of_an_npz_that_may_have_gigabytes(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", np.lib.format.magic(2, 0) + struct.pack("<I", 10**8) + bytes(10**6))
    with pytest.raises(DataError, match="its header is not of version"):
        NpzFile(tmp_path / "a.npz")


@pytest.mark.parametrize("shape", [(-1,), (10**9,), (0,)])
def test_statistics_of_impossible_sizes(tmp_path, shape):
    file = NpzFile(npz_with(tmp_path / "a.npz", mu=(shape, 10**6), sigma=((3, 3), 72)))
    with pytest.raises(DataError, match="not a mean"):
        file.statistics("pooled")


def tokens_of(folder, **changes):
    target = fuzz.TokensTarget(folder)
    (length,) = struct.unpack("<H", (seed := next(target.seeds()))[:2])
    manifest = {**json.loads(seed[2 : 2 + length]), **changes}
    (folder / "tokens.json").write_text(json.dumps(manifest))
    (folder / "tokens-00000.bin").write_bytes(seed[2 + length :])
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 10**18},
        {"count": 1 << 31, "shard_size": 1},
        {"shard_size": 10**18},
        {"tokens": 1 << 31, "count": 1, "shard_size": 1},
        {"id_bits": 64},
        {"id_bits": "4"},
        {"classes": [1]},
        {"classes": "abc"},
        {"tokenizer": "zz"},
        {"flowmo_tokens": None},
    ],
)
def test_manifests_made_to_do_harm(tmp_path, changes):
    with pytest.raises(DataError) as error:
        TokenDataset(tokens_of(tmp_path, **changes))
    one_line(error)


def test_labels_beyond_the_classes(tmp_path):
    content = bytearray((tokens_of(tmp_path) / "tokens-00000.bin").read_bytes())
    content[-8:-4] = struct.pack("<i", 5)
    content[-4:] = struct.pack("<I", zlib.crc32(content[:-4]))
    (tmp_path / "tokens-00000.bin").write_bytes(content)
    with pytest.raises(DataError, match="beyond its classes"):
        TokenDataset(tmp_path)


# Tars


def header(name, size=b"%011o\0" % 0, kind=b"0"):
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)[:512])
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def negative(size):
    return b"\xff" + (size % (1 << 88)).to_bytes(11, "big")


TERABYTE = b"\x80" + (1 << 40).to_bytes(11, "big")
PAX = b"20 size=-1024000000\n".ljust(512, b"\0")


@pytest.mark.parametrize(
    "content",
    [
        header("a.png", negative(-512)),
        header("a.png") + header("b.png", negative(-1024)) * 2,
        header("a.png", b"\x80" + b"\x7f" * 11),
        header("long", TERABYTE, b"L"),
        header("pax", TERABYTE, b"x"),
        header("pax", kind=b"x") * 3000,
        header("pax", b"%011o\0" % 20, b"x") + PAX + header("a.png"),
        header("a.png", b"%011o\0" % (1 << 30)),
    ],
    ids=["circle", "circle of two", "beyond", "long name", "pax", "pax on pax", "pax circle", "past the end"],
)
def test_tars_made_to_do_harm(tmp_path, content):
    tar = tmp_path / "a.tar"
    tar.write_bytes(content + bytes(1024))
    with pytest.raises(DataError) as error:
        TarSource([tar])
    one_line(error)


def test_links_devices_and_sparse_files_are_no_pictures(tmp_path):
    """And names that lead elsewhere are names and nothing more."""
    tar = tmp_path / "in" / "a.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as made:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"bad{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            made.addfile(member)
        sparse = tarfile.TarInfo("sparse.png")
        sparse.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}
        made.addfile(sparse)
        for name in ("../up.png", "/abs.png"):
            member = tarfile.TarInfo(name)
            member.size = len(fuzz.picture("PNG"))
            made.addfile(member, io.BytesIO(fuzz.picture("PNG")))
    entries = build_index(tar)[0]
    assert [entry["name"] for entry in entries] == ["../up.png", "/abs.png"]
    default_index(tar).write_text(json.dumps(entries))
    source = TarSource([tar])
    assert [source.read(i).size for i in range(2)] == [(9, 12), (9, 12)]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.index.json", "a.tar", "in"]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"offset": 0, "size": 1 << 40}, "lies outside"),
        ({"offset": 600, "size": 50}, "overlap"),
        ({"label": 10**19}, "label"),
        ({"label": -1}, "label"),
        ({"offset": float("inf")}, "not an index"),
        ({"size": -1}, "lies outside"),
    ],
)
def test_indices_made_to_do_harm(tmp_path, row, sentence):
    tar = tmp_path / "a.tar"
    tar.write_bytes(fuzz.tar_of({"a.png": fuzz.picture("PNG"), "b.png": fuzz.picture("PNG")}))
    good = build_index(tar)[0]
    default_index(tar).write_text(json.dumps(good * 2))
    assert len(TarSource([tar])) == 4, "pictures may be drawn more often"
    default_index(tar).write_text(json.dumps([good[0], {**good[1], **row}]))
    with pytest.raises(DataError, match=sentence) as error:
        TarSource([tar])
    one_line(error)


def test_ranges_of_a_billion_shards():
    for pattern in ("a-{0..999999}-{0..999999}.tar", "a-{0.." + "9" * 5000 + "}.tar"):
        with pytest.raises(DataError, match=r"shards|is not a valid range"):
            expand(pattern)
    assert len(expand("a-{0..99}-{0..9}.tar")) == 1000


# Pictures


def png_that_claims(width, height):
    data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for chunk in (b"IHDR" + data, b"IDAT" + zlib.compress(bytes(100))):
        chunks += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (png_that_claims(20_000, 20_000), "more than 100,000,000 pixels"),
        (png_that_claims((1 << 31) - 1, (1 << 31) - 1), "more than 100,000,000 pixels"),
        (b"P6 100000 100000 255\n", "more than 100,000,000 pixels"),
        (b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x01\0\0;", "more than 100,000,000 pixels"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(loot) (w) file\nshowpage\n",
            "not an image in a supported format",
        ),
        (b"%PDF-1.4\n", "not an image in a supported format"),
        (b"II*\0\x08\0\0\0\0\0", "a TIFF of a kind that Pillow does not read"),
        (b"\0\0\0\x18ftypavif", "AVIF needs Pillow 11.3"),
        (b"", "the file is empty"),
    ],
    ids=["png", "png of 2^62", "ppm", "gif", "postscript", "pdf", "tiff", "avif", "nothing"],
)
def test_pictures_made_to_do_harm(tmp_path, content, sentence):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match=sentence) as error:
        read_image(tmp_path / "a.png")
    one_line(error)


def test_of_an_animation_the_first_picture_is_read():
    frames = [Image.new("RGB", (5, 4), (i, 0, 0)) for i in range(200)]
    content = io.BytesIO()
    frames[0].save(content, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    content.seek(0)
    assert read_image(content, "a").getpixel((0, 0)) == (0, 0, 0)


def test_a_training_checkpoint_of_odd_facts(tmp_path):
    good = {"flowmo": 2, "config": {}, "stage": "pretrain", "step": 1, "images": 4, "skipped": 0}
    torch.save(good, tmp_path / "good.pth")
    assert state.read_metadata(tmp_path / "good.pth") == good
    for change in ({"step": -1}, {"images": "4"}, {"config": []}, {"stage": None}):
        torch.save({**good, **change}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match="is missing or invalid"):
            state.read_metadata(tmp_path / "a.pth")
