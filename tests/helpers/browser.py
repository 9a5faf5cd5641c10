"""A page in headless Chromium: its console, its requests, and waiting without ``eval``."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # the sandbox cannot be set up by root
        started = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        yield started
        started.close()


class Tab:
    """A file in a tab, with its console messages and its requests; ``script`` runs before it."""

    def __init__(
        self, browser: Any, path: Path, fragment: str = "", script: str = "", **options: Any
    ) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(
            **{"viewport": {"width": 1300, "height": 900}, **options}
        )
        self.context.set_default_timeout(60_000)
        if script:
            self.context.add_init_script(script)
        self.page = self.context.new_page()
        self.page.on("console", lambda said: self.messages.append(said.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri() + fragment)

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Wait until a condition holds; it is polled, because pages forbid ``eval``."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, f"{condition}; console: {self.messages}"
            self.page.wait_for_timeout(20)
