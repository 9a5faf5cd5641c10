"""Makes the documentation's picture of the page that `sdconv features` writes.

    python -m scripts.docs.screenshot            # docs/screens/page.webp
    python -m scripts.docs.screenshot --out FILE.webp

The photo goes through the small U-Net at ten timesteps; the page is opened in chromium, which has
to be installed, and playwright.
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


def written(folder: Path) -> Path:
    """The page, made by the command."""
    models = [
        "--model",
        WEIGHTS / "tiny-unet.safetensors",
        "--vae",
        WEIGHTS / "tiny-vae.safetensors",
    ]
    command = [sys.executable, "-m", "sdconv", "features", WEIGHTS / "photo.jpg", *models]
    subprocess.run([*command, "--out", folder], check=True)
    return folder / "report.html"


def photographed(page: Path) -> Image.Image:
    """The page as it opens at ``VIEW``."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = browser.new_page(viewport=SIZE, color_scheme="light")
        tab.goto(page.as_uri() + VIEW)
        tab.wait_for_selector("html[data-shown] .tile")
        picture = tab.screenshot()
        browser.close()
    return Image.open(io.BytesIO(picture)).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "screens" / "page.webp")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        picture = photographed(written(Path(folder) / "maps"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.out, quality=70, method=6)
    print(args.out)


if __name__ == "__main__":
    main()
