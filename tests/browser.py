"""The web page in headless Chromium, and a web server for its static folder."""

import contextlib
import functools
import http.server
import shutil
import threading
import time

import numpy as np
import pytest


def until(condition, seconds=300):
    """What a condition gives once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(Exception):  # elements come and go while the page draws itself
            found = condition()
            if found:
                return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s")


class Page:
    """The page in headless Chromium, which finds no machine but this one."""

    def __init__(self, downloads):
        webdriver = pytest.importorskip("selenium.webdriver")
        paths = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
        if None in paths:
            pytest.skip("needs chromium and chromedriver")
        options = webdriver.ChromeOptions()
        options.binary_location = paths[0]
        offline = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--window-size=1200,1500",
            offline,
        ):
            options.add_argument(argument)
        several = {"profile.default_content_setting_values.automatic_downloads": 1}
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads), **several})
        self.downloads = downloads
        self.browser = webdriver.Chrome(service=webdriver.ChromeService(paths[1]), options=options)

    def at(self, selector):
        return self.browser.find_element("css selector", selector)

    def text(self, selector):
        return self.at(selector).get_property("textContent")

    def do(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def ready(self):
        until(lambda: self.do("return document.body.dataset.ready"))

    def idle(self):
        until(lambda: self.do("return document.body.dataset.busy") is None)

    def visit(self, address):
        self.browser.get(address)
        self.ready()

    def open(self, file):
        """Choose a file and wait until it is shown or refused."""
        self.do("document.getElementById('details').replaceChildren()")
        self.at("#file").send_keys(str(file))
        until(lambda: self.text("#details") or self.at("#message.error").is_displayed())
        self.idle()
        return self.text("#details"), self.text("#message")

    def set(self, name, value, event="change"):
        self.do(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event(arguments[2], {bubbles: true}))",
            *(name, value, event),
        )
        if event == "input":
            time.sleep(0.3)  # the page waits for the next move of a slider
        self.idle()

    def click(self, name):
        self.do("document.getElementById(arguments[0]).click()", name)
        self.idle()

    def save(self, button, name):
        self.click(button)
        return until(lambda: (self.downloads / name).exists() and self.downloads / name)

    def shown(self):
        """The decoded pixels on the page."""
        self.idle()
        width, height, data = self.do(
            "const c = document.getElementById('decoded');"
            "return [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"
        )
        return np.array(data, np.int16).reshape(height, width, 4)[..., :3]


@contextlib.contextmanager
def static(folder, answers=lambda request: False):
    """Any web server: Python's own, unless ``answers`` has answered a request itself."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if not answers(self):
                super().do_GET()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def pixels(image):
    return np.asarray(image, np.int16)
