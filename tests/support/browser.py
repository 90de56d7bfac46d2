"""A real browser for tests: Debian's Chromium driven by Playwright, and axe-core's accessibility rules."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")

_ARGUMENTS = [
    "--no-sandbox",  # containers run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE, DESKTOP = (390, 844), (1200, 900)
PATIENCE = 120_000  # milliseconds; machines that run tests are busy


class Watched:
    """A page with its network requests and console errors."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._note)

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.type}: {message.text} ({message.location.get('url', '')})")

    def outside(self, allowed: str) -> list[str]:
        """Requests that are neither inline data nor begin with `allowed`."""
        return [url for url in self.requests if not url.startswith(("data:", "blob:", allowed))]

    def scrolls_sideways(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth"))


@contextmanager
def browser_page(size: tuple[int, int] = DESKTOP, dark: bool = False) -> Iterator[Watched]:
    """A fresh page of a headless browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS, timeout=PATIENCE)
        try:
            page = browser.new_page(
                viewport={"width": size[0], "height": size[1]},
                color_scheme="dark" if dark else "light",
                accept_downloads=True,
            )
            page.set_default_timeout(PATIENCE)
            yield Watched(page)
        finally:
            browser.close()


def violations(page: Page) -> list[tuple[str, str]]:
    """Violations found by axe-core: (rule id, element), one per element."""
    found = Axe().run(page).response["violations"]
    return [(rule["id"], " ".join(map(str, node["target"]))) for rule in found for node in rule["nodes"]]


def open_file(watched: Watched, path: Path) -> None:
    """Open a page from disk and wait until it is idle."""
    watched.page.goto(path.as_uri(), wait_until="load")
