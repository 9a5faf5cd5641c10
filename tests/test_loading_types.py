"""What a type checker says of code that opens a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

USES = """
import sdconv
from sdconv.models.unet import UNet2DConditionModel

reveal_type(sdconv.load("a", "vae"))
reveal_type(sdconv.load("a", component="unet"))
reveal_type(sdconv.load("a"))
unet: UNet2DConditionModel = sdconv.load("a", "unet")
opened: sdconv.AutoencoderTiny = sdconv.AutoencoderTiny.from_pretrained("a")
sdconv.load("a").dtype.is_floating_point
sdconv.load(3)  # the mistake
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where mypy keeps what it knows of sdconv from one test to the next."""
    return tmp_path_factory.mktemp("types")


def checked(code: str, folder: Path) -> str:
    """What ``mypy --strict`` prints for ``code``, with sdconv as an installed package."""
    (folder / "snippet.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "snippet.py"]
    options = {"MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(folder / "cache")}
    ran = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, **options}
    )
    return ran.stdout + ran.stderr


@pytest.mark.slow
def test_the_readmes_first_snippet(folder: Path) -> None:
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert snippet is not None and "sdconv.load(" in snippet[1]
    assert checked(snippet[1], folder).startswith("Success")


@pytest.mark.slow
def test_load_says_what_it_returns(folder: Path) -> None:
    printed = checked(USES, folder)
    revealed = re.findall(r'Revealed type is "sdconv\.models\.(.+?)"', printed)
    assert revealed == ["base.Autoencoder", "unet.UNet2DConditionModel", "base.Network"], printed
    assert re.findall(r"snippet\.py:(\d+): error", printed) == ["11"], printed
