"""Commands on images and their .flowmo files: reconstruct, encode, decode."""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flowmo.cli.options import FIT, JSON, MODEL, SAMPLING, command, load, option, sampling
from flowmo.cli.output import IMAGE_FORMATS, PIPE, UsageError, check_outputs, message_of, progress_bar, write
from flowmo.codec.context import BitModel
from flowmo.codec.file import MAX_BYTES, Codec, CodecError, MissingPlanes, find_context, read_context
from flowmo.codec.planes import PlaneModel
from flowmo.errors import FlowMoError
from flowmo.evaluate.metrics.pairs import grid, psnr
from flowmo.images import read_image, resize_and_crop, to_pil, to_tensor
from flowmo.tokenizer import FlowMo

SUFFIX = ".flowmo"
Job = tuple[Path, Path]
"""An input file and its output file."""
IMAGES = option("images", nargs="+", type=Path, metavar="PICTURE", help="image file")
CONTEXT = (
    option("--context", type=Path, metavar="FILE", help="context model of the ids (default: the tokenizer's)"),
    option("--generator", type=Path, metavar="FILE", help="generator to use as the context model; slower"),
)
OUT_DIR = option("--out-dir", type=Path, help="folder for the results of many files (default: beside each file)")


@command(
    "write images beside their reconstructions",
    IMAGES,
    option("--out", type=Path, default=Path("reconstructions"), help="folder to write to"),
    option("--grid", type=Path, metavar="FILE", help="with --fit crop: also write all of them as one image"),
    *(*MODEL, *SAMPLING, *FIT, JSON),
)
def reconstruct(arguments: argparse.Namespace) -> None:
    """Encode and decode images. Write each original and its reconstruction side by side, and print size and PSNR."""
    grids = [arguments.grid] if arguments.grid else []
    if grids and arguments.fit != "crop":
        raise UsageError("--grid needs images of one size. Add --fit crop.")
    outputs = [arguments.out / f"{path.stem}.png" for path in arguments.images]
    check_outputs([*outputs, *grids], (*IMAGE_FORMATS,))
    tokenizer = load(arguments)
    pairs: list[torch.Tensor] = []

    def run(path: Path, output: Path) -> tuple[dict, str]:
        image = read_image(path)
        codes = tokenizer.encode_image(image, arguments.fit, arguments.bpp)
        if arguments.fit == "crop":
            image = resize_and_crop(image, tokenizer.config.data.image_size)
        decoded = tokenizer.decode_image(codes, **sampling(arguments), progress=progress_bar(path.name))
        pair = torch.stack((to_tensor(image), to_tensor(decoded)))
        write(output, to_pil(grid([pair])))
        if grids:
            pairs.append(pair)
        size, rate, quality = f"{image.width}×{image.height}", codes.bits_per_pixel, float(psnr(pair[:1], pair[1:]))
        row = {"height": image.height, "width": image.width, "bytes_of_ids": codes.nbytes}
        row |= {"bits_per_pixel": round(rate, 5), "psnr": round(quality, 4)}
        return row, f"{path.name[:28]:28} {size:>11} {codes.nbytes:>7} {rate:>10.4f} {quality:>8.2f}"

    if not arguments.json:
        print(f"{'picture':28} {'size':>11} {'bytes':>7} {'bits/pixel':>10} {'PSNR dB':>8}")
    run_all(list(zip(arguments.images, outputs, strict=True)), run, arguments.json)
    if grids:
        write(arguments.grid, to_pil(grid([*torch.stack(pairs, dim=1)])))
    if not arguments.json:
        print(f"Original and reconstruction side by side: {arguments.out}/")
        if grids:
            print(f"Originals above reconstructions: {arguments.grid}")


@command(
    "write images as .flowmo files",
    IMAGES,
    option("--output", "-o", type=Path, help="file to write; - is standard output (default: PICTURE with .flowmo)"),
    OUT_DIR,
    *CONTEXT,
    option("--packed", action="store_true", help="pack the ids without entropy coding"),
    *(*MODEL, *FIT, JSON),
)
def encode(arguments: argparse.Namespace) -> None:
    """Write the ids of images to .flowmo files, entropy-coded if the tokenizer has a context model.

    The output can follow a single image: encode photo.jpg photo.flowmo. An image named - is standard input, a file
    named - is standard output.
    """
    jobs = pair_outputs(arguments, arguments.images, (SUFFIX,), SUFFIX)
    tokenizer = load(arguments)
    codec = Codec(tokenizer, None if arguments.packed else find_context_model(arguments, tokenizer))

    def run(path: Path, output: Path) -> tuple[dict, str]:
        image = read_image(io.BytesIO(sys.stdin.buffer.read()), "standard input") if path == PIPE else read_image(path)
        codes = tokenizer.encode_image(image, arguments.fit, arguments.bpp)
        content = codec.pack(codes)
        write(output, content)
        height, width = codes.output_size
        rate = 8 * len(content) / (height * width)
        row = {"height": height, "width": width, "bytes": len(content), "bytes_of_ids": codes.nbytes}
        line = f"{output}: {len(content)} bytes, {rate:.4f} bits per pixel, for {codes.nbytes} of ids"
        return row | {"bits_per_pixel": round(rate, 5)}, line

    rows = run_all(jobs, run, arguments.json)
    if len(rows) > 1 and not arguments.json:
        size, pixels = sum(row["bytes"] for row in rows), sum(row["height"] * row["width"] for row in rows)
        print(f"{len(rows)} pictures: {size} bytes, {8 * size / pixels:.4f} bits per pixel, {seconds_each(rows)}")


@command(
    "decode .flowmo files to images",
    option("files", nargs="+", type=Path, metavar="FILE", help=".flowmo file"),
    option("--output", "-o", type=Path, help=".png, .jpg, .webp or .ppm to write, or - (default: FILE.flowmo.png)"),
    OUT_DIR,
    *CONTEXT,
    option("--ids", action="store_true", help="print the ids as JSON and decode no image"),
    *(*MODEL, *SAMPLING, JSON),
)
def decode(arguments: argparse.Namespace) -> None:
    """Decode .flowmo files to images.

    The output can follow a single file: decode photo.flowmo photo.png. A file named - is standard input, an image named
    - is standard output, as PNG.
    """
    if arguments.ids and (arguments.output or arguments.out_dir):
        raise UsageError("--ids prints the ids and writes no file. Leave out --output and --out-dir.")
    # a plain .png could be the original
    jobs = pair_outputs(arguments, arguments.files, tuple(IMAGE_FORMATS), f"{SUFFIX}.png")
    check_outputs([output for _, output in jobs if output != PIPE], (*IMAGE_FORMATS,))
    if arguments.ids:
        jobs = [(path, Path()) for path, _ in jobs]  # nothing is written to standard output but the ids
    tokenizer = load(arguments)
    codec = Codec(tokenizer, find_context_model(arguments, tokenizer))

    def run(path: Path, output: Path) -> tuple[dict, str]:
        missing: list[MissingPlanes] = []
        with sys.stdin.buffer if path == PIPE else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)  # refused as damaged if it goes on
        try:
            codes = codec.unpack(content, on_missing=missing.append)
        except CodecError as error:
            raise CodecError(f"{path}: {error}") from None
        for warning in missing:
            print(f"flowmo: {path}: {warning}", file=sys.stderr)
        if arguments.ids:
            assert codes.ids is not None  # a continuous tokenizer has no files
            ids = codes.ids.tolist()
            return {"output": None, "bytes_of_ids": codes.nbytes, "ids": ids}, json.dumps(ids)
        image = tokenizer.decode_image(codes, **sampling(arguments), progress=progress_bar(path.name))
        write(output, image)
        row = {"height": image.height, "width": image.width, "bytes_of_ids": codes.nbytes}
        if tokenizer.native_size:
            row["planes_missing"] = sum(warning.total - warning.planes for warning in missing)
        return row, f"{output}: {image.width}×{image.height} from {codes.nbytes} bytes of ids"

    rows = run_all(jobs, run, arguments.json)
    if len(rows) > 1 and not arguments.json and not arguments.ids:
        print(f"{len(rows)} pictures, {seconds_each(rows)}")


def run_all(jobs: Sequence[Job], run: Callable[[Path, Path], tuple[dict, str]], as_json: bool) -> list[dict]:
    """Run every job, even if others fail. ``run`` returns a row for JSON and a line for people.

    Raises:
        FlowMoError: a job failed.
    """
    rows: list[dict] = []
    failed: list[str] = []
    show = progress_bar("files") if as_json and len(jobs) > 1 else None
    piped = any(output == PIPE for _, output in jobs)  # standard output is for the file
    log = sys.stderr if piped else sys.stdout
    for i, (source, output) in enumerate(jobs):
        start = time.perf_counter()
        try:
            row, line = run(source, output)
        except (FlowMoError, OSError) as error:
            if len(jobs) == 1 or isinstance(error, BrokenPipeError):
                raise
            failed.append(str(source))
            print(f"flowmo: {message_of(error)}", file=sys.stderr)
            continue
        seconds = round(time.perf_counter() - start, 4)
        rows.append({"input": str(source), "output": str(output), **row, "seconds": seconds})
        if show:
            show(i + 1, len(jobs))
        if not as_json:
            print(line, file=log, flush=True)
    if as_json:
        print(json.dumps(rows, indent=1), file=log)
    if failed:
        raise FlowMoError(f"{len(failed)} of {len(jobs)} failed: {', '.join(failed[:5])}{' …' * (len(failed) > 5)}")
    return rows


def seconds_each(rows: Sequence[dict]) -> str:
    return f"{sum(row['seconds'] for row in rows) / len(rows):.2f} s a picture"


def pair_outputs(
    arguments: argparse.Namespace, inputs: Sequence[Path], suffixes: Sequence[str], suffix: str
) -> list[Job]:
    """Pair every input with its output.

    Args:
        inputs: files; the last of two is the output if it ends in one of ``suffixes``, or is - and the first is not.
        suffix: replaces the suffix of an input whose output is not named.

    Raises:
        UsageError: the arguments contradict each other.
    """
    inputs, output = list(inputs), arguments.output
    if len(inputs) == 2 and not (output or arguments.out_dir):
        last = inputs[-1]
        if last.suffix.lower() in suffixes or (last == PIPE != inputs[0]):
            output = inputs.pop()
    if output is not None and len(inputs) > 1:
        raise UsageError("--output names one file, for one input. Use --out-dir for many.")
    if PIPE in inputs and len(inputs) > 1:
        raise UsageError("- is standard input and comes alone. Name one input.")
    if output is not None and arguments.out_dir:
        raise UsageError("--output names the file, --out-dir the folder of many. Give one of them.")
    if inputs[0] == PIPE:
        if arguments.out_dir:
            raise UsageError("Standard input has no name for a file in --out-dir. Name the file with --output.")
        return [(PIPE, output or PIPE)]
    outputs = [output or (arguments.out_dir or path.parent) / f"{path.stem}{suffix}" for path in inputs]
    check_outputs(outputs)
    return list(zip(inputs, outputs, strict=True))


def find_context_model(arguments: argparse.Namespace, tokenizer: FlowMo) -> BitModel | PlaneModel | None:
    """Read the named generator or context model, by default the context model beside the tokenizer's file."""
    if arguments.generator:
        from flowmo.codec.generator import GeneratorModel
        from flowmo.generate.generator import load_generator

        return GeneratorModel(load_generator(arguments.generator))
    if arguments.context:
        return read_context(arguments.context, tokenizer)
    return find_context(arguments.model, tokenizer)
