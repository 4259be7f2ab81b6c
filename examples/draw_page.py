"""Draws the pictures of the web page in its documentation: drives the page in a browser without a window.

python examples/draw_page.py ADDRESS docs/pictures

ADDRESS is where ``flowmo demo`` or a static page is served. Needs chromium, chromedriver and selenium.
"""

import io
import shutil
import sys
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

PHOTO = Path(__file__).parent / "pictures" / "cat.jpg"
SECONDS = 600
SECTIONS = {"codecs": "compare", "samples": "draw"}
"""Of each section what it fills, and the button that does it."""


def browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("needs chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1100"):
        options.add_argument(argument)
    driver = webdriver.Chrome(service=webdriver.ChromeService(shutil.which("chromedriver")), options=options)
    driver.set_script_timeout(SECONDS)
    return driver


def keep(content: bytes, file: Path) -> None:
    """Write a screenshot as a JPEG, which is smaller than its PNG."""
    with Image.open(io.BytesIO(content)) as picture:
        picture.convert("RGB").save(file, quality=85, optimize=True)


def draw(driver: webdriver.Chrome, address: str, folder: Path) -> None:
    """The page with a photograph, its sections, and the page on a phone."""

    def wait(script: str) -> None:
        WebDriverWait(driver, SECONDS).until(lambda _: driver.execute_script(f"return {script}"))
        time.sleep(1)  # images of the page load

    driver.get(address)
    wait("document.body.dataset.ready")
    driver.find_element("id", "file").send_keys(str(PHOTO))
    wait("document.getElementById('facts').children.length && !document.body.dataset.busy")
    keep(driver.get_screenshot_as_png(), folder / "page.jpg")
    for name, button in SECTIONS.items():
        driver.execute_script("document.querySelectorAll('#more details').forEach(d => d.open = false)")
        driver.execute_script("document.getElementById(arguments[0]).closest('details').open = true", button)
        driver.find_element("id", button).click()
        wait(f"document.getElementById('{name}').children.length && !document.body.dataset.busy")
        driver.set_window_size(1200, 2200)  # or the part below the window's edge is missing
        keep(driver.find_element("id", "more").screenshot_as_png, folder / f"page-{name}.jpg")
        driver.set_window_size(1200, 1100)
    driver.execute_script("document.querySelectorAll('#more details').forEach(d => d.open = false)")
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    time.sleep(1)
    keep(driver.get_screenshot_as_png(), folder / "page-phone.jpg")


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    chrome = browser()
    try:
        draw(chrome, sys.argv[1], target)
    finally:
        chrome.quit()
