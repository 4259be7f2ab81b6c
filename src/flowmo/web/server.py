"""The server of ``flowmo demo``: the page of ``page/`` with a tokenizer in this process behind it.

Requests and answers carry RGBA pixels or a ``.flowmo`` file. Every request is bounded and one runs at a time.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from PIL import Image

from flowmo.codec.file import Codec, MissingPlanes
from flowmo.errors import FlowMoError, one_line
from flowmo.evaluate.codecs import FORMATS, CodecMissingError, CodecReconstructor
from flowmo.evaluate.metrics.pairs import psnr
from flowmo.generate.classes import class_titles
from flowmo.generate.generator import Generator
from flowmo.generate.samples import check_pair, sample_images
from flowmo.images import check_pixels, to_pil, to_tensor
from flowmo.tokenizer import FlowMo
from flowmo.web.export import PAGE, check_page, describe

MAX_PIXELS = 16_000_000
MAX_PIXELS_FOR_CODECS = 600_000
"""Larger images take too long, because each codec searches for its quality."""
NO_ADDRESS = "This is no address."
MAX_BODY = 4 * MAX_PIXELS
MAX_REQUESTS = 4
"""Requests whose bodies are in memory. One is computed, the others are read meanwhile."""
SLOWEST = 100_000
"""Bytes a second that a request may take to arrive, after the first minute."""
PIECE = 1 << 20
"""Bytes that are read or sent at a time."""
MAX_STEPS = 50
GENERATED = 4


class DemoError(FlowMoError):
    """A request that cannot be answered; the page shows the message."""


class Demo:
    """The operations behind the page. Arguments come from the query of a request.

    Args:
        codec: writes and reads this tokenizer's files.
        generator: of this tokenizer's ids.
        name: the tokenizer's name on the page.
        examples: images to offer on the page.
    """

    def __init__(
        self,
        tokenizer: FlowMo,
        codec: Codec,
        generator: Generator | None = None,
        name: str = "tokenizer",
        examples: tuple[Path, ...] = (),
    ):
        check_page(tokenizer)
        self.tokenizer, self.codec, self.generator, self.name = tokenizer, codec, generator, name
        self.packed = Codec(tokenizer)
        self.examples = {path.name: path for path in examples}
        missing = [str(path) for path in examples if not path.is_file()]
        if missing or len(self.examples) < len(examples):
            raise DemoError(f"{missing[0]}: no such file." if missing else "Two examples have the same name.")
        if generator is not None:
            check_pair(generator, tokenizer)

    @cached_property
    def model(self) -> dict[str, Any]:
        """What the page's ``model.json`` holds."""
        description = describe(self.tokenizer, self.name) | {"examples": [*self.examples]}
        if self.generator is not None:
            description["classes"] = class_titles(self.generator.vocabulary.classes) or ["any"]
        return description

    def encode(self, body: bytes, height: int, width: int) -> bytes:
        """Encode RGBA pixels as a packed .flowmo file."""
        return self.packed.pack(self.tokenizer.encode_image(image_of(body, height, width)))

    def decode(self, body: bytes, seed: int, steps: int, guidance: float) -> bytes:
        """RGBA pixels of a .flowmo file."""
        codes = self.codec.unpack(body, MAX_PIXELS)
        return rgba_of(self.tokenizer.decode_image(codes, min(steps, MAX_STEPS), seed, guidance=guidance))

    def pack(self, body: bytes) -> bytes:
        """Return the same ids as a file to save, coded if there is a context model."""
        return self.codec.pack(self.codec.unpack(body, MAX_PIXELS))

    def unpack(self, body: bytes) -> tuple[bytes, dict[str, int]]:
        """Return the same ids as a packed file, and the number of planes that are missing as a header."""
        missing: list[MissingPlanes] = []
        content = self.packed.pack(self.codec.unpack(body, MAX_PIXELS, missing.append))
        return content, {"Missing": sum(warning.total - warning.planes for warning in missing)}

    def codecs(self, body: bytes, height: int, width: int, bytes: int) -> list[dict[str, Any]]:
        """Return the same image by other codecs, in at most ``bytes`` bytes or their least."""
        original, found = image_of(body, height, width), []
        if height * width > MAX_PIXELS_FOR_CODECS:
            raise DemoError(f"Codecs are compared up to {MAX_PIXELS_FOR_CODECS:,} pixels. Choose a smaller size.")
        for name in FORMATS:
            try:
                codec = CodecReconstructor(name, bytes)
            except CodecMissingError:
                continue
            data = codec.encode(original, bytes)
            decoded = Image.open(io.BytesIO(data)).convert("RGB")
            shown = io.BytesIO()
            decoded.save(shown, "PNG")
            quality = float(psnr(to_tensor(original)[None], to_tensor(decoded)[None]))
            url = f"data:image/png;base64,{base64.b64encode(shown.getvalue()).decode()}"
            psnr_or_none = quality if math.isfinite(quality) else None  # JSON has no infinity
            found.append({"name": codec.name, "bytes": len(data), "psnr": psnr_or_none, "url": url})
        return found

    def generate(self, body: bytes, label: int, seed: int) -> bytes:
        """RGBA pixels of a few generated images of a class."""
        if self.generator is None:
            raise DemoError("There is no generator. Start flowmo demo with --generator.")
        named = self.generator.vocabulary.classes
        labels = [self.generator.label(label if named else -1)] * GENERATED
        images = sample_images(self.generator, self.tokenizer, labels, range(GENERATED), seed)
        return b"".join(rgba_of(to_pil(image)) for image in images)


def image_of(body: bytes, height: int, width: int) -> Image.Image:
    check_pixels(width, height, max_pixels=MAX_PIXELS)
    if len(body) != 4 * height * width:
        raise DemoError(f"{len(body)} bytes are not {width} × {height} RGBA pixels.")
    return Image.frombytes("RGBA", (width, height), body).convert("RGB")


def rgba_of(image: Image.Image) -> bytes:
    return image.convert("RGBA").tobytes()


def is_loopback(host: str) -> bool:
    """True if a ``Host`` header names this machine."""
    with suppress(ValueError):
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    return False


class Handler(SimpleHTTPRequestHandler):
    """Serves the page's files, ``model.json``, the examples, and the operations of ``Demo`` as POST requests."""

    operations = ("encode", "decode", "pack", "unpack", "codecs", "generate")
    lock = threading.Lock()
    slots = threading.BoundedSemaphore(MAX_REQUESTS)
    protocol_version = "HTTP/1.1"
    timeout = 60
    patience = 600
    """Seconds that a request waits for a slot."""

    def __init__(self, *arguments: Any, demo: Demo):
        self.demo = demo
        super().__init__(*arguments, directory=str(PAGE))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing: standard output is for the address."""

    def handle(self) -> None:
        with suppress(ConnectionError):  # the browser has left
            super().handle()

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")  # or a browser keeps the page of an earlier version
        super().end_headers()

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        address: Any = self.server.server_address
        # another site can point its own name at this machine (DNS rebinding), and is then of the same origin
        if ip_address(address[0]).is_loopback and not is_loopback(self.headers.get("Host", "")):
            self.refuse(403, f"This server is for this machine only. Open http://localhost:{address[1]}.")
            return False
        return True

    def translate_path(self, path: str) -> str:
        name = unquote(urlsplit(path).path.removeprefix("/examples/"))
        example = self.demo.examples.get(name) if path.startswith("/examples/") else None
        return str(example) if example else super().translate_path(path)

    def do_GET(self) -> None:
        self.send_file(super().do_GET)

    def do_HEAD(self) -> None:
        self.send_file(super().do_HEAD)

    def send_file(self, of_page: Callable[[], None]) -> None:
        """Answer with ``model.json``, or with a file of the page."""
        if {"Content-Length", "Transfer-Encoding"} & {*self.headers}:
            self.close_connection = True  # an unread body would be taken for the next request
        try:
            if urlsplit(self.path).path == "/model.json":
                self.answer(200, json.dumps(self.demo.model).encode(), kind="application/json")
            else:
                of_page()
        except ValueError:
            self.refuse(400, NO_ADDRESS)

    def do_POST(self) -> None:
        try:
            url, length = urlsplit(self.path), self.headers.get("Content-Length", "")
        except ValueError:
            return self.refuse(400, NO_ADDRESS)
        origin = self.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != self.headers.get("Host"):
            return self.refuse(403, "Another site may not ask this server.")
        if not length:
            return self.refuse(411, "A request needs a Content-Length.")
        if not re.fullmatch("[0-9]{1,10}", length) or int(length) > MAX_BODY:
            return self.refuse(413, f"A request has at most {MAX_BODY:,} bytes.")
        if url.path.strip("/") not in self.operations:
            return self.refuse(404, "There is no such operation.")
        if not self.slots.acquire(timeout=self.patience):
            self.discard(int(length))
            return self.refuse(503, "The server is busy with other requests. Try again later.")
        try:
            try:
                body = self.read(int(length))
            except TimeoutError:
                return self.refuse(408, "The request took too long to arrive.")
            send = self.run(url.path.strip("/"), url.query, body)
            del body  # a slow reader would keep it
        finally:
            self.slots.release()
        send()  # without a slot, which a slow reader would keep

    def run(self, name: str, query: str, body: bytes) -> Callable[[], None]:
        """Run an operation. Returns what sends its answer."""
        operation: Callable[..., Any] = getattr(self.demo, name)
        try:
            arguments = {name: (float if name == "guidance" else int)(value) for name, value in parse_qsl(query)}
            with self.lock:  # a request takes all cores
                result = operation(body, **arguments)
        except Exception as error:  # the page shows it, and the server goes on
            status = 400 if isinstance(error, FlowMoError | ValueError | TypeError) else 500
            return partial(self.refuse, status, one_line(error, 1000))
        headers: dict[str, int] = {}
        if isinstance(result, tuple):
            result, headers = result
        content = result if isinstance(result, bytes) else json.dumps(result).encode()
        return partial(self.answer, 200, content, headers)

    def read(self, length: int) -> bytes:
        """Read a body, or raise ``TimeoutError`` if it comes at less than ``SLOWEST``: it would keep its slot."""
        body, end = bytearray(), time.monotonic() + self.timeout + length / SLOWEST
        while len(body) < length and (piece := self.rfile.read1(min(length - len(body), PIECE))):
            body += piece
            if len(body) < length and time.monotonic() > end:
                raise TimeoutError
        return bytes(body)

    def discard(self, length: int) -> None:
        """Read a body piece by piece. A browser that is still sending would not see the answer."""
        while length > 0 and (piece := self.rfile.read(min(length, 65536))):
            length -= len(piece)

    def refuse(self, status: int, message: str) -> None:
        self.close_connection = True  # the body may be unread
        self.answer(status, message.encode(), kind="text/plain; charset=utf-8")

    def answer(
        self, status: int, content: bytes, headers: dict[str, int] | None = None, kind: str = "application/octet-stream"
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        for name, value in (headers or {}).items():
            self.send_header(f"FlowMo-{name}", str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(content), PIECE):  # the timeout is for each
            self.wfile.write(content[start : start + PIECE])


def serve(demo: Demo, host: str = "127.0.0.1", port: int = 7860) -> ThreadingHTTPServer:
    """Bind the web server; ``serve_forever`` runs it.

    Raises:
        DemoError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # with the default queue of 5, a busy machine resets connections
        settings = {"address_family": family, "request_queue_size": 128}
        return type("Server", (ThreadingHTTPServer,), settings)((host, port), partial(Handler, demo=demo))
    except OSError as error:
        reason = " ".join((error.strerror or str(error)).split())
        raise DemoError(f"Cannot serve on {host}:{port}: {reason}. Choose another --port or --host.") from None
