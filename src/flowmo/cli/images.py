"""Commands on pictures and their files."""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flowmo.checkpoint import files as checkpoint
from flowmo.cli.shared import (
    UsageError,
    command,
    load,
    message_of,
    progress_bar,
    refuse_clash,
    sampling,
    with_fit,
    with_json,
    with_model,
    with_sampling,
)
from flowmo.codec.context import BitModel
from flowmo.codec.file import MAX_BYTES, Codec, CodecError, MissingPlanes, find_context, read_context
from flowmo.codec.planes import PlaneModel
from flowmo.errors import FlowMoError
from flowmo.evaluate.metrics.pairs import grid, psnr
from flowmo.images import read_image, resize_and_crop, to_pil, to_rgb, to_tensor
from flowmo.tokenizer import FlowMo

SUFFIX = ".flowmo"
PIPE = Path("-")
"""Standard input or output in place of a file."""
DRAWN: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".jpeg": {"format": "JPEG", "quality": 95},
    ".webp": {"format": "WEBP", "lossless": True},
    ".ppm": {"format": "PPM"},
}
"""How a picture is written, by the end of its file's name; to standard output as the first."""


def reconstruct(arguments: argparse.Namespace) -> None:
    """Encode and decode pictures; write each beside its original and print what it cost.

    With --grid and --fit crop all of them are written as one picture too, originals above.
    """
    if arguments.grid and arguments.fit != "crop":
        raise UsageError("--grid puts squares beside each other; add --fit crop")
    if arguments.grid and arguments.grid.suffix.lower() not in DRAWN:
        raise UsageError(f"{arguments.grid}: name a picture that ends in {', '.join(DRAWN)}")
    tokenizer = load(arguments)
    outputs = [arguments.out / f"{path.stem}.png" for path in arguments.pictures]
    refuse_clash([*outputs, *([arguments.grid] if arguments.grid else [])])
    pairs: list[torch.Tensor] = []
    if not arguments.json:
        print(f"{'picture':28} {'size':>11} {'bytes':>7} {'bits/pixel':>10} {'PSNR dB':>8}")

    def work(path: Path, output: Path) -> tuple[dict, str]:
        original = read_image(path)
        codes = tokenizer.encode_image(original, arguments.fit, arguments.bpp)
        if arguments.fit == "crop":
            original = resize_and_crop(to_rgb(original), tokenizer.config.data.image_size)
        decoded = tokenizer.decode_image(codes, **sampling(arguments), progress=progress_bar(path.name))
        pair = torch.stack((to_tensor(original), to_tensor(decoded)))
        checkpoint.write_whole(output, lambda name: to_pil(grid([pair])).save(name, "PNG"))
        if arguments.grid:
            pairs.append(pair)
        quality = float(psnr(pair[:1], pair[1:]))
        size = f"{original.width}×{original.height}"
        facts = {
            "height": original.height,
            "width": original.width,
            "bytes_of_ids": codes.nbytes,
            "bits_per_pixel": round(codes.bits_per_pixel, 5),
            "psnr": round(quality, 4),
        }
        return facts, f"{path.name[:28]:28} {size:>11} {codes.nbytes:>7} {codes.bits_per_pixel:>10.4f} {quality:>8.2f}"

    each(list(zip(arguments.pictures, outputs, strict=True)), work, arguments.json)
    if pairs:
        rows = list(torch.stack(pairs, dim=1))
        form = DRAWN[arguments.grid.suffix.lower()]
        checkpoint.write_whole(arguments.grid, lambda name: to_pil(grid(rows)).save(name, **form))
    if not arguments.json:
        print(f"original | reconstruction in {arguments.out}/")
        if pairs:
            print(f"originals above reconstructions in {arguments.grid}")


def encode(arguments: argparse.Namespace) -> None:
    """Write the ids of pictures to .flowmo files, entropy-coded where a context model lies beside the tokenizer.

    The file to write can follow a single picture, encode photo.jpg photo.flowmo. A picture named - comes from standard
    input, and a file named - goes to standard output.
    """
    jobs = outputs_of(arguments, arguments.pictures, (SUFFIX,), SUFFIX)
    tokenizer = load(arguments)
    codec = Codec(tokenizer, None if arguments.packed else context_of(arguments, tokenizer))

    def work(path: Path, output: Path) -> tuple[dict, str]:
        original = read_image(io.BytesIO(sys.stdin.buffer.read()), "standard input") if path == PIPE else None
        codes = tokenizer.encode_image(original or read_image(path), arguments.fit, arguments.bpp)
        content = codec.pack(codes)
        write(output, content)
        height, width = codes.output_size
        pixels = height * width
        facts = {
            "height": height,
            "width": width,
            "bytes": len(content),
            "bytes_of_ids": codes.nbytes,
            "bits_per_pixel": round(8 * len(content) / pixels, 5),
        }
        rate = f"{8 * len(content) / pixels:.4f} bits per pixel"
        return facts, f"{output}: {len(content)} bytes, {rate}, for {codes.nbytes} of ids"

    done = each(jobs, work, arguments.json)
    if len(done) > 1 and not arguments.json:
        size, pixels = sum(row["bytes"] for row in done), sum(row["height"] * row["width"] for row in done)
        seconds = sum(row["seconds"] for row in done) / len(done)
        print(f"{len(done)} pictures: {size} bytes, {8 * size / pixels:.4f} bits per pixel, {seconds:.2f} s a picture")


def decode(arguments: argparse.Namespace) -> None:
    """Draw the pictures of .flowmo files.

    The picture to write can follow a single file, decode photo.flowmo photo.png. A file named - comes from standard
    input, and a picture named - goes to standard output, as PNG.
    """
    if arguments.ids and (arguments.output or arguments.out_dir):
        raise UsageError("--ids prints the ids and writes no file; leave --output and --out-dir out")
    jobs = outputs_of(arguments, arguments.files, tuple(DRAWN), f"{SUFFIX}.png")  # a plain .png could be the original
    unknown = next((o for _, o in jobs if o != PIPE and o.suffix.lower() not in DRAWN), None)
    if unknown:
        raise UsageError(f"{unknown}: name a picture that ends in {', '.join(DRAWN)}, or - for standard output")
    tokenizer = load(arguments)
    codec = Codec(tokenizer, context_of(arguments, tokenizer))

    def work(path: Path, output: Path) -> tuple[dict, str]:
        missing: list[MissingPlanes] = []
        try:
            codes = codec.unpack(read_bytes(path), on_missing=missing.append)
        except CodecError as error:
            raise CodecError(f"{path}: {error}") from None
        for warning in missing:
            print(f"flowmo: {path}: {warning}", file=sys.stderr)
        if arguments.ids:
            assert codes.ids is not None  # only continuous tokenizers' codes have none, and those have no files
            ids = codes.ids.tolist()
            return {"output": None, "bytes_of_ids": codes.nbytes, "ids": ids}, json.dumps(ids)
        picture = tokenizer.decode_image(codes, **sampling(arguments), progress=progress_bar(path.name))
        content = io.BytesIO()
        picture.save(content, **DRAWN[".png" if output == PIPE else output.suffix.lower()])
        write(output, content.getvalue())
        facts = {"height": picture.height, "width": picture.width, "bytes_of_ids": codes.nbytes}
        if tokenizer.native_size:
            facts["planes_missing"] = sum(warning.total - warning.planes for warning in missing)
        return facts, f"{output}: {picture.width}×{picture.height} from {codes.nbytes} bytes of ids"

    if arguments.ids:
        jobs = [(path, Path()) for path, _ in jobs]  # nothing is written, and nothing but the ids is printed
    done = each(jobs, work, arguments.json)
    if len(done) > 1 and not arguments.json and not arguments.ids:
        print(f"{len(done)} pictures, {sum(row['seconds'] for row in done) / len(done):.2f} s a picture")


# Shared by them

Work = Callable[[Path, Path], tuple[dict, str]]
"""From an input and where its output belongs to facts for JSON and a line for people."""


def each(jobs: Sequence[tuple[Path, Path]], work: Work, as_json: bool = False) -> list[dict]:
    """Do many jobs; where one fails, the others still are done.

    Raises:
        FlowMoError: one or more failed.
    """
    done: list[dict] = []
    failed: list[str] = []
    show = progress_bar("files") if as_json and len(jobs) > 1 else None
    for i, (source, output) in enumerate(jobs):
        start = time.perf_counter()
        try:
            facts, line = work(source, output)
        except (FlowMoError, OSError) as error:
            if len(jobs) == 1 or isinstance(error, BrokenPipeError):
                raise
            failed.append(str(source))
            print(f"flowmo: {message_of(error)}", file=sys.stderr)
            continue
        seconds = round(time.perf_counter() - start, 4)
        done.append({"input": str(source), "output": str(output), **facts, "seconds": seconds})
        if show:
            show(i + 1, len(jobs))
        if not as_json:
            print(line, file=sys.stderr if output == PIPE else sys.stdout, flush=True)
    if as_json:
        print(json.dumps(done, indent=1), file=sys.stderr if any(o == PIPE for _, o in jobs) else sys.stdout)
    if failed:
        raise FlowMoError(f"{len(failed)} of {len(jobs)} failed: {', '.join(failed[:5])}{' …' * (len(failed) > 5)}")
    return done


def outputs_of(
    arguments: argparse.Namespace, named: Sequence[Path], kinds: Sequence[str], suffix: str
) -> list[tuple[Path, Path]]:
    """Every input with the file to write.

    Args:
        named: the inputs; the last of two is the output where it looks like one.
        kinds: what names of outputs end in, and those of inputs never do.
        suffix: ends the names of outputs that are not named.

    Raises:
        UsageError: what is named makes no sense together.
    """
    inputs, output = list(named), arguments.output
    if len(inputs) == 2 and not (output or arguments.out_dir):
        last = inputs[-1]
        if last.suffix.lower() in kinds or (last == PIPE != inputs[0]):
            output = inputs.pop()
    if output is not None and len(inputs) > 1:
        raise UsageError("--output names one file, for one input; --out-dir takes many")
    if PIPE in inputs and len(inputs) > 1:
        raise UsageError("- is standard input, and comes alone")
    if output is not None and arguments.out_dir:
        raise UsageError("--output names the file, and --out-dir the folder of many; give one of them")
    if inputs[0] == PIPE:
        if arguments.out_dir:
            raise UsageError("what comes from standard input has no name; name the file with --output")
        return [(PIPE, output or PIPE)]
    outputs = [output or (arguments.out_dir or path.parent) / f"{path.stem}{suffix}" for path in inputs]
    refuse_clash(outputs)
    return list(zip(inputs, outputs, strict=True))


def context_of(arguments: argparse.Namespace, tokenizer: FlowMo) -> BitModel | PlaneModel | None:
    """The generator or the context model that is named, or else the context model beside the tokenizer."""
    if arguments.generator:
        from flowmo.codec.generator import GeneratorModel
        from flowmo.generate.generator import load_generator

        return GeneratorModel(load_generator(arguments.generator))
    if arguments.context:
        return read_context(arguments.context, tokenizer)
    return find_context(arguments.model, tokenizer)


def read_bytes(path: Path) -> bytes:
    """The content of a .flowmo file or of standard input; no more than one can have."""
    with sys.stdin.buffer if path == PIPE else path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise CodecError(f"more than the {MAX_BYTES} bytes that a .flowmo file can have")
    return content


def write(output: Path, content: bytes) -> None:
    """To a file, whole or not at all, or to standard output.

    Raises:
        UsageError: the file cannot be written.
    """
    if output == PIPE:
        if sys.stdout.isatty():
            raise UsageError("standard output is a terminal; name a file with --output, or another program after |")
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    try:
        checkpoint.write_content(output, content)
    except OSError as error:  # which names a temporary file
        raise UsageError(f"{output}: cannot be written ({error.strerror})") from None


def add_to(commands: Any) -> None:
    sub = command(reconstruct, "pictures beside what their bits decode to", commands)
    sub.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    sub.add_argument("--out", type=Path, default=Path("reconstructions"), help="folder to write to (reconstructions)")
    sub.add_argument("--grid", type=Path, metavar="FILE", help="with --fit crop, all in one picture too")
    with_model(sub)
    with_sampling(sub)
    with_fit(sub)
    with_json(sub)

    context = "context model of the ids (the one beside the tokenizer)"
    generator = "a generator of the ids in the place of a context model; slower"
    sub = command(encode, "pictures to .flowmo files", commands)
    sub.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    sub.add_argument("--output", "-o", type=Path, help="file to write; - is standard output (PICTURE with .flowmo)")
    sub.add_argument("--out-dir", type=Path, help="folder to write many to (beside each picture)")
    sub.add_argument("--context", type=Path, metavar="FILE", help=context)
    sub.add_argument("--generator", type=Path, metavar="FILE", help=generator)
    sub.add_argument("--packed", action="store_true", help="pack the ids rather than code them by what is likely")
    with_model(sub)
    with_fit(sub)
    with_json(sub)

    sub = command(decode, ".flowmo files to pictures", commands)
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE")
    sub.add_argument("--output", "-o", type=Path, help="picture to write: .png .jpg .webp .ppm, or - (FILE.flowmo.png)")
    sub.add_argument("--out-dir", type=Path, help="folder to write many to (beside each file)")
    sub.add_argument("--context", type=Path, metavar="FILE", help=context)
    sub.add_argument("--generator", type=Path, metavar="FILE", help=generator)
    sub.add_argument("--ids", action="store_true", help="print the ids as JSON instead of drawing the picture")
    with_model(sub)
    with_sampling(sub)
    with_json(sub)
