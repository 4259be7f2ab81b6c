"""What the web page of ``flowmo demo`` does: a picture in, its code, its size and what it decodes to out.

All that a visitor can ask for is bounded: the pixels of an upload, the steps, the samples, the files that are kept.
``web.py`` puts a page around it.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from flowmo.codec.bits import packed_size
from flowmo.codec.file import Codec, CodecError
from flowmo.errors import FlowMoError
from flowmo.evaluate.codecs import FORMATS, CodecMissingError, CodecReconstructor
from flowmo.evaluate.metrics.pairs import heat_map, psnr
from flowmo.generate.generator import Generator
from flowmo.generate.produce import Drawing, check_pair, draw
from flowmo.images import read_image, resize_and_crop, to_pil, to_tensor
from flowmo.streams import Stream, stream
from flowmo.tokenizer import Codes, FlowMo

MOST_PIXELS = 4_000_000
MOST_PIXELS_FOR_CODECS = 600_000
"""Beyond these the search for a codec's quality takes longer than anyone waits."""
MOST_STEPS, MOST_SAMPLES, MOST_DRAWN = 50, 16, 32
MOST_FILES = 256
MOST_IDS_SHOWN = 4096
RANDOM, FLIPPED, TYPED = "drawn at random", "all bits flipped", "the ids below"


class DemoError(FlowMoError):
    """What the page cannot do; the message is shown on it."""


class Result(NamedTuple):
    """A picture that went through the tokenizer: original, where there is one, reconstruction and code, the path of its
    ``.flowmo`` file, and names and values of its figures."""

    original: Image.Image | None
    decoded: Image.Image
    codes: Codes
    file: str
    facts: dict[str, str]


class Peer(NamedTuple):
    """What a codec makes of the picture."""

    name: str
    picture: Image.Image
    size: int
    psnr: float
    fits: bool


class Page:
    """What the page does, without the page.

    Args:
        codec: writes its files; the tokenizer is the one it was made for.
        folder: for the newest of these files.
        name: what the page calls the tokenizer.
    """

    def __init__(
        self,
        tokenizer: FlowMo,
        codec: Codec,
        folder: Path,
        generator: Generator | None = None,
        name: str = "tokenizer",
    ):
        self.tokenizer, self.codec, self.folder, self.generator = tokenizer, codec, folder, generator
        self.name = name
        if generator is not None:
            check_pair(generator, tokenizer)

    def open(self, file: str | None, fit: str) -> tuple[Image.Image | None, Codes]:
        """An upload as a picture and its codes; a ``.flowmo`` file has no picture."""
        path = chosen(file)
        if path.suffix == ".flowmo":
            try:
                return None, self.codec.unpack(path.read_bytes(), MOST_PIXELS)
            except CodecError as error:
                raise DemoError(f"{path.name}: {error}") from None
        picture = read_image(path, path.name, max_pixels=MOST_PIXELS)
        if fit == "crop":
            picture = resize_and_crop(picture, self.tokenizer.config.data.image_size)
        return picture, self.tokenizer.encode_image(picture)

    def decode(self, codes: Codes, steps: int, seed: int, guidance: float) -> Image.Image:
        return self.tokenizer.decode_image(codes, int(steps), int(seed), guidance=float(guidance))

    def about(self) -> str:
        """The tokenizer in a line."""
        side, tokens, ids = self.codec.tile, self.codec.tokens, self.codec.sub_tokens
        size = packed_size(tokens * ids, self.codec.bits)
        return (
            f"{self.name} makes {plural(tokens, 'token')} of {plural(ids, 'id')} below {self.codec.id_count} of each "
            f"{side} × {side} pixels: {plural(size, 'byte')}."
        )

    def reconstruct(self, file: str | None, fit: str, steps: int, seed: int, guidance: float) -> Result:
        """An upload through the tokenizer and back."""
        picture, codes = self.open(file, fit)
        decoded = self.decode(codes, steps, seed, guidance)
        content = self.codec.pack(codes)
        height, width = codes.output_size
        ids = codes.ids
        assert ids is not None  # a codec's tokenizer has them
        facts = {
            "file": f"{len(content):,} bytes",
            "bits per pixel": f"{8 * len(content) / (height * width):.4f}",
            "ids": f"{ids.numel():,} in {codes.nbytes:,} bytes packed",
            "picture": f"{width} × {height} pixels, {plural(len(codes), 'tile')}",
        }
        if ids.shape[2] < self.codec.sub_tokens:
            facts["planes"] = f"{ids.shape[2]} of {self.codec.sub_tokens}: a coarser picture"
        if picture is not None:
            facts["PSNR"] = f"{float(psnr(to_tensor(picture)[None], to_tensor(decoded)[None])):.2f} dB"
        path = self._keep(content, f"{chosen(file).stem[:60]}.flowmo")
        return Result(picture, decoded, codes, str(path), facts)

    def _keep(self, content: bytes, name: str) -> Path:
        """A file to download, in a folder of its own; the oldest of too many go."""
        folder = self.folder / hashlib.blake2b(content, digest_size=8).hexdigest()
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        others = sorted(
            (path for path in self.folder.iterdir() if path != folder), key=lambda path: path.stat().st_mtime
        )
        for old in others[: max(len(others) - MOST_FILES + 1, 0)]:
            shutil.rmtree(old, ignore_errors=True)
        return folder / name

    def at_equal_bytes(self, file: str | None, fit: str, codes: Codes | None) -> list[Peer]:
        """The same picture by the usual codecs in as many bytes as its code takes, or in as few as they can."""
        picture, codes = self.open(file, fit) if codes is None else (self.open(file, fit)[0], codes)
        if picture is None:
            raise DemoError("a .flowmo file has no original to compress")
        if picture.width * picture.height > MOST_PIXELS_FOR_CODECS:
            raise DemoError(f"codecs are compared up to {MOST_PIXELS_FOR_CODECS:,} pixels; choose the central square")
        budget, peers = len(self.codec.pack(codes)), []
        for name in FORMATS:
            try:
                peer = CodecReconstructor(name, budget)
            except CodecMissingError:
                continue
            data = peer.encode(picture)
            decoded = Image.open(io.BytesIO(data)).convert("RGB")
            quality = float(psnr(to_tensor(picture)[None], to_tensor(decoded)[None]))
            peers.append(Peer(peer.name, decoded, len(data), quality, len(data) <= budget))
        return peers

    def samples(
        self, codes: Codes | None, count: int, steps: int, seed: int, guidance: float
    ) -> tuple[list[tuple[Image.Image, str]], Image.Image]:
        """Pictures of one code from several seeds, and where they differ: the deviation of a pixel over them."""
        if codes is None:
            raise DemoError("encode a picture first")
        count = min(int(count), MOST_SAMPLES)
        drawn = [self.decode(codes, steps, int(seed) + i, guidance) for i in range(count)]
        deviation = torch.stack([to_tensor(picture) for picture in drawn]).std(dim=0).mean(dim=0)
        return [(p, f"seed {int(seed) + i}") for i, p in enumerate(drawn)], to_pil(heat_map(deviation))

    def edit(
        self,
        codes: Codes | None,
        first: int,
        last: int,
        how: str,
        typed: str,
        steps: int,
        seed: int,
        guidance: float,
    ) -> tuple[Image.Image, Image.Image]:
        """The picture before and after some tokens of every tile are replaced.

        Args:
            how: ``RANDOM`` by the seed, ``FLIPPED``, or ``TYPED``.
            typed: ids as ``shown_ids`` writes them, for the last of these.
        """
        if codes is None or codes.ids is None:
            raise DemoError("encode a picture first")
        first, last = sorted((int(first), int(last)))
        changed = codes.ids.clone()
        part = changed[:, first : last + 1]
        if how == FLIPPED:
            part.copy_(self.codec.id_count - 1 - part)
        elif how == TYPED:
            part.copy_(self._typed_ids(typed, part.shape[1:]))
        else:
            part.copy_(torch.randint(self.codec.id_count, part.shape, generator=stream(int(seed), Stream.EDIT)))
        edited = Codes(changed, codes.size, codes.id_count, codes.tiling)
        return self.decode(codes, steps, seed, guidance), self.decode(edited, steps, seed, guidance)

    def _typed_ids(self, typed: str, shape: Sequence[int]) -> torch.Tensor:
        """Ids tokens × ids of a token that someone has typed."""
        words, (tokens, ids) = re.split(r"[\s,;:\[\]]+", typed.strip(" \n[],")), shape
        if len(words) != tokens * ids or not all(re.fullmatch(r"[0-9]{1,9}", word) for word in words):
            raise DemoError(f"type {tokens * ids} numbers, {plural(tokens, 'token')} of {plural(ids, 'id')}")
        values = torch.tensor([int(word) for word in words]).reshape(tokens, ids)
        if values.max() >= self.codec.id_count:
            raise DemoError(f"{int(values.max())} is no id; {self.codec.id_count - 1} is the largest")
        return values

    def generate(self, name: str | int | None, count: int, seed: int, guidance: float) -> list[Image.Image]:
        """Pictures of a class, or of none where that is ``None``."""
        if self.generator is None:
            raise DemoError("this page has no generator")
        count = min(int(count), MOST_DRAWN)
        drawing = Drawing(seed=int(seed), guidance=float(guidance))
        labels = [self.generator.label(-1 if name is None else name)] * count
        return [to_pil(x) for x in draw(self.generator, self.tokenizer, labels, range(count), drawing)]


def chosen(file: str | None) -> Path:
    """The upload. Raises ``DemoError`` where there is none."""
    if not file:
        raise DemoError("choose a picture first")
    return Path(file)


def shown_ids(codes: Codes | None, first: int = 0, last: int | None = None) -> str:
    """The ids of some tokens of the first tile, a token a line."""
    if codes is None or codes.ids is None:
        return ""
    first, last = sorted((int(first), len(codes.ids[0]) - 1 if last is None else int(last)))
    rows = codes.ids[0, first : last + 1].tolist()
    shown = rows[: max(MOST_IDS_SHOWN // len(rows[0]), 1)]
    return "\n".join(" ".join(str(i) for i in row) for row in shown) + ("\n…" if len(shown) < len(rows) else "")


def plural(count: int, name: str) -> str:
    return f"{count:,} {name}" + "s" * (count != 1)
