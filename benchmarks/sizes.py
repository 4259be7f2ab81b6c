"""Time and memory of whole images from 128 to 2 048 pixels a side, beside JPEG, WebP, AVIF and JPEG XL.

    python benchmarks/sizes.py PHOTOGRAPH --out docs/native/sizes.json --threads 2
    python benchmarks/sizes.py --redraw --out docs/native/sizes.json      # the table again

PHOTOGRAPH  is cropped to a square and resized to each side
--models    tokenizers, at their full rate

encode is image to the bytes of a file, entropy coding included; decode is the way back. Each row is a process of its
own: its median time of three, after one to warm up, and the peak of its resident memory, PyTorch included. Above 512
pixels it is the time of one. Codecs write at quality 20 with the settings of ``flowmo evaluate --peers``, slow ones.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image, ImageOps

import flowmo
from flowmo.checkpoint.files import write_content
from flowmo.codec.file import Codec, find_context
from flowmo.evaluate.codecs import FORMATS, CodecReconstructor
from flowmo.train.memory import used_memory

SIDES = (128, 256, 512, 1024, 2048)
REPEATS, REPEATED_UP_TO = 3, 512
QUALITY = 20


def coder(method: str) -> tuple[Callable[[Image.Image], bytes], Callable[[bytes], Image.Image]]:
    """Return encoder and decoder of a codec or of a tokenizer."""
    if method in FORMATS:
        CodecReconstructor(method, 0)  # registers the format, or says that it is missing
        codec = FORMATS[method]

        def encode(image: Image.Image) -> bytes:
            stream = io.BytesIO()
            image.save(stream, codec.pillow, quality=QUALITY, **codec.settings)
            return stream.getvalue()

        return encode, lambda content: Image.open(io.BytesIO(content)).convert("RGB")
    tokenizer = flowmo.load(method)
    files = Codec(tokenizer, find_context(method, tokenizer))
    return lambda image: files.pack(tokenizer.encode_image(image)), lambda content: tokenizer.decode_image(
        files.unpack(content)
    )


def measure(photograph: Path, method: str, side: int) -> dict[str, Any]:
    """One row: bytes, seconds and peak memory."""
    encode, decode = coder(method)
    image = ImageOps.fit(Image.open(photograph).convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(REPEATS + 1 if side <= REPEATED_UP_TO else 1):
        start = time.perf_counter()
        content = encode(image)
        middle = time.perf_counter()
        decode(content)
        times["encode"].append(middle - start)
        times["decode"].append(time.perf_counter() - middle)
    seconds = {name: median(found[1:] or found) for name, found in times.items()}
    peak = used_memory(torch.device("cpu"))
    return {"method": method, "side": side, "bytes": len(content), **seconds, "peak": peak}


def table(results: dict[str, Any]) -> str:
    """Seconds to encode and decode, and GiB, of each method at each side."""
    rows = {(row["method"], row["side"]): row for row in results["rows"]}
    methods, sides = (list(dict.fromkeys(row[key] for row in results["rows"])) for key in ("method", "side"))
    lines = ["| | " + " | ".join(f"{side} px" for side in sides) + " |", "|---" + "|---" * len(sides) + "|"]
    for method in methods:
        cells = []
        for side in sides:
            if row := rows.get((method, side)):
                cells.append(f"{row['encode']:.3g}, {row['decode']:.3g} s, {row['peak'] / 2**30:.1f} GiB")
            else:
                cells.append("–")
        name = FORMATS[method].name if method in FORMATS else f"`{method}`"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photograph", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=Path("sizes.json"))
    parser.add_argument("--models", nargs="+", default=["native"])
    parser.add_argument("--sides", nargs="+", type=int, default=SIDES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--redraw", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(measure(arguments.photograph, arguments.one[0], int(arguments.one[1]))))
        return
    if not arguments.redraw:
        rows = []
        for side in arguments.sides:
            for method in (*arguments.models, *FORMATS):
                words = [__file__, str(arguments.photograph), "--threads", str(arguments.threads)]
                done = subprocess.run([sys.executable, *words, "--one", method, str(side)], stdout=subprocess.PIPE)
                if done.returncode:
                    print(f"{method} at {side} pixels failed, see above.", flush=True)
                    continue
                rows.append(json.loads(done.stdout))
                print(rows[-1], flush=True)
                results = {"threads": arguments.threads, "torch": torch.__version__, "rows": rows}
                write_content(arguments.out, json.dumps(results, indent=1))
    print(table(json.loads(arguments.out.read_text())))


if __name__ == "__main__":
    main()
