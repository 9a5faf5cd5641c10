"""Times of the explainer in headless Chromium: until it opens, the first pass through its network,
and from a channel's change to the changed picture.

    python -m scripts.bench.explainer            # seconds, the median of five
    python -m scripts.bench.explainer --times 9 --json

It needs playwright with Chromium. The load of the machine is printed too: the page computes on all
cores, so only the seconds of an idle machine say something.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sdconv.report.explainer.page import write_explainer

POINTS = [
    "encoder.conv_in",
    "encoder.down_blocks.1.resnets.0",
    "latents",
    "decoder.mid_block.resnets.1",
    "decoder.up_blocks.2.resnets.0",
    "decoder.up_blocks.3.resnets.2",
]
READY = "document.documentElement.dataset.ready === 'true'"
IDLE = "explainer.vae.version > 0 && !explainer.vae.running"

CHANGE = """async ([point, factor]) => {
    const { vae } = explainer, from = performance.now();
    await vae.compute({ edits: { [point]: { 1: factor } } });
    await vae.planes("decoder.conv_out", [0, 1, 2]);
    return (performance.now() - from) / 1000;
}"""
"""Seconds until everything after a changed channel is computed and the picture is there to draw."""


def wait(page: Any, condition: str) -> None:
    """Wait until a condition holds; it is polled, because the page forbids ``eval``."""
    end = time.monotonic() + 120
    while not page.evaluate(condition):
        if time.monotonic() > end:
            raise SystemExit(f"this never came about: {condition}")
        page.wait_for_timeout(10)


def measure(times: int) -> dict[str, float]:
    """Seconds by what took them."""
    from playwright.sync_api import sync_playwright

    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "explainer.html"
        write_explainer(path)
        # the sandbox cannot be set up by root
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page()
        start = time.monotonic()
        page.goto(f"{path.as_uri()}#vae")
        wait(page, READY)
        took["opens"] = time.monotonic() - start
        wait(page, IDLE)
        took["encode and decode 256x256, first time"] = page.evaluate("explainer.vae.seconds")
        page.wait_for_timeout(1500)  # until the compiler's second, faster code is ready
        for point in POINTS:
            seconds = []
            for turn in range(times):
                wait(page, IDLE)
                page.wait_for_timeout(300)  # the page has drawn
                seconds.append(page.evaluate(CHANGE, [point, turn / 2]))
            took[f"a changed channel of {point}"] = statistics.median(seconds)
        browser.close()
    return took


def main() -> None:
    """Measure, and print seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--times", type=int, default=5, help="changes of each channel")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    took = measure(options.times)
    load = os.getloadavg()[0]
    if options.json:
        print(json.dumps({"seconds": took, "cores": os.cpu_count(), "load": load}))
        return
    for what, seconds in took.items():
        print(f"{what:<60} {seconds:6.2f} s")
    print(f"{os.cpu_count()} cores, load {load:.1f}")


if __name__ == "__main__":
    main()
