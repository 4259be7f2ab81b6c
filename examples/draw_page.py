"""Draws the pictures of the web page in its documentation: starts the page and drives it in a browser without a window.

python examples/draw_page.py docs/pictures

Needs chromium, chromedriver and selenium. Options behind the folder go to ``flowmo demo``; ``--generator FILE`` among
them has the tab for generated pictures drawn too.
"""

import contextlib
import io
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.remote.webelement import WebElement

PHOTO = Path(__file__).parent / "pictures" / "cat.jpg"
PORT = "7861"
SECONDS = 300
TABS = {
    "At equal bytes": ("compare", "#peers tr.own", "page-bytes.jpg"),
    "Several samples": ("draw", "#heat img", "page-samples.jpg"),
    "Edit the code": ("change", "#edited img", "page-edit.jpg"),
    "Generate": ("generate", "#generated img", "page-generate.jpg"),
}
"""Of each tab the button that fills it, what is there when it is full, and the picture."""


def until(condition: Callable[[], Any]) -> Any:
    """What a condition gives once it is true."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(Exception):  # elements come and go while the page draws itself
            found = condition()
            if found:
                return found
        time.sleep(0.2)
    sys.exit(f"the page did not get there within {SECONDS} s")


@contextlib.contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("needs chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1100"):
        options.add_argument(argument)
    driver = webdriver.Chrome(service=webdriver.ChromeService(shutil.which("chromedriver")), options=options)
    try:
        yield driver
    finally:
        driver.quit()


@contextlib.contextmanager
def served(options: list[str]) -> Iterator[str]:
    command = [sys.executable, "-m", "flowmo", "demo", "--port", PORT, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if "FlowMo at" not in process.stdout.readline():
                sys.exit("the page did not start")
            yield f"http://127.0.0.1:{PORT}/"
        finally:
            process.terminate()


def keep(content: bytes, file: Path) -> None:
    """A picture that a browser has taken, smaller than its PNG."""
    with Image.open(io.BytesIO(content)) as picture:
        picture.convert("RGB").save(file, quality=85, optimize=True)


def draw(driver: webdriver.Chrome, address: str, folder: Path) -> None:
    """The page with a photograph, and each of its tabs, full."""

    def at(selector: str) -> WebElement:
        return driver.find_element("css selector", selector)

    def loaded(selector: str) -> bool:
        images = driver.find_elements("css selector", f"{selector} img")
        return all(driver.execute_script("return arguments[0].complete", image) for image in images)

    driver.get(address)
    until(lambda: at("#upload input[type=file]")).send_keys(str(PHOTO))
    until(lambda: "bytes" in at("#metrics").text and at("#pair img") and loaded("#pair"))
    time.sleep(1)  # pictures fade in
    keep(driver.get_screenshot_as_png(), folder / "page.jpg")
    for name, (button, result, file) in TABS.items():
        tabs = [tab for tab in driver.find_elements("css selector", "button[role=tab]") if tab.text == name]
        if not tabs:
            continue
        tabs[0].click()
        until(lambda button=button: at(f"#{button}").is_displayed())
        at(f"#{button}").click()
        until(lambda result=result: at(result) and loaded(".tabs"))
        driver.set_window_size(1200, 2200)  # or the part below the window's edge is missing
        time.sleep(1)
        panel = next(p for p in driver.find_elements("css selector", ".tabs") if p.is_displayed())
        keep(panel.screenshot_as_png, folder / file)
        driver.set_window_size(1200, 1100)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with served(sys.argv[2:]) as where, browser() as chrome:
        draw(chrome, where, target)
