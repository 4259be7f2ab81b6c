"""Commands on images and their .flowmo files: reconstruct, encode, decode."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from flowmo.cli.options import load, sampling
from flowmo.cli.output import IMAGE_FORMATS, PIPE, Progress, UsageError, check_outputs, image_suffixes, warn, write
from flowmo.codec.file import MAX_BYTES, Codec, CodecError, Context, MissingPlanes, find_context, read_context
from flowmo.errors import FlowMoError
from flowmo.evaluate.metrics.pairs import grid, psnr
from flowmo.images import EXTENSIONS, resize_and_crop, to_pil, to_tensor
from flowmo.images.pixels import RAW_FORMATS, PixelFormat
from flowmo.model.codes import Codes
from flowmo.tokenizer import FlowMo

SUFFIX = ".flowmo"
Job = tuple[Path, Path]
"""An input file and its output file."""
RunJob = Callable[[Path, Path, Progress | None], tuple[dict, str]]
"""Takes a job and shows its progress. Returns a row for JSON and a line for people."""


def reconstruct(arguments: argparse.Namespace) -> None:
    grids = [arguments.grid] if arguments.grid else []
    if grids and arguments.fit != "crop":
        raise UsageError("--grid needs images of one size. Add --fit crop.")
    outputs = [arguments.output / f"{path.stem if path != PIPE else 'stdin'}.png" for path in arguments.images]
    check_outputs([*outputs, *grids], arguments.force, image_suffixes(), arguments.images)
    tokenizer = load(arguments)
    how, pairs = sampling(arguments, tokenizer), []

    def run(path: Path, output: Path, progress: Progress | None) -> tuple[dict, str]:
        image = read_input(path, tokenizer.pixels)
        encoding = Progress("encoding") if progress else None  # with a time left of its own
        codes = tokenizer.encode_image(image, arguments.bpp, fit=arguments.fit, progress=encoding)
        if arguments.fit == "crop":
            image = resize_and_crop(image, tokenizer.config.data.image_size)
        decoded = tokenizer.decode_tensor(codes, **how, progress=progress)
        pair = torch.stack((to_tensor(image), decoded.cpu()))
        write(output, to_pil(grid([tokenizer.pixels.visible(pair)])))
        if grids:
            pairs.append(tokenizer.pixels.visible(pair))
        height, width = pair.shape[-2:]
        size, rate, quality = f"{width}×{height}", codes.bits_per_pixel, float(psnr(pair[:1], pair[1:]))
        row = {"height": height, "width": width, "bytes_of_ids": codes.nbytes}
        row |= {"bits_per_pixel": round(rate, 5), "psnr": round(quality, 4)}
        return row, f"{path.name[:28]:28} {size:>11} {codes.nbytes:>7} {rate:>10.4f} {quality:>8.2f}"

    if not arguments.json:
        print(f"{'image':28} {'size':>11} {'bytes':>7} {'bits/pixel':>10} {'PSNR dB':>8}")
    try:
        run_all(list(zip(arguments.images, outputs, strict=True)), run, arguments.json)
    finally:
        if pairs:
            write(arguments.grid, to_pil(grid([*torch.stack(pairs, dim=1)])))
    if not arguments.json:
        print(f"Original and reconstruction side by side: {arguments.output}/")
        if grids:
            print(f"Originals above reconstructions: {arguments.grid}")


def encode(arguments: argparse.Namespace) -> None:
    jobs, last = pair_outputs(arguments.images, arguments.output, SUFFIX, is_code), arguments.images[-1]
    if len(jobs) < len(arguments.images) and all(map(is_code, arguments.images)) and last.exists():
        raise UsageError(f"{last} could be an input or the output. Name the output with --output.")
    check_outputs([output for _, output in jobs], arguments.force, inputs=[path for path, _ in jobs])
    named = next((output for _, output in jobs if output.suffix.lower() in (*IMAGE_FORMATS, *EXTENSIONS)), None)
    if named:
        raise UsageError(f"{named}: encode writes no image. Use a name that ends in {SUFFIX}.")
    if arguments.fit == "crop" and any(is_code(path) for path, _ in jobs):
        raise UsageError("--fit crop takes images, not .flowmo files, whose ids are of the whole image.")
    tokenizer = load(arguments)
    needs_context = not arguments.packed or any(is_code(path) for path, _ in jobs)
    named_model = arguments.context or arguments.generator
    if named_model and not needs_context:
        raise UsageError(f"{named_model} changes nothing: --packed writes ids without a context model. Leave out one.")
    reader = Codec(tokenizer, find_context_model(arguments, tokenizer) if needs_context else None)
    codec = Codec(tokenizer) if arguments.packed else reader

    def run(path: Path, output: Path, progress: Progress | None) -> tuple[dict, str]:
        if is_code(path):
            codes, _ = read_codes(path, reader)
            if arguments.bpp is not None and codes.ids is not None:
                most = tokenizer.sub_tokens_at(arguments.bpp, *(codes.image_size or codes.size))
                codes = codes.coarser(min(most, codes.ids.shape[2]))
        else:
            image = read_input(path, tokenizer.pixels)
            codes = tokenizer.encode_image(image, arguments.bpp, fit=arguments.fit, progress=progress)
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
        print(f"{len(rows)} images: {size} bytes, {8 * size / pixels:.4f} bits per pixel, {seconds_each(rows)}")


def decode(arguments: argparse.Namespace) -> None:
    # a plain .png could be the original
    jobs = pair_outputs(arguments.files, arguments.output, f"{SUFFIX}.png", is_image)
    if arguments.ids and (arguments.output or len(jobs) < len(arguments.files)):
        raise UsageError("--ids prints the ids and writes no file. Leave out the output.")
    if arguments.ids:
        jobs = [(path, Path()) for path, _ in jobs]  # nothing is written to standard output but the ids
    else:
        suffixes = [*image_suffixes(), *RAW_FORMATS]
        check_outputs([output for _, output in jobs], arguments.force, suffixes, [path for path, _ in jobs])
    tokenizer = load(arguments)
    if tokenizer.pixels.suffix != ".png" and not arguments.ids:
        jobs = [(path, with_suffix_of(tokenizer.pixels, output)) for path, output in jobs]
        check_outputs([output for _, output in jobs], arguments.force, inputs=[path for path, _ in jobs])
    pixels, written = tokenizer.pixels, [output for _, output in jobs if output not in (PIPE, Path())]
    cut = next((output for output in written if not pixels.fits(output.suffix.lower())), None)
    if cut:
        depth = f"{pixels.channels} × {pixels.bits} bits per pixel"
        raise UsageError(f"{cut}: a file of this kind does not hold {depth}. Write .tif or .npy.")
    codec, how = Codec(tokenizer, find_context_model(arguments, tokenizer)), sampling(arguments, tokenizer)

    def run(path: Path, output: Path, progress: Progress | None) -> tuple[dict, str]:
        codes, planes_missing = read_codes(path, codec)
        if arguments.ids:
            assert codes.ids is not None  # a continuous tokenizer has no files
            ids = codes.ids.tolist()
            return {"output": None, "bytes_of_ids": codes.nbytes, "ids": ids}, json.dumps(ids)
        image = tokenizer.decode_tensor(codes, **how, progress=progress)
        write_image(output, tokenizer.pixels, image)
        height, width = image.shape[1:]
        row = {"height": height, "width": width, "bytes_of_ids": codes.nbytes}
        if tokenizer.native_size:
            row["planes_missing"] = planes_missing
        return row, f"{output}: {width}×{height} from {codes.nbytes} bytes of ids"

    rows = run_all(jobs, run, arguments.json)
    if len(rows) > 1 and not arguments.json and not arguments.ids:
        print(f"{len(rows)} images, {seconds_each(rows)}")


def is_code(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX


def read_codes(path: Path, codec: Codec) -> tuple[Codes, int]:
    """Read a .flowmo file. Return its codes and the number of planes that it lacks, after a warning.

    Raises:
        CodecError: as ``Codec.unpack``, with the name of the file.
    """
    missing: list[MissingPlanes] = []
    with sys.stdin.buffer if path == PIPE else path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)  # refused as damaged if it goes on
    try:
        codes = codec.unpack(content, on_missing=missing.append)
    except CodecError as error:
        raise CodecError(f"{path}: {error}") from None
    for warning in missing:
        warn(f"{path}: {warning}")
    return codes, sum(warning.total - warning.planes for warning in missing)


def is_image(path: Path) -> bool:
    """Return whether a name after a .flowmo file can only be the image to write."""
    suffix = path.suffix.lower()
    return suffix in (*IMAGE_FORMATS, *EXTENSIONS, *RAW_FORMATS) or (suffix != SUFFIX and not path.exists())


def read_input(path: Path, pixels: PixelFormat) -> Image.Image | torch.Tensor:
    """Read an image file, or standard input."""
    return pixels.read(io.BytesIO(sys.stdin.buffer.read()), "standard input") if path == PIPE else pixels.read(path)


def with_suffix_of(pixels: PixelFormat, output: Path) -> Path:
    """Return a default name with the suffix of ``pixels``; any other name as it is."""
    return output.with_suffix(pixels.suffix) if output.name.endswith(f"{SUFFIX}.png") else output


def write_image(output: Path, pixels: PixelFormat, image: torch.Tensor) -> None:
    """Write an image c × h × w in [−1, 1] in the format of the suffix. Standard output gets the usual format."""
    suffix = pixels.suffix if output == PIPE else output.suffix.lower()
    write(output, pixels.to_file(image, suffix) if suffix in RAW_FORMATS else pixels.to_pil(image))


def run_all(jobs: Sequence[Job], run: RunJob, as_json: bool) -> list[dict]:
    """Run every job, even if others fail.

    Raises:
        FlowMoError: a job failed.
    """
    rows: list[dict] = []
    failed: list[str] = []
    single = len(jobs) == 1
    progress = Progress(jobs[0][0].name if single else "files")
    piped = any(output == PIPE for _, output in jobs)  # standard output is for the file
    log = sys.stderr if piped else sys.stdout
    for i, (source, output) in enumerate(jobs):
        start = time.perf_counter()
        try:
            row, line = run(source, output, progress if single else None)
        except (FlowMoError, OSError) as error:
            if single or isinstance(error, BrokenPipeError):
                raise
            failed.append(str(source))
            warn(error if source.name in str(error) else f"{source}: {error}")
            continue
        seconds = round(time.perf_counter() - start, 4)
        rows.append({"input": str(source), "output": str(output), **row, "seconds": seconds})
        progress.clear()
        if not as_json:
            print(line, file=log, flush=True)
        if not single:
            progress(i + 1, len(jobs))
    progress.clear()
    if as_json:
        print(json.dumps(rows, indent=1), file=log)
    if failed:
        raise FlowMoError(f"{len(failed)} of {len(jobs)} failed: {', '.join(failed[:5])}{' …' * (len(failed) > 5)}")
    return rows


def seconds_each(rows: Sequence[dict]) -> str:
    return f"{sum(row['seconds'] for row in rows) / len(rows):.2f} s per image"


def pair_outputs(
    inputs: Sequence[Path], output: str | None, suffix: str, is_output: Callable[[Path], bool]
) -> list[Job]:
    """Pair every input with its output.

    Args:
        output: a file, a folder or -; by default the last of ``inputs`` that is an output, or files beside the inputs.
        suffix: replaces the suffix of an input whose output is not named.

    Raises:
        UsageError: the arguments contradict each other.
    """
    inputs = list(inputs)
    if output is None and len(inputs) > 1 and (inputs[-1] == PIPE or is_output(inputs[-1])):
        output = str(inputs.pop())
    several = len(inputs) > 1
    if PIPE in inputs and several:
        raise UsageError("- is standard input and comes alone. Name one input.")
    folder = output is not None and (output.endswith(os.sep) or Path(output).is_dir())
    if several and output is not None and not folder and (Path(output).is_file() or Path(output).suffix):
        raise UsageError(f"{output} names one file, for one input. Name a folder with --output {Path(output).stem}/.")
    if output is not None and not (folder or several):
        return [(inputs[0], Path(output))]
    if inputs[0] == PIPE:
        if folder:
            raise UsageError("Standard input has no name for a file in a folder. Name the file with --output.")
        return [(PIPE, PIPE)]
    return [(path, (Path(output) if output else path.parent) / f"{path.stem}{suffix}") for path in inputs]


def find_context_model(arguments: argparse.Namespace, tokenizer: FlowMo) -> Context | None:
    """Read the named generator or context model, by default the context model beside the tokenizer's file."""
    if arguments.generator and arguments.context:
        raise UsageError("--generator and --context are two models of the ids. Write one of them.")
    if arguments.generator:
        from flowmo.codec.generator import GeneratorModel
        from flowmo.generate.generator import load_generator

        return GeneratorModel(load_generator(arguments.generator))
    if arguments.context:
        return read_context(arguments.context, tokenizer)
    return find_context(arguments.model, tokenizer)
