"""Pictures of the page for docs/server.md: `python tools/screenshots.py URL docs/images`, against a running server.

The repository must have dogs that only a question tells apart, as the gallery has, and the first of them an unquantised
bundle too (`personalq export biscuit-the-dog --spec fp16`).
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

MILLISECONDS = 300_000
SEED = "729831221"  # the same picture each time


def main() -> None:
    """Drive the page once and keep four pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    browser = os.environ.get("PERSONALQ_BROWSER") or shutil.which("chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(MILLISECONDS)
        page.goto(arguments.url)
        draw(page, arguments.out)
        browse(page, arguments.out)
        opened.close()
    for file in arguments.out.glob("page_*.png"):
        Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


def draw(page: Any, out: Path) -> None:
    """A request, its question, its picture beside the unquantised one."""
    page.wait_for_selector("#examples button")
    page.click("details.more summary")
    page.fill("#seed", SEED)
    page.click("details.more summary")
    page.fill("#request", "my dog on the beach")
    page.keyboard.press("Enter")
    page.wait_for_selector("#question:not([hidden])")
    page.screenshot(path=out / "page_question.png")
    page.keyboard.press("Enter")
    page.wait_for_selector("#caption:not([hidden])")
    page.click("#compare")
    page.wait_for_selector("#reveal-box:not([hidden])")
    page.screenshot(path=out / "page_picture.png")


def browse(page: Any, out: Path) -> None:
    """The repository with contact sheets, and the engines that they left in memory."""
    page.click("nav [data-view=repository]")
    for count in range(1, 5):
        page.locator(".sheet button").first.click()
        page.locator(".sheet.is-four").nth(count - 1).wait_for()
    page.screenshot(path=out / "page_repository.png")
    page.click("nav [data-view=engines]")
    page.wait_for_selector("#resident tr")
    page.wait_for_timeout(2500)
    page.screenshot(path=out / "page_engines.png")


if __name__ == "__main__":
    main()
