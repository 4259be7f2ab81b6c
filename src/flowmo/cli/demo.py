"""The command that serves the web page."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from flowmo.cli.shared import command, hasten, load, with_model
from flowmo.codec.file import Codec, find_context


def demo(arguments: argparse.Namespace) -> None:
    """A web page on this machine: drop a picture, see its code's size and what it decodes to."""
    from flowmo.web.demo import Demo
    from flowmo.web.page import serve

    tokenizer, generator = load(arguments), None
    if arguments.generator:
        from flowmo.generate.generator import load_generator

        generator = hasten(load_generator(arguments.generator, device=arguments.device), arguments)
    codec = Codec(tokenizer, find_context(arguments.model, tokenizer))
    with tempfile.TemporaryDirectory(prefix="flowmo-") as folder:
        operations = Demo(tokenizer, codec, Path(folder), generator, Path(arguments.model).name)
        blocks = serve(operations, arguments.host, arguments.port)
        print(f"FlowMo at {blocks.local_url}; Ctrl-C ends it", flush=True)
        blocks.block_thread()


def port(text: str) -> int:
    value = int(text)
    if not 0 < value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 65535")
    return value


def add_to(commands: Any) -> None:
    sub = command(demo, "a web page that shows it all", commands)
    sub.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for others too (127.0.0.1)")
    sub.add_argument("--port", type=port, default=7860, help="port to listen at (7860)")
    sub.add_argument("--generator", type=Path, help="a generator of the tokenizer's ids, to draw pictures of classes")
    with_model(sub)
