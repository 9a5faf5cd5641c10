"""Takes the documentation's screenshot of the page that `sdconv features` writes.

    python -m scripts.docs.screenshot            # docs/screens/page.webp
    python -m scripts.docs.screenshot --out FILE.webp

The page shows the photo in the small U-Net at ten timesteps. Needs chromium and playwright.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "weights"
VIEW = "#map=up_blocks.2.resnets.0&step=8&sort=variance"
SIZE = {"width": 1400, "height": 860}


def write_page(folder: Path) -> Path:
    """Runs the command; returns the page that it writes."""
    models = [
        "--model",
        WEIGHTS / "tiny-unet.safetensors",
        "--vae",
        WEIGHTS / "tiny-vae.safetensors",
    ]
    command = [sys.executable, "-m", "sdconv", "features", WEIGHTS / "photo.jpg", *models]
    subprocess.run([*command, "--out", folder], check=True)
    return folder / "report.html"


def screenshot(page: Path) -> Image.Image:
    """The page, opened at ``VIEW``."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = browser.new_page(viewport=SIZE, color_scheme="light")
        tab.goto(page.as_uri() + VIEW)
        tab.wait_for_selector("html[data-shown] .tile")
        png = tab.screenshot()
        browser.close()
    return Image.open(io.BytesIO(png)).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "screens" / "page.webp")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        image = screenshot(write_page(Path(folder) / "maps"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    image.save(args.out, quality=70, method=6)
    print(args.out)


if __name__ == "__main__":
    main()
