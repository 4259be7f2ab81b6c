"""Fuzzing of everything that reads a file: each of ``TARGETS`` is a parser, fed with bytes, that may end in one way
only, with the project's own one-line error or with a sound result.

``test_fuzz.py`` beside it runs every target over ``corpus`` (what once broke something) and over changed seeds.
Longer, and guided by coverage through atheris (``pip install atheris``)::

    python tests/stress/fuzz.py codec --seconds 600 --found found

``--found`` keeps one input for each kind of failure: an exception that is not the project's own, a message of several
lines, or more than ``MOST_SECONDS``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import random
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

watching: contextlib.AbstractContextManager = contextlib.nullcontext()
if __name__ == "__main__":  # coverage is of what is imported below
    import atheris

    watching = atheris.instrument_imports(include=["flowmo", "PIL", "yaml", "json", "tarfile", "zipfile", "pickle"])

with watching:
    import json
    import tarfile
    import zipfile
    from binascii import crc_hqx

    import numpy as np
    import torch
    from PIL import Image

    from flowmo import Config, FlowMo, load, save
    from flowmo.checkpoint import distributed as sharded
    from flowmo.codec import range_coder
    from flowmo.codec.context import ContextModel
    from flowmo.codec.file import CONTEXT_BYTES, CRC, PLANE_CRC, Codec, CodecError, Reader
    from flowmo.codec.planes import PlaneModel, weight_shapes
    from flowmo.data import DataError, TarSource, build_index, default_index
    from flowmo.data.npz import NpzFile
    from flowmo.data.token_files import TokenMetadata, manifest, pack_shard, read_token_metadata
    from flowmo.data.tokens import TokenDataset
    from flowmo.errors import FlowMoError
    from flowmo.generate.generator import load_generator
    from flowmo.images import ImageError, read_image

MOST_SECONDS = 5.0
SMALL = {
    "data": {"image_size": 16},
    "model": {
        "patch_size": 8,
        "hidden_size": 32,
        "num_heads": 1,
        "dec_depth": 1,
        "enc_hidden_size": 32,
        "enc_num_heads": 1,
        "enc_depth": 1,
        "code_length": 4,
        "context_dim": 4,
        "codebook_size_for_entropy": 4,
    },
}
NATIVE = {
    "data": {"image_size": 32},
    "model": {
        "network": "windowed",
        "patch_size": 16,
        "hidden_size": 16,
        "num_heads": 1,
        "dec_depth": 1,
        "enc_hidden_size": 16,
        "enc_num_heads": 1,
        "enc_depth": 1,
        "conv_depth": 1,
        "window": 2,
        "code_length": 4,
        "context_dim": 12,
        "quantization_type": "fsq",
        "nested_dropout": 1.0,
        "enable_cfg": False,
    },
}


class Target:
    """A parser: ``seeds()`` are good inputs, and calling it with some bytes parses them.

    Args:
        folder: scratch.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def seeds(self) -> Iterator[bytes]:
        raise NotImplementedError

    def __call__(self, data: bytes) -> None:
        raise NotImplementedError

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path


def small_tokenizer(tree: dict = SMALL) -> FlowMo:
    torch.manual_seed(0)
    return FlowMo(Config.from_dict(tree)).eval().requires_grad_(False)


class CodecTarget(Target):
    """A byte that says with or without a context model and whether the checksum is put right, then a file."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        tokenizer = small_tokenizer()
        self.codecs = [Codec(tokenizer)]
        if range_coder.available():
            self.codecs.append(Codec(tokenizer, frequencies(tokenizer)))
        self.codes = [tokenizer.encode_image(Image.new("RGB", size)) for size in ((16, 16), (40, 20))]

    def seeds(self) -> Iterator[bytes]:
        for i, codec in enumerate(self.codecs):
            for codes in self.codes:
                yield bytes([i]) + codec.pack(codes)
                codes.ids.fill_(15)  # what the context model below takes for likely
                yield bytes([i]) + codec.pack(codes)

    def __call__(self, data: bytes) -> None:
        choice, content = data[0] if data else 0, data[1:]
        if choice & 128 and len(content) > CRC.size:
            content = content[: -CRC.size] + CRC.pack(zlib.crc32(content[: -CRC.size]))
        codec = self.codecs[choice % len(self.codecs)]
        codes = codec.unpack(content)
        assert torch.equal(codec.unpack(codec.pack(codes)).ids, codes.ids)


class PlanesTarget(Target):
    """A byte that says with or without a context model, then a file in planes; the header's checksum is put right."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        tokenizer = small_tokenizer(NATIVE)
        self.codecs = [Codec(tokenizer)]
        if range_coder.available():
            sizes = weight_shapes(4, 3, 3, 9, 0)
            arrays = {name: np.full(size, -900 * (name == "bias")) for name, size in sizes.items()}
            neighbours = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1))
            order = np.add.outer(2 * np.arange(4), np.arange(4))
            self.codecs.append(Codec(tokenizer, PlaneModel(tokenizer.identity(), neighbours, order, **arrays)))
        self.codes = [tokenizer.encode_image(Image.new("RGB", size)) for size in ((16, 16), (70, 40))]

    def seeds(self) -> Iterator[bytes]:
        for i, codec in enumerate(self.codecs):
            for codes in self.codes:
                yield bytes([i]) + codec.pack(codes.coarser(3))
                codes.ids.fill_(0)  # what the context model above takes for likely
                yield bytes([i]) + codec.pack(codes)

    def __call__(self, data: bytes) -> None:
        choice, content = data[0] if data else 0, data[1:]
        if choice & 128:
            with contextlib.suppress(CodecError):
                reader = Reader(content, 8)
                for _ in ("height", "width"):
                    reader.varint()
                place = reader.position + 1 + CONTEXT_BYTES * (content[3] >> 4 == 1)
                head = content[:place]
                content = head + PLANE_CRC.pack(crc_hqx(head, 0)) + content[place + PLANE_CRC.size :]
        codec = self.codecs[choice % len(self.codecs)]
        codes = codec.unpack(content, on_missing=lambda missing: None)
        assert torch.equal(codec.unpack(codec.pack(codes)).ids, codes.ids)


def frequencies(tokenizer: FlowMo) -> ContextModel:
    bits = np.full((4, 4), 2000)
    nothing = [np.zeros(shape, np.int64) for shape in ((4, 0), (0, 0), (4, 0), (4, 0), (0, 4), (4, 4))]
    return ContextModel(tokenizer.identity(), (), bits, *nothing)


class TokensTarget(Target):
    """The length of a manifest, the manifest, and its only shard, whose header and checksum are put right."""

    def seeds(self) -> Iterator[bytes]:
        for classes in ((), ("cat", "dog")):
            facts = TokenMetadata(
                tokenizer="00" * 8, model="m", image_size=16, tokens=4, sub_tokens=1, id_bits=4, source="s",
                count=3, shard_size=8, classes=classes,
            )  # fmt: skip
            content = manifest(facts, complete=True).encode()
            body = pack_shard(facts, 0, np.ones((3, 4, 1), np.int64), [-1, -2, -1] if not classes else [0, 1, -2])
            yield struct.pack("<H", len(content)) + content + body

    def __call__(self, data: bytes) -> None:
        length = struct.unpack("<H", data[:2].ljust(2, b"\0"))[0]
        content, body = data[2 : 2 + length], data[2 + length :]
        self.file("tokens.json", content)
        with contextlib.suppress(FlowMoError):
            facts = read_token_metadata(self.folder)
            size = facts.shard_bytes(0)
            if size < 1 << 16:
                head = facts.header(0)
                body = (head + body[len(head) :]).ljust(size, b"\0")[: size - CRC.size]
                body += CRC.pack(zlib.crc32(body))
        self.file("tokens-00000.bin", body)
        tokens = TokenDataset(self.folder)
        for i in range(min(len(tokens), 3)):
            ids, label = tokens.ids(i), tokens.labels[i]
            assert ids.min() >= 0
            assert -1 <= label < len(tokens.classes)


class TarTarget(Target):
    """A byte, then a tar to be indexed and read, or an index of a good tar."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.good = self.file("good.tar", tar_of({"a/b.png": picture("PNG"), "c/d.jpg": picture("JPEG")}))

    def seeds(self) -> Iterator[bytes]:
        yield b"\0" + self.good.read_bytes()
        yield b"\0" + tar_of({"x.png": picture("PNG"), "x.cls": b"3"})
        yield b"\0" + tar_of({"in.tar": tar_of({"y.png": picture("PNG")})})
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            yield b"\0" + tar_of({"é" * 120 + ".png": picture("PNG")}, form)
        yield b"\1" + json.dumps(build_index(self.good)[0]).encode()

    def __call__(self, data: bytes) -> None:
        if data[:1] == b"\1":
            tar = self.good
            default_index(tar).write_bytes(data[1:])
            source = TarSource([tar])
        else:
            tar = self.file("bad.tar", data[1:])
            source = TarSource([tar])
        for i in range(min(len(source), 3)):
            source.name(i), source.label(i)
            with contextlib.suppress(ImageError):
                source.read(i)


def tar_of(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def picture(form: str, mode: str = "RGB", **options: object) -> bytes:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(content, form, **options)
    return content.getvalue()


class ConfigTarget(Target):
    """A byte, then a YAML file, JSON, or assignments a line."""

    def seeds(self) -> Iterator[bytes]:
        yield b"\0preset: nano\nmodel:\n  code_length: 32\n  enable_mup: false\nopt: {lr: 1e-4}\n"
        yield b"\0trainer:\n  duration: 5k steps\n  seed: 0x1f\neval: {sampling: {rho: .5}}\n"
        yield b"\0a: &a [1, 2]\nb: [*a, *a]\nmodel: {<<: {hidden_size: 1_000}}\nopt: {lr: !!float '1'}\n"
        yield b"\1" + Config.from_dict(SMALL).to_json().encode()
        yield b"\2opt.lr=1e-3\nmodel.mup_width=4\neval.sampling.cfg_interval=(0.17, 1.02)\ntrainer.max_steps=1e3\n"
        yield b"\2eval.sampling.schedule=pow_0.25\nopt.warmup=10 epochs\ndata.train=x\nglobal_seed=3\n"

    def __call__(self, data: bytes) -> None:
        kind, content = data[0] % 3 if data else 0, data[1:]
        if kind == 0:
            config = Config.from_yaml(self.file("settings.yaml", content))
        elif kind == 1:
            try:
                tree = json.loads(content)
            except (ValueError, RecursionError):
                return
            config = Config.from_dict(tree)
        else:
            config = Config().override(*content.decode("utf-8", "replace").splitlines())
        assert Config.from_dict(json.loads(config.to_json())) == config


class NpzTarget(Target):
    """A byte, then a whole ``.npz``; or members of one, each behind its length, in a good archive."""

    NAMES = ("arr_0", "mu", "sigma", "mu_s", "sigma_s")

    def seeds(self) -> Iterator[bytes]:
        path = self.folder / "seed.npz"
        mean, covariance = np.zeros(3), np.eye(3)
        pictures = np.zeros((2, 4, 5, 3), np.uint8)
        np.savez(path, arr_0=pictures, mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance)
        yield b"\0" + path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            members = [archive.read(f"{name}.npy") for name in self.NAMES]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, member in zip(self.NAMES, members, strict=True):
                archive.writestr(f"{name}.npy", member)
        yield b"\0" + path.read_bytes()
        yield b"\1" + b"".join(struct.pack("<H", len(member)) + member for member in members)

    def __call__(self, data: bytes) -> None:
        content = data[1:]
        if data[:1] == b"\1":
            archive = io.BytesIO()
            with zipfile.ZipFile(archive, "w") as made:
                for name in self.NAMES:
                    length = struct.unpack("<H", content[:2].ljust(2, b"\0"))[0]
                    made.writestr(f"{name}.npy", content[2 : 2 + length])
                    content = content[2 + length :]
            content = archive.getvalue()
        file = NpzFile(self.file("pictures.npz", content))
        for kind in ("pooled", "spatial"):
            with contextlib.suppress(DataError):
                file.statistics(kind)
        for _, batch in file.batches(4):
            assert batch.dtype == torch.uint8


class WeightsTarget(Target):
    """A byte, then a ``.safetensors`` or ``.pth`` file, or the pickle of a ``.pth`` or of a folder of shards."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        (folder / "sharded").mkdir(exist_ok=True)
        save(small_tokenizer(), folder / "seed.safetensors", torch.float16)

    def seeds(self) -> Iterator[bytes]:
        good = (self.folder / "seed.safetensors").read_bytes()
        yield b"\0" + good[: 8 + int.from_bytes(good[:8], "little") + 64]
        yield b"\0" + safetensors_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))
        tensors = {"flowmo": 2, "config": {"model": {}}, "model": {"a": torch.ones(2)}, "ema": {"a": torch.ones(2)}}
        for content in (tensors, {"model_state_dict": {"decoder.double_blocks.0.img_attn.qkv.weight": torch.ones(2)}}):
            torch.save(content, self.folder / "seed.pth")
            yield b"\1" + (self.folder / "seed.pth").read_bytes()
            with zipfile.ZipFile(self.folder / "seed.pth") as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                yield b"\2" + archive.read(name)
        sharded.write(self.folder / "seed", {"model.a": torch.ones(2), "ema.a": torch.ones(2)})
        yield b"\3" + (self.folder / "seed" / sharded.TABLE).read_bytes()

    def __call__(self, data: bytes) -> None:
        kind, content = data[0] % 4 if data else 0, data[1:]
        if kind == 0:
            path = self.file("a.safetensors", content)
        elif kind == 1:
            path = self.file("a.pth", content)
        elif kind == 2:
            path = self.folder / "a.pth"
            with zipfile.ZipFile(path, "w") as archive:
                parts = (("data.pkl", content), (".format_version", b"1"), (".storage_alignment", b"64"))
                more = (("byteorder", b"little"), ("data/0", bytes(8)), ("data/1", bytes(8)), ("version", b"3\n"))
                for name, part in (*parts, *more):
                    archive.writestr(f"a/{name}", part)
        else:
            path = self.folder / "sharded"
            self.file(f"sharded/{sharded.TABLE}", content)
            self.file("sharded/run.json", json.dumps({"flowmo": 2, "config": SMALL}).encode())
        for read in (load, load_generator, ContextModel.read, PlaneModel.read):
            with contextlib.suppress(FlowMoError):
                read(path)


def safetensors_of(header: dict, body: bytes = b"", pad: int = 0) -> bytes:
    text = json.dumps(header).encode() + b" " * pad
    return struct.pack("<Q", len(text)) + text + body


class PictureTarget(Target):
    """A file of a picture."""

    def seeds(self) -> Iterator[bytes]:
        for mode in ("RGB", "L", "P", "RGBA", "1", "I;16"):
            yield picture("PNG", mode)
        exif = Image.Exif()
        exif[0x0112] = 6
        yield picture("JPEG", exif=exif.tobytes())
        yield picture("JPEG", progressive=True)
        yield picture("JPEG", "CMYK")
        for form in ("WEBP", "BMP", "GIF", "PPM", "TIFF"):
            yield picture(form)
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
            yield picture("TIFF", compression=compression)
        yield picture("TIFF", "F")
        frames = [Image.new("P", (5, 4), i) for i in range(3)]
        for form in ("GIF", "WEBP", "PNG"):
            content = io.BytesIO()
            frames[0].save(content, form, save_all=True, append_images=frames[1:])
            yield content.getvalue()

    def __call__(self, data: bytes) -> None:
        whole = read_image(io.BytesIO(data), "picture")
        assert whole.mode == "RGB"
        read_image(io.BytesIO(data), "picture", side=2)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "codec": CodecTarget,
    "planes": PlanesTarget,
    "npz": NpzTarget,
    "config": ConfigTarget,
    "tokens": TokensTarget,
    "tar": TarTarget,
    "weights": WeightsTarget,
    "pictures": PictureTarget,
}


def attempt(target: Target, data: bytes, most_seconds: float = math.inf) -> str | None:
    """What is wrong with how a target ended, if anything; time is that of this process."""
    start = time.process_time()
    try:
        target(data)
    except FlowMoError as error:
        if "\n" in str(error) or len(str(error)) > 2000:
            return f"message of several lines or {len(str(error))} characters by {type(error).__name__}"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if f"{os.sep}flowmo{os.sep}" in frame.filename] or frames
        return f"{type(error).__name__} in {Path(ours[-1].filename).name}:{ours[-1].lineno}: {error}"
    seconds = time.process_time() - start
    return f"took {seconds:.1f} s" if seconds > most_seconds else None


def mutations(seeds: list[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """Changed seeds: bytes set, numbers made extreme, parts cut, doubled and exchanged."""
    rng = random.Random(seed)
    extremes = (b"\0", b"\xff", b"\x7f", b"\x80", b"-1", b"9" * 30, b"\xff" * 4, b"\xff" * 8, b"[" * 2000, b"1e999")
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            place, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64))
            kind = rng.randrange(5)
            if kind == 0:
                data[place : place + 1] = rng.randbytes(1)
            elif kind == 1:
                extreme = rng.choice(extremes)
                data[place : place + len(extreme)] = extreme
            elif kind == 2:
                del data[place : place + length]
            elif kind == 3:
                data[place:place] = data[place : place + length]
            else:
                other = rng.choice(seeds)
                data[place:] = other[rng.randrange(len(other) + 1) :]
        yield bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--found", type=Path, required=True, help="folder for inputs that break something")
    arguments = parser.parse_args()
    arguments.found.mkdir(parents=True, exist_ok=True)
    known: set[str] = set()
    runs = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("work", "seeds"):
            (Path(scratch) / name).mkdir()
        target = TARGETS[arguments.target](Path(scratch) / "work")
        for i, seed in enumerate(target.seeds()):
            wrong = attempt(target, seed)
            assert wrong is None, f"seed {i}: {wrong}"
            (Path(scratch) / "seeds" / str(i)).write_bytes(seed)

        def once(data: bytes) -> None:
            nonlocal runs
            runs += 1
            wrong = attempt(target, data, MOST_SECONDS)
            if wrong is not None and (place := wrong.partition(": ")[0]) not in known:
                known.add(place)
                name = f"{arguments.target}-{len(known)}"
                (arguments.found / name).write_bytes(data)
                print(f"FOUND {name}: {wrong[:300]}", flush=True)

        options = [f"-max_total_time={arguments.seconds}", "-timeout=300", "-rss_limit_mb=6000", "-max_len=20000"]
        options += [f"-artifact_prefix={arguments.found}/", "-print_final_stats=1", str(Path(scratch) / "seeds")]
        atheris.Setup([sys.argv[0], *options], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
