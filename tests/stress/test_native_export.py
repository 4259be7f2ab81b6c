"""Exports of a tokenizer of native size: ONNX graphs of any image size, and the static page in a browser."""

import re
import shutil

import pytest
import torch
from browser import pixels, static, until
from conftest import make_once, open_gates
from PIL import Image
from test_export import same

from flowmo.codec.file import CONTEXT, Codec
from flowmo.images import read_image
from flowmo.web.export import export


@pytest.fixture
def exported(native, tmp_path_factory):
    """The tokenizer with all its parts at work, and the folder of its ONNX files of 16 bits."""
    pytest.importorskip("onnxscript")
    open_gates(native).half().float()
    return native, make_once(tmp_path_factory, "exported", lambda folder: export(native, folder))


def test_onnx_of_any_size(exported):
    """Sizes below, at and beyond a window of 4 cells, and prefixes of the sub-tokens; weights of 16 bits."""
    for rows, columns, batch, sent in ((1, 1, 1, None), (4, 8, 2, 1), (5, 3, 1, 2), (9, 6, 1, None)):
        same(*exported, torch.rand(batch, 3, 16 * rows, 16 * columns) * 2 - 1, sent)


def test_static_page_of_native_size(page, exported, runtime, tmp_path, png, monkeypatch):
    """Encode, change the rate, save, read the file with Python, open Python's file, damage it, work offline."""
    native, networks = exported
    with monkeypatch.context() as patched:
        patched.setattr("flowmo.web.export.write_graph", lambda _, file, dtype: shutil.copy(networks / file.name, file))
        export(native, tmp_path / "site", "page", "tiny", runtime=runtime, examples=[png])
    codec, original = Codec(native), read_image(png)
    with static(tmp_path / "site") as address:
        page.visit(address)
        facts, _ = page.open(png)
        assert "70 × 50" in facts
        assert "PSNR" in facts
        assert page.do("return self.crossOriginIsolated"), "the service worker allows threads"
        file = page.save("save", "photo.flowmo")
        assert f"{file.stat().st_size} bytes" in facts
        codes = codec.unpack(file.read_bytes())
        assert torch.equal(codes.ids, native.encode_image(original).ids)
        assert abs(page.shown() - pixels(native.decode_image(codes))).max() <= 1
        page.set("seed", "7")
        assert abs(page.shown() - pixels(native.decode_image(codes, seed=7))).max() <= 1
        page.set("seed", "")  # the default, not an error
        assert page.at("#seed").get_property("value") == "0"
        page.set("rate", "2", "input")
        assert abs(page.shown() - pixels(native.decode_image(codes.coarser(2)))).max() <= 1
        file.unlink()
        assert torch.equal(codec.unpack(page.save("save", "photo.flowmo").read_bytes()).ids, codes.ids[..., :2])

        theirs = tmp_path / "OTHER.FLOWMO"
        content = codec.pack(native.encode_image(original.resize((130, 90))))
        theirs.write_bytes(content)
        facts, message = page.open(theirs)
        assert "130 × 90" in facts
        assert "PSNR" not in facts
        assert not message
        assert abs(page.shown() - pixels(native.decode_image(codec.unpack(content)))).max() <= 1
        theirs.write_bytes(content[:3] + bytes([content[3] | CONTEXT << 4]) + content[4:])
        advice = r"entropy-coded.*: flowmo encode FILE packed.flowmo --packed --model MODEL\.$"
        assert re.search(advice, page.open(theirs)[1])
        theirs.write_bytes(content[:-3])
        assert "3 of 4 planes" in page.open(theirs)[1]
        theirs.write_bytes(content[:20])
        assert "damaged" in page.open(theirs)[1]
        broken = tmp_path / "broken.jpg"
        broken.write_bytes(b"\xff\xd8\xff not a picture")
        assert "not an image that this browser reads" in page.open(broken)[1]
        large = tmp_path / "large.jpg"
        Image.new("RGB", (4000, 1000), "red").save(large)
        facts, message = page.open(large)
        assert "512 × 128" in facts
        assert "shrunk from 4,000 × 1,000 to 512 × 128" in message

        page.browser.set_window_size(400, 800)
        assert page.do("return document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out on a phone"
        page.browser.set_window_size(1200, 1500)
        fetched = page.do("return performance.getEntriesByType('resource').map(e => e.name)")
        assert fetched
        assert all(name.startswith((address, "blob:", "data:")) for name in fetched), "no other machine"
        kept = "const c = await caches.open('flowmo'); done((await c.keys()).map((r) => r.url).join(' '))"
        kept = f"const done = arguments[0]; (async () => {{ {kept} }})()"
        until(lambda: page.browser.execute_async_script(kept).count(".onnx") == 2)
    page.visit(address)  # the server has gone
    assert "70 × 50" in page.open(png)[0]
