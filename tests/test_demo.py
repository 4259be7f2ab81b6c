"""The web page: its operations, and the whole page in a real browser without a network."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from PIL import Image
from test_codec import peaked

from flowmo import ImageError, preset
from flowmo.codec.file import Codec, varint
from flowmo.data.tokens import Vocabulary
from flowmo.evaluate.metrics.pairs import heat_map
from flowmo.generate.generator import Generator, load_generator, save_generator
from flowmo.web.demo import FLIPPED, MAX_GENERATED, MAX_PIXELS, MAX_SAMPLES, RANDOM, TYPED, Demo, DemoError, show_ids
from flowmo.web.page import peers_html


@pytest.fixture
def demo(tiny, tmp_path):
    (tmp_path / "files").mkdir()
    return Demo(tiny, Codec(tiny), tmp_path / "files")


@pytest.fixture
def photo(tmp_path, picture):
    picture.resize((70, 50)).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def generator_file(tiny, tmp_path):
    """A generator of random weights for the ids of the tiny tokenizer."""
    metadata = {"tokenizer": tiny.identity(), "model": "tiny", "image_size": 32, "classes": ("n01440764", "cat")}
    small = ("generator.depth=1", "generator.hidden_size=64", "generator.num_heads=1", "generator.sample_steps=2")
    torch.manual_seed(0)
    generator = Generator(
        preset("maskgit_nano").override(*small), Vocabulary(tokens=6, sub_tokens=2, id_bits=4, **metadata)
    )
    with torch.no_grad():  # classes that differ
        for parameter in generator.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    save_generator(generator, tmp_path / "generator.safetensors")
    return tmp_path / "generator.safetensors"


def test_reconstruct(demo, tiny, photo):
    original, decoded, codes, file, nbytes, metrics = demo.reconstruct(photo, "tile", 2, 5, 1.5)
    assert original.size == decoded.size == (70, 50)
    assert decoded.tobytes() == tiny.decode_image(codes, 2, 5).tobytes()
    with open(file, "rb") as content:
        assert torch.equal(demo.codec.unpack(content.read()).ids, codes.ids)
    assert nbytes == os.path.getsize(file)
    assert metrics["file"] == f"{nbytes} bytes"
    assert metrics["picture"] == "70 × 50 pixels, 6 tiles"
    assert 3 < float(metrics["PSNR"].removesuffix(" dB")) < 50
    again = demo.reconstruct(file, "tile", 2, 5, 1.5)
    assert torch.equal(again.codes.ids, codes.ids)
    assert again.decoded.tobytes() == decoded.tobytes()
    assert again.original is None
    assert "PSNR" not in again.metrics
    assert demo.reconstruct(photo, "crop", 1, 0, 1.0).original.size == (32, 32)
    assert "6 tokens of 2 ids below 16 of each 32 × 32 pixels: 6 bytes" in demo.about()


def test_other_codecs(demo, photo):
    result = demo.reconstruct(photo, "tile", 1, 0, 1.0)
    peers = demo.at_equal_bytes(result)
    assert [peer.name for peer in peers][:2] == ["JPEG", "WebP"]
    assert not any(peer.fits for peer in peers), "36 bytes are too few for any of them"
    assert all(peer.image.size == (70, 50) and peer.nbytes > 53 for peer in peers)
    table = peers_html("<tiny>", {"file": "53 bytes"}, peers)
    assert "FlowMo &lt;tiny&gt;" in table
    assert f"{peers[0].nbytes:,} bytes, its least" in table


def test_samples_and_where_they_differ(demo, tiny, photo):
    result = demo.reconstruct(photo, "tile", 1, 0, 1.0)
    drawn, heat = demo.samples(result, 3, 1, 7, 1.0)
    assert [caption for _, caption in drawn] == ["seed 7", "seed 8", "seed 9"]
    assert drawn[0][0].tobytes() == tiny.decode_image(result.codes, 1, 7, guidance=1.0).tobytes()
    assert heat.size == (70, 50)
    assert len(demo.samples(result, 1000, 1, 0, 1.0)[0]) == MAX_SAMPLES


def test_the_heat_maps_colours():
    colours = heat_map(torch.tensor([[0.0, 1.0, 2.0, 4.0]]))
    assert colours.shape == (3, 1, 4)
    assert (colours.sum(dim=0).diff() > 0).all()
    assert colours[:, 0, 0].max() < -0.9
    assert torch.isfinite(heat_map(torch.zeros(2, 2))).all()


def test_edits_change_the_tokens_that_were_named(demo, photo):
    result = demo.reconstruct(photo, "tile", 1, 0, 1.0)
    before, after = demo.edit(result, 0, 2, FLIPPED, "", 1, 0, 1.0)
    assert before.tobytes() != after.tobytes()
    assert before.tobytes() == demo.decode(result.codes, 1, 0, 1.0).tobytes(), "the codes at hand stay as they are"
    assert demo.edit(result, 2, 0, FLIPPED, "", 1, 0, 1.0)[1].tobytes() == after.tobytes()
    assert demo.edit(result, 0, 2, RANDOM, "", 1, 0, 1.0)[1].tobytes() != after.tobytes()


def test_ids_that_are_typed(demo, photo):
    """As they are shown they change nothing; others do, and what is no id is refused."""
    result = demo.reconstruct(photo, "crop", 1, 0, 1.0)
    ids = result.codes.ids[0]
    assert show_ids(result, 2, 1) == "\n".join(" ".join(map(str, row)) for row in ids[1:3].tolist())
    before, same = demo.edit(result, 1, 2, TYPED, show_ids(result, 1, 2), 1, 0, 1.0)
    assert before.tobytes() == same.tobytes()
    flipped = str((15 - ids[1:3]).tolist())
    typed = demo.edit(result, 1, 2, TYPED, flipped, 1, 0, 1.0)[1]
    assert typed.tobytes() == demo.edit(result, 1, 2, FLIPPED, "", 1, 0, 1.0)[1].tobytes()
    for bad, message in (
        ("1 2 3", "Type 4 numbers"),
        ("1 2 3 16", "16 is not an id"),
        ("1 2 3 x", "Type 4"),
        ("", "Type"),
    ):
        with pytest.raises(DemoError, match=message):
            demo.edit(result, 1, 2, TYPED, bad, 1, 0, 1.0)


def test_pictures_of_a_class(demo, tiny, generator_file):
    ours = Demo(tiny, demo.codec, demo.folder, load_generator(generator_file))
    pictures = ours.generate(0, 2, 3, 1.5)
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
    assert pictures[0].tobytes() == ours.generate("tench", 1, 3, 1.5)[0].tobytes()
    assert ours.generate(None, 1, 3, 1.5)[0].tobytes() != pictures[0].tobytes()
    assert len(ours.generate(1, 1000, 0, 1.5)) == MAX_GENERATED


def test_what_was_just_made_is_kept_whatever_the_clock_says(demo, monkeypatch):
    monkeypatch.setattr("flowmo.web.demo.MAX_FILES", 2)
    for i in range(5):
        file = demo._keep(bytes([i]), "a.flowmo")
        assert file.is_file()
        assert len(list(demo.folder.iterdir())) <= 2
        os.utime(file.parent, (10**10, 10**10))  # later than all that is still to come


def test_what_is_too_large_or_broken_is_refused(demo, tmp_path, photo):
    large = tmp_path / "large.png"
    Image.new("1", (MAX_PIXELS // 1000 + 1, 1000)).save(large)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff not a picture")
    code = tmp_path / "code.flowmo"
    code.write_bytes(b"FLM\x02 no code either")
    vast = tmp_path / "vast.flowmo"  # a header, which is enough to refuse it
    vast.write_bytes(b"FLM\x02" + demo.codec.identity + varint(2999) + varint(1999) + varint(31) + bytes(9))
    for file, message in (
        (large, "more than 4,000,000"),
        (vast, "vast.flowmo: .*3000×2000 pixels.* more than 4,000,000"),
        (broken, "not an image in a supported format"),
        (code, "code.flowmo"),
        (None, "Choose"),
    ):
        with pytest.raises((DemoError, ImageError), match=message):
            demo.open(file and str(file), "tile")
    with pytest.raises(DemoError, match="Encode a picture first"):
        demo.samples(None, 2, 1, 0, 1.0)


# In a browser


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    pytest.importorskip("gradio")
    paths = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if None in paths:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    # No name but this machine's own is found: what the page fetches from elsewhere fails.
    offline = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1500", offline):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    driver = webdriver.Chrome(service=webdriver.ChromeService(paths[1]), options=options)
    yield driver
    driver.quit()


@contextlib.contextmanager
def serving(model, *words):
    """The command in a process of its own; gives the address that it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flowmo", "demo", "--model", str(model), "--port", str(port), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            line = process.stdout.readline()
            assert "FlowMo at http://127.0.0.1:" in line, line
            yield f"http://127.0.0.1:{port}/"
            process.send_signal(signal.SIGINT)
            process.wait(30)
        finally:
            process.kill()


def until(condition, seconds=300):
    """What a condition gives once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(Exception):  # elements come and go while the page draws itself
            found = condition()
            if found:
                return found
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s")


def test_the_page_in_a_browser(browser, tiny, tiny_model, tmp_path, photo, generator_file):
    """Upload, decode, download, compare, sample, edit, generate; then a broken and an oversized upload."""
    pytest.importorskip("constriction")
    tiny_model.with_name("tiny.context.safetensors").write_bytes(peaked(tiny).save())

    def at(selector):
        return browser.find_element("css selector", selector)

    def upload(file):
        field = "#upload input[type=file]"
        if not browser.find_elements("css selector", field):  # taking the last file away brings it back
            at("#upload button[aria-label='Clear']").click()
        until(lambda: browser.find_elements("css selector", field))[0].send_keys(str(file))
        until(lambda: os.path.basename(file).split(".")[0] in at("#upload").text or message())

    def choose(tab):
        tabs = browser.find_elements("css selector", "button[role=tab]")
        next(button for button in tabs if button.text == tab).click()

    def message():
        return " ".join(toast.text for toast in browser.find_elements("css selector", ".toast-body"))

    with serving(tiny_model, "--generator", str(generator_file)) as address:
        browser.get(address)
        until(lambda: at("#run"))
        upload(photo)  # which encodes and decodes it
        metrics = until(lambda: "bytes" in at("#metrics").text and at("#metrics").text)
        assert "70 × 50 pixels" in metrics
        assert "PSNR" in metrics
        size = int(re.search(r"file\s+(\d+) bytes", metrics)[1])
        at("#download").click()
        file = until(lambda: list((tmp_path / "downloads").glob("*.flowmo")))[0]
        content = file.read_bytes()
        assert len(content) == size
        codes = Codec(tiny, peaked(tiny)).unpack(content)
        assert torch.equal(codes.ids, tiny.encode_image(Image.open(photo)).ids)
        until(lambda: len(browser.find_elements("css selector", "#pair img")) >= 2)

        at("#compare").click()
        until(lambda: len(browser.find_elements("css selector", "#others img")) >= 4)
        assert "its least" in at("#peers").text
        for tab, button, result in (
            ("Several samples", "#draw", "#heat img"),
            ("Edit the code", "#change", "#edited img"),
            ("Generate", "#generate", "#generated img"),
        ):
            choose(tab)
            until(lambda button=button: at(button).is_displayed())
            at(button).click()
            until(lambda result=result: at(result))

        broken = tmp_path / "broken.jpg"
        broken.write_bytes(b"\xff\xd8\xff not a picture")
        upload(broken)
        until(lambda: "not an image in a supported format" in message())
        assert at("#metrics").text == "", "what was shown is not of this file"
        oversized = tmp_path / "oversized.png"
        oversized.write_bytes(os.urandom(21 << 20))
        upload(oversized)
        until(lambda: "exceed the maximum" in message())
        upload(photo)
        at("#run").click()
        until(lambda: "70 × 50" in at("#metrics").text), "it goes on"
        fetched = [entry["name"] for entry in browser.execute_script("return performance.getEntriesByType('resource')")]
        assert fetched
        assert all(name.startswith(("http://127.0.0.1:", "blob:", "data:")) for name in fetched), "no other machine"


def test_it_listens_to_this_machine_alone_and_takes_no_large_upload(tiny_model):
    pytest.importorskip("gradio")
    with serving(tiny_model) as address:
        port = int(address.rstrip("/").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        for other in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)}:
            if not other.startswith("127."):
                with pytest.raises(OSError), socket.create_connection((other, port), timeout=5):  # noqa: PT011
                    pass
        upload = urllib.request.Request(
            f"{address}gradio_api/upload",
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--x--\r\n'
            % bytes(21 << 20),
            {"Content-Type": "multipart/form-data; boundary=x"},
        )
        with pytest.raises(OSError, match="413"):
            urllib.request.urlopen(upload, timeout=60)
        taken = [sys.executable, "-m", "flowmo", "demo", "--model", str(tiny_model), "--port", str(port)]
        refused = subprocess.run(taken, capture_output=True, text=True, timeout=120)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert "Cannot serve on" in refused.stderr
