"""The web page in a real browser without a network: exported as a static folder, and served by ``flowmo demo``."""

import contextlib
import functools
import http.client
import http.server
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from browser import pixels, static, until
from conftest import PICTURES, make_once, open_gates
from PIL import Image
from processes import run_program
from test_planes import low_model

from flowmo import FlowMo, preset
from flowmo.codec.file import Codec, CodecError, varint
from flowmo.data.tokens import Vocabulary
from flowmo.generate.generator import Generator, save_generator
from flowmo.images import ImageError, read_image
from flowmo.web import server as web_server
from flowmo.web.export import ExportError, export
from flowmo.web.server import MAX_BODY, Demo, DemoError, Handler, serve


@pytest.fixture
def generator_file(tiny, tmp_path):
    """A generator of random weights for the ids of the tiny tokenizer."""
    metadata = {"tokenizer": tiny.identity(), "model": "tiny", "image_size": 32, "classes": ("n01440764", "cat")}
    small = ("generator.depth=1", "generator.hidden_size=64", "generator.num_heads=1", "generator.sample_steps=2")
    torch.manual_seed(0)
    generator = Generator(
        preset("maskgit_nano").override(*small), Vocabulary(tokens=6, sub_tokens=2, id_bits=4, **metadata)
    )
    save_generator(generator, tmp_path / "generator.safetensors")
    return tmp_path / "generator.safetensors"


# The page without a browser: operations and limits of the server


@pytest.fixture
def demo(native):
    return Demo(native, Codec(native), name="tiny")


def rgba(path):
    return Image.open(path).convert("RGBA").tobytes()


def test_operations(demo, native, png):
    pytest.importorskip("constriction")
    codes, coded = native.encode_image(read_image(png)), Codec(native, low_model(native))
    demo.codec = coded
    body = demo.encode(rgba(png), 50, 70)
    assert body == Codec(native).pack(codes)
    decoded = demo.decode(Codec(native).pack(codes.coarser(2)), seed=5, steps=2, guidance=1.0)
    assert decoded == native.decode_image(codes.coarser(2), 2, 5).convert("RGBA").tobytes()
    low = replace(codes, ids=codes.ids * (codes.ids % 10 == 0))
    packed, content = Codec(native).pack(low), coded.pack(low)
    assert len(content) < len(packed)
    assert demo.pack(packed) == content
    assert demo.unpack(content) == (packed, {"Missing": 0})
    assert demo.unpack(content[:-1]) == (Codec(native).pack(low.coarser(3)), {"Missing": 1})
    codecs = {codec["name"]: codec for codec in demo.codecs(rgba(png), 50, 70, 1500)}
    assert {"JPEG", "WebP"} <= {*codecs}
    assert all(codec["bytes"] <= 1500 and codec["psnr"] > 20 for codec in codecs.values())
    for call, message in (
        (lambda: demo.encode(b"1234", 50, 70), "not 70 × 50 RGBA"),
        (lambda: demo.encode(b"", 0, 70), "70×0 has no pixels"),
        (lambda: demo.decode(body[:15], 0, 1, 1.0), "it ends early"),
        (lambda: demo.codecs(rgba(png), 1000, 1000, 10), "RGBA"),
        (lambda: demo.generate(b"", 0, 0), "no generator"),
    ):
        with pytest.raises((DemoError, CodecError, ImageError), match=message):
            call()


def test_flat_pictures_by_other_codecs(demo):
    """Some formats are exact then, also JPEG XL, whose encoder refuses a quality of 100."""
    found = demo.codecs(b"\xff" * 4 * 64 * 64, 64, 64, 400)
    assert {"JPEG", "WebP"} <= {codec["name"] for codec in found}
    assert None in [codec["psnr"] for codec in found]
    json.dumps(found, allow_nan=False)


def test_operations_have_limits(demo, native, png, monkeypatch):
    body, steps = demo.encode(rgba(png), 50, 70), []
    monkeypatch.setattr(native, "decode_image", lambda codes, n, *_, **__: (steps.append(n), read_image(png))[1])
    demo.decode(body, 0, 10**9, 1.0)
    assert steps == [web_server.MAX_STEPS]
    for limit, call in (
        ("MAX_PIXELS", lambda: demo.decode(body, 0, 1, 1.0)),
        ("MAX_PIXELS", lambda: demo.pack(body)),
        ("MAX_PIXELS", lambda: demo.unpack(body)),
        ("MAX_PIXELS", lambda: demo.encode(rgba(png), 50, 70)),
        ("MAX_PIXELS_FOR_CODECS", lambda: demo.codecs(rgba(png), 50, 70, 1500)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(web_server, limit, 50 * 70 - 1)
            with pytest.raises((DemoError, CodecError, ImageError), match="3,499"):
                call()


@pytest.mark.parametrize("settings", ["model.channels=1", "data.bit_depth=16"])
def test_models_of_other_images_are_refused(tiny_config, tmp_path, settings):
    tokenizer = FlowMo(tiny_config.override(settings))
    for use in (lambda: Demo(tokenizer, Codec(tokenizer)), lambda: export(tokenizer, tmp_path / "site", "page")):
        with pytest.raises(ExportError, match="page shows 8-bit RGB"):
            use()
    assert not (tmp_path / "site").exists()


class Held:
    """In place of ``Demo``: the operation ``pack`` waits for ``go``."""

    examples: ClassVar = {}

    def __init__(self):
        self.started, self.go, self.errors, self.model = threading.Event(), threading.Event(), [], {}

    def pack(self, body):
        self.started.set()
        assert self.go.wait(60)
        return body


@pytest.fixture
def held():
    """A server in this process with a ``Held`` behind it."""
    demo = Held()
    with serve(demo, port=0) as server:
        demo.port = server.server_port
        server.handle_error = lambda *_: demo.errors.append(sys.exception())
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield demo
        demo.go.set()
        server.shutdown()


def ask(port, method="POST", path="/pack", body=b"", **headers):
    """Status and text of an answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_other_sites_by_a_name_of_their_own(held):
    held.go.set()
    for host in ("127.0.0.1", f"localhost:{held.port}", "[::1]:80", "LOCALHOST"):
        assert ask(held.port, Host=host)[0] == 200
        assert ask(held.port, "GET", "/model.json", Host=host)[0] == 200
    for host in ("evil.com", "127.0.0.1.evil.com", f"evil.com:{held.port}", "[", "", "localhost.evil.com"):
        for method, path in (("POST", "/pack"), ("GET", "/model.json"), ("GET", "/"), ("HEAD", "/")):
            status, text = ask(held.port, method, path, Host=host, Origin=f"http://{host}")
            assert status == 403, host
            assert method == "HEAD" or "for this machine only" in text
    assert ask(held.port, Origin="http://[")[0] == 403
    assert not held.errors


@pytest.mark.parametrize("length", ["\u00b2", "1\u00b2", "9" * 5000, "-1", "1.0"])
def test_lengths_that_are_no_numbers(held, length):
    assert ask(held.port, Content_Length=length)[0] == 413
    assert ask(held.port, Content_Length="")[0] == 411
    assert not held.errors


@pytest.mark.parametrize("request_line", ["GET /%00", "GET /examples/%00", "GET http://[", "POST http://["])
def test_addresses_that_are_none(held, request_line):
    with socket.create_connection(("127.0.0.1", held.port), timeout=30) as client:
        client.sendall(f"{request_line} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"Connection: close" in answer
    assert not held.errors


def test_heads_have_no_body(held):
    for path, status in (("/model.json", 200), ("/main.js", 200), ("/nothing", 404)):
        client = http.client.HTTPConnection("127.0.0.1", held.port, timeout=30)
        client.request("HEAD", path)
        answer = client.getresponse()
        assert (answer.status, answer.read()) == (status, b"")
        assert int(answer.headers["Content-Length"]) > 0
        client.close()


def test_the_body_of_a_get_is_no_request(held):
    with socket.create_connection(("127.0.0.1", held.port), timeout=30) as client:
        length = b"Host: localhost\r\nContent-Length: 5\r\n\r\n"
        client.sendall(b"GET /model.json HTTP/1.1\r\n" + length + b"hello" + b"GET /main.js HTTP/1.1\r\n\r\n")
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert not held.errors


def test_few_bodies_are_in_memory(held, monkeypatch):
    monkeypatch.setattr(Handler, "slots", threading.BoundedSemaphore(1), raising=False)
    monkeypatch.setattr(Handler, "patience", 0.05, raising=False)
    answers = []
    first = threading.Thread(target=lambda: answers.append(ask(held.port, body=b"first")))
    first.start()
    assert held.started.wait(60)
    status, text = ask(held.port, body=bytes(8_000_000))
    assert status == 503
    assert "busy" in text
    monkeypatch.setattr(Handler, "patience", 60)
    second = threading.Thread(target=lambda: answers.append(ask(held.port, body=b"second")))
    second.start()
    held.go.set()
    for thread in (first, second):
        thread.join(60)
    assert sorted(answers) == [(200, "first"), (200, "second")]  # the threads that ask may end in any order
    assert ask(held.port, body=b"third") == (200, "third")


def test_a_client_that_sends_slowly_keeps_no_slot(held, monkeypatch):
    monkeypatch.setattr(Handler, "timeout", 0.3)
    with socket.create_connection(("127.0.0.1", held.port)) as slow:
        slow.sendall(b"POST /pack HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        slow.settimeout(60)
        for _ in range(1000):
            with contextlib.suppress(ConnectionError):  # the server has answered and left
                slow.sendall(b"1")
            if select.select([slow], [], [], 0.05)[0]:
                break
        assert b" 408 " in slow.recv(100)


def test_a_client_that_reads_slowly_keeps_no_slot(held, monkeypatch):
    monkeypatch.setattr(Handler, "slots", threading.BoundedSemaphore(1), raising=False)
    held.go.set()
    body = bytes(30_000_000)  # more than the buffers of a connection
    with socket.create_connection(("127.0.0.1", held.port)) as slow:
        slow.sendall(b"POST /pack HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert slow.recv(12) == b"HTTP/1.1 200"
        assert ask(held.port, body=b"next") == (200, "next")


def test_the_page_of_an_earlier_version_is_not_kept(held):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", held.port, timeout=60)) as connection:
        for path in ("/main.js", "/model.json"):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            assert answer.headers["Cache-Control"] == "no-cache"


def test_examples_of_any_name(tiny, tmp_path):
    names = ("my cat.png", "é #1?.png")
    paths = [tmp_path / name for name in names]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    demo = Demo(tiny, Codec(tiny), examples=tuple(paths))
    handler = Handler.__new__(Handler)
    handler.demo, handler.directory = demo, str(tmp_path / "page")
    assert demo.model["examples"] == [*names]
    for name, path in zip(names, paths, strict=True):
        assert handler.translate_path(f"/examples/{urllib.parse.quote(name, safe='')}") == str(path)
    with pytest.raises(DemoError, match=r"none\.png: no such file"):
        Demo(tiny, Codec(tiny), examples=(tmp_path / "none.png",))
    with pytest.raises(DemoError, match="the same name"):
        Demo(tiny, Codec(tiny), examples=(paths[0], paths[0]))


def test_a_browser_that_leaves(held):
    threads = threading.active_count()
    with socket.create_connection(("127.0.0.1", held.port)) as browser:
        browser.sendall(b"POST /pack HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n" + bytes(1_000_000))
        assert held.started.wait(60)
        browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets it
    held.go.set()
    until(lambda: threading.active_count() <= threads, 60)
    assert not held.errors


@contextlib.contextmanager
def serving(model, *words):
    """The command in a process of its own; gives the address that it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flowmo", "demo", "--model", str(model), "--port", str(port), *map(str, words)]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the tests ignore it
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, preexec_fn=heard) as process:
        try:
            line = process.stdout.readline()
            assert "FlowMo at http://127.0.0.1:" in line, line
            yield f"http://127.0.0.1:{port}/"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()


@pytest.fixture
def tiled(tiny_config, runtime, tmp_path_factory, tmp_path):
    """A guided tokenizer of fixed size with several steps, and a copy of its static page."""
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    shallow = ("model.enc_depth=1", "model.dec_depth=1")
    sampling = ("eval.sampling.sample_steps=2", "eval.sampling.guidance_high=1")
    tiny = open_gates(FlowMo(tiny_config.override(*shallow, *sampling))).eval().requires_grad_(False)
    site = make_once(
        tmp_path_factory,
        "tiled",
        lambda folder: export(tiny, folder, "page", "tiny", "float32", runtime, [next(PICTURES.glob("*.jpg"))]),
    )
    return tiny, shutil.copytree(site, tmp_path / "site")


def test_static_page_of_a_bad_server(page, tiled, png):
    """A file that is chosen while the networks load, a network cut short, damaged and mended, a redirect."""
    _, site = tiled
    go, network = threading.Event(), site / "encoder.onnx"
    os.utime(site / "main.js", (1e9, 1e9))  # so old that a browser would keep its copy for years

    def answers(request):
        if "encoder.onnx" in request.path:
            assert go.wait(100)
        if request.path != "/moved":
            return False
        request.send_response(301)
        request.send_header("Location", "/")
        request.send_header("Content-Length", "0")
        request.end_headers()
        return True

    with static(site, answers) as address:
        page.browser.get(address)
        until(lambda: page.do("return self.crossOriginIsolated") and "Loading" in page.text("#message"))
        page.at("#file").send_keys(str(png))
        example = "return document.querySelector('#examples button').disabled"
        assert page.do(example), "it would end the loading"
        go.set()
        until(lambda: "70 × 50" in page.text("#details"))
        assert page.text("#left") == "original"
        assert not page.do(example)
        page.visit(f"{address}moved")
    whole = network.read_bytes()
    network.write_bytes(whole[:-100])
    with static(site, answers) as address:
        page.browser.get(address)
        until(lambda: "encoder.onnx cannot be loaded (another length). Reload the page." in page.text("#message"))
        network.write_bytes(whole[:-100] + bytes(100))
        page.browser.refresh()
        until(lambda: "encoder.onnx cannot be loaded (another content)" in page.text("#message"))
        network.write_bytes(whole)
        page.visit(address)
        (site / "main.js").write_text((site / "main.js").read_text() + "document.body.dataset.newer = 'yes';")
        page.visit(address)
        assert page.do("return document.body.dataset.newer") == "yes"


def test_static_page_in_tiles(page, tiled, png):
    """Tiles, the central square, samples and edited ids."""
    tiny, site = tiled
    with static(site) as address:
        page.visit(address)
        page.open(png)
        codes = tiny.encode_image(read_image(png))
        file = page.save("save", "photo (1).flowmo" if (page.downloads / "photo.flowmo").exists() else "photo.flowmo")
        assert file.read_bytes() == Codec(tiny).pack(codes)
        assert abs(page.shown() - pixels(tiny.decode_image(codes))).max() <= 1
        page.set("fit", "crop")
        assert page.shown().shape == (32, 32, 3)
        page.click("draw")
        assert len(page.browser.find_elements("css selector", "#samples canvas")) == 4
        assert re.search(r"differ by \d+\.\d\d of 255", page.text("#samples-note"))
        page.set("ids", "1 2 3")
        page.click("decode-ids")
        assert "Type 12 numbers; here are 3" in page.text("#message")
        page.set("ids", " ".join(["5"] * 11 + ["99"]))
        page.click("decode-ids")
        assert "Number 12 is no id. Ids run from 0 to 15." in page.text("#message")
        page.set("ids", " ".join(["5"] * 12))
        page.click("decode-ids")
        same = tiny.decode(torch.full((1, 6, 2), 5))[0]
        assert abs(page.shown() - pixels(((same + 1) * 127.5).round().permute(1, 2, 0))).max() <= 1
        page.click("compare")
        assert re.search(r"JPEG: [\d,]+ bytes, its least.*WebP", page.text("#codecs"))
        page.do(
            "const seed = document.getElementById('seed'); seed.value = 3; seed.dispatchEvent(new Event('change'));"
            "document.getElementById('compare').click()"
        )
        until(lambda: "WebP" in page.text("#codecs"), 30)


def test_the_demo_command(page, tiny, tiny_model, tmp_path, png, generator_file):
    """The same page with the Python model behind it: encode, save, compare with AVIF, generate; then its limits."""
    codec = Codec(tiny)
    with serving(tiny_model, "--generator", generator_file, "--examples", png) as address:
        page.visit(address)
        page.do("document.querySelector('#examples button').click()")
        until(lambda: "70 × 50" in page.text("#details"))
        codes = tiny.encode_image(read_image(png))
        assert f"{len(codec.pack(codes))} bytes" in page.text("#details")
        assert abs(page.shown() - pixels(tiny.decode_image(codes))).max() <= 1
        page.click("compare")
        assert {"JPEG", "WebP", "AVIF"} == {*re.findall(r"(JPEG|WebP|AVIF): [\d,]+ bytes", page.text("#codecs"))}
        page.click("make")
        assert len(page.browser.find_elements("css selector", "#generated canvas")) == 4
        vast = tmp_path / "vast.flowmo"
        vast.write_bytes(b"FLM\x02" + codec.identity + varint(29999) + varint(1999) + varint(31) + bytes(9))
        assert "more than 16,000,000, the limit here" in page.open(vast)[1]

        def post(path, body=b"", **headers):
            try:
                with urllib.request.urlopen(urllib.request.Request(address + path, body, headers)) as answer:
                    return answer.status
            except urllib.error.HTTPError as error:
                return error.code

        assert post("encode?height=1&width=1", b"\0\0\0\xff") == 200
        assert post("encode?height=1&width=1", b"\0\0\0\xff", Origin="http://elsewhere.org") == 403
        assert post("encode?height=1&width=x", b"\0\0\0\xff") == 400
        assert post("encode?height=1&width=1&seed=1", b"\0\0\0\xff") == 400
        assert post("model") == 404
        assert post("encode", b"", **{"Content-Length": str(MAX_BODY + 1)}) == 413
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}examples/../../../pyproject.toml")
        port = int(address.rstrip("/").rpartition(":")[2])
        for other in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)}:
            if not other.startswith("127."):
                with pytest.raises(OSError), socket.create_connection((other, port), timeout=5):  # noqa: PT011
                    pass
        refused = run_program(["demo", "--model", tiny_model, "--port", port])
        assert refused.returncode == 2
        assert refused.stderr.count(b"\n") == 1
        assert b"Cannot serve on" in refused.stderr
