"""The web page: what it does, and that it does so in a real browser without a network."""

import contextlib
import os
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

from flowmo.codec import Codec
from flowmo.demo import MOST_PIXELS, MOST_SAMPLES, DemoError, Page
from flowmo.evaluate.figures import heat_map


@pytest.fixture
def page(tiny, tmp_path):
    (tmp_path / "files").mkdir()
    return Page(tiny, Codec(tiny), tmp_path / "files")


@pytest.fixture
def photo(tmp_path, picture):
    picture.resize((70, 50)).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_reconstruct(page, tiny, photo):
    (original, decoded), facts, file, codes = page.reconstruct(photo, "tile", 2, 5, 1.5)
    assert original.size == decoded.size == (70, 50)
    assert decoded.tobytes() == tiny.decode_image(codes, 2, 5).tobytes()
    with open(file, "rb") as content:
        assert torch.equal(page.codec.unpack(content.read()).ids, codes.ids)
    assert f"**{os.path.getsize(file)} bytes**" in facts
    assert "PSNR" in facts
    (same, again), facts, _, others = page.reconstruct(file, "tile", 2, 5, 1.5)
    assert torch.equal(others.ids, codes.ids)
    assert same.tobytes() == again.tobytes() == decoded.tobytes()
    assert "PSNR" not in facts
    assert page.reconstruct(photo, "crop", 1, 0, 1.0)[0][0].size == (32, 32)


def test_other_codecs(page, photo):
    codes = page.open(photo, "tile")[1]
    shown = page.at_equal_bytes(photo, "tile", codes)
    assert [caption.split(":")[0] for _, caption in shown][:2] == ["JPEG", "WebP"]
    assert all("its least" in caption for _, caption in shown), "36 bytes are too few for any of them"
    assert all(picture.size == (70, 50) for picture, _ in shown)


def test_samples_and_where_they_differ(page, tiny, photo):
    codes = page.open(photo, "tile")[1]
    drawn, heat = page.samples(codes, 3, 1, 7, 1.0)
    assert [caption for _, caption in drawn] == ["seed 7", "seed 8", "seed 9"]
    assert drawn[0][0].tobytes() == tiny.decode_image(codes, 1, 7, guidance=1.0).tobytes()
    assert heat.size == (70, 50)
    assert len(page.samples(codes, 1000, 1, 0, 1.0)[0]) == MOST_SAMPLES


def test_the_heat_maps_colours():
    colours = heat_map(torch.tensor([[0.0, 1.0, 2.0, 4.0]]))
    assert colours.shape == (3, 1, 4)
    assert (colours.sum(dim=0).diff() > 0).all()
    assert colours[:, 0, 0].max() < -0.9
    assert torch.isfinite(heat_map(torch.zeros(2, 2))).all()


def test_edits_change_the_tokens_that_were_named(page, photo):
    codes = page.open(photo, "tile")[1]
    before, after = page.edit(codes, 0, 2, "all bits flipped", 1, 0, 1.0)
    assert before.tobytes() != after.tobytes()
    assert before.tobytes() == page.decode(codes, 1, 0, 1.0).tobytes(), "the codes at hand stay as they are"
    assert page.edit(codes, 2, 0, "all bits flipped", 1, 0, 1.0)[1].tobytes() == after.tobytes()
    assert page.edit(codes, 0, 2, "drawn at random", 1, 0, 1.0)[1].tobytes() != after.tobytes()


def test_what_is_too_large_or_broken_is_refused(page, tmp_path, photo):
    large = tmp_path / "large.png"
    Image.new("1", (MOST_PIXELS // 1000 + 1, 1000)).save(large)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff not a picture")
    code = tmp_path / "code.flowmo"
    code.write_bytes(b"FLM\x02 no code either")
    for file, message in (
        (large, "more than 4,000,000"),
        (broken, "not a picture"),
        (code, "code.flowmo"),
        (None, "choose"),
    ):
        with pytest.raises(DemoError, match=message):
            page.open(file and str(file), "tile")
    with pytest.raises(DemoError, match="encode a picture first"):
        page.samples(None, 2, 1, 0, 1.0)


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


def until(condition, seconds=90):
    """What a condition gives once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(Exception):  # elements come and go while the page draws itself
            found = condition()
            if found:
                return found
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s")


def test_the_page_in_a_browser(browser, tiny, tiny_model, tmp_path, photo):
    """Upload, decode, download, edit, sample; then a broken and an oversized upload."""
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

    with serving(tiny_model) as address:
        browser.get(address)
        until(lambda: at("#run"))
        upload(photo)
        at("#run").click()
        facts = until(lambda: "bytes" in at("#facts").text and at("#facts").text)
        assert "70 × 50 pixels" in facts
        assert "PSNR" in facts
        size = int(facts.split(" bytes")[0])
        at("#download").click()
        file = until(lambda: list((tmp_path / "downloads").glob("*.flowmo")))[0]
        content = file.read_bytes()
        assert len(content) == size
        codes = Codec(tiny, peaked(tiny)).unpack(content)
        assert torch.equal(codes.ids, tiny.encode_image(Image.open(photo)).ids)
        until(lambda: len(browser.find_elements("css selector", "#pair img")) >= 2)

        at("#compare").click()
        until(lambda: len(browser.find_elements("css selector", "#others img")) >= 2)
        for tab, button, result in (
            ("Several samples", "#draw", "#heat img"),
            ("Edit the code", "#change", "#edited img"),
        ):
            choose(tab)
            until(lambda button=button: at(button).is_displayed())
            at(button).click()
            until(lambda result=result: at(result))

        broken = tmp_path / "broken.jpg"
        broken.write_bytes(b"\xff\xd8\xff not a picture")
        upload(broken)
        at("#run").click()
        until(lambda: "not a picture that can be read" in message())
        oversized = tmp_path / "oversized.png"
        oversized.write_bytes(os.urandom(21 << 20))
        upload(oversized)
        until(lambda: "exceed the maximum" in message())
        upload(photo)
        at("#run").click()
        until(lambda: "70 × 50" in at("#facts").text), "it goes on"


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
        assert "cannot serve on" in refused.stderr
