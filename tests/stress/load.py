"""Load: many requests at the web page at once, and many pictures through the command line.

``tests/stress/test_load.py`` does both with few; with many::

    python tests/stress/load.py page --count 200
    python tests/stress/load.py pictures --count 10000

Every request asks for a picture of a size of its own, and every picture has a colour of its own, so that results that
are lost or exchanged are found. Each prints how far memory grew between the first tenth and the end.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import TINY, open_gates
from PIL import Image

from flowmo import Config, FlowMo, load, save
from flowmo.codec.file import Codec

TIMEOUT = 1200


def tiny_file(folder: Path) -> Path:
    torch.manual_seed(0)
    save(open_gates(FlowMo(Config.from_dict(TINY))).eval(), folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


torch.manual_seed(0)
TOKENIZER = open_gates(FlowMo(Config.from_dict(TINY))).eval()


def resident(pid: int) -> int:
    """Bytes of memory that a process holds now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# The page


def visit(address: str, number: int) -> None:
    """One visitor, whose picture has a size and colour of its own: its ids must be that picture's."""
    width, height = 8 + number % 23, 8 + number // 23
    pixels = Image.new("RGBA", (width, height), (number % 256, 80, 200, 255)).tobytes()
    request = urllib.request.Request(f"{address}/encode?height={height}&width={width}", pixels)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        content = answer.read()
    own = TOKENIZER.encode_image(Image.frombytes("RGBA", (width, height), pixels).convert("RGB"))
    assert content == Codec(TOKENIZER).pack(own), number


def load_page(count: int) -> tuple[int, int]:
    """Requests all at once, each with a connection of its own; bytes held after a first round and after all."""
    from flowmo.web.server import Demo, serve

    with serve(Demo(TOKENIZER, Codec(TOKENIZER)), port=free_port()) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for number in range(max(count // 10, 1)):
            visit(address, number)
        before = resident(os.getpid())
        with ThreadPoolExecutor(count) as visitors:
            for done in [visitors.submit(visit, address, number) for number in range(count)]:
                done.result()
        after = resident(os.getpid())
        server.shutdown()
    return before, after


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# The command line


def make_pictures(folder: Path, count: int) -> list[Path]:
    """Small pictures of noise, no two alike."""
    folder.mkdir()
    files = [folder / f"{i:06d}.png" for i in range(count)]
    for i, file in enumerate(files):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(file, compress_level=0)
    return files


def encode(folder: Path, count: int, interrupt_at: int = 0) -> tuple[list[Path], subprocess.Popen, list[int], str]:
    """Pictures and ``flowmo encode`` over all of them; its memory at each tenth, and what it printed."""
    files = make_pictures(folder / "in", count)
    command = [sys.executable, "-m", "flowmo", "encode", *files, "--packed", "--out-dir", folder / "out"]
    command += ["--model", tiny_file(folder)]
    held: list[int] = []
    lines: list[str] = []
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the tests themselves ignore it
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heard
    ) as process:
        for number, line in enumerate(process.stdout, 1):
            lines.append(line)
            if number % max(count // 10, 1) == 0 and process.poll() is None:
                held.append(resident(process.pid))
            if number == interrupt_at:
                process.send_signal(signal.SIGINT)
    return files, process, held, "".join(lines)


def check_files(folder: Path, files: Sequence[Path], every: int) -> int:
    """How many files there are; all whole, nothing else beside them, and every so many-th the right one."""
    tokenizer = load(folder / "tiny.safetensors")
    codec = Codec(tokenizer)
    there = sorted((folder / "out").iterdir())
    assert all(path.suffix == ".flowmo" and not path.name.startswith(".") for path in there)
    for i, path in enumerate(there):
        ids = codec.unpack(path.read_bytes()).ids
        if i % every == 0:
            assert torch.equal(ids, tokenizer.encode_image(Image.open(folder / "in" / f"{path.stem}.png")).ids), path
    assert {path.stem for path in there} <= {file.stem for file in files}
    return len(there)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("what", choices=("page", "pictures"))
    parser.add_argument("--count", type=int, default=200)
    arguments = parser.parse_args()
    began = time.monotonic()
    if arguments.what == "page":
        before, after = load_page(arguments.count)
        print(f"{arguments.count} requests at once, all answered, each with its own picture; {threading.active_count()}"
              f" threads left; memory {before / 2**20:.0f} -> {after / 2**20:.0f} MiB")  # fmt: skip
    else:
        with tempfile.TemporaryDirectory() as folder:
            files, process, held, _ = encode(Path(folder), arguments.count)
            assert process.returncode == 0
            assert check_files(Path(folder), files, every=20) == arguments.count
        print(f"{arguments.count} pictures, all there, every 20th compared; "
              f"memory {held[0] / 2**20:.0f} -> {held[-1] / 2**20:.0f} MiB")  # fmt: skip
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
