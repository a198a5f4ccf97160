"""The Chromium that browser tests drive: the system's, or Playwright's own. `python tests/browser.py` says where it is."""

import os
import shutil
import sys

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
MISSING = "no Chromium here: install Debian's chromium, or run 'playwright install chromium'"


def find_browser() -> str | None:
    """$PERSONALQ_BROWSER, else the first one on the path, else what Playwright has installed."""
    named = os.environ.get("PERSONALQ_BROWSER")
    found = named or next(filter(None, map(shutil.which, NAMES)), None) or _playwrights()
    return found if found and os.path.exists(found) else None


def _playwrights() -> str | None:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        return playwright.chromium.executable_path


def require_browser() -> str:
    """Where it is. Without one: skip, or fail where CI is set, which must leave nothing out."""
    found = find_browser()
    if found is None and os.environ.get("CI"):
        pytest.fail(MISSING, pytrace=False)
    return found or pytest.skip(MISSING)


if __name__ == "__main__":
    print(find_browser() or sys.exit(MISSING))
