"""The examples run and show what their docstrings say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT
from PIL import Image

EXAMPLES = ROOT / "examples"
LINES = 60


def run(name: str, *arguments: object) -> str:
    """The output of an example."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_they_are_short_and_say_what_you_see(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LINES
    assert text.startswith('"""')
    assert "ou see" in " ".join(text.split()) or path.stem == "tiny_pipeline"


def test_load_any_checkpoint() -> None:
    lines = run("load_any_checkpoint").splitlines()
    assert len(lines) == 3
    assert len({line.split(maxsplit=1)[1] for line in lines}) == 1, "not the same network"


@pytest.mark.slow
def test_load_any_checkpoint_reports_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a checkpoint")
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "load_any_checkpoint.py", path], capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert "broken.safetensors" in ran.stderr


@pytest.mark.slow
def test_reconstruct(tmp_path: Path) -> None:
    printed = run("reconstruct", "--size", 64, "--out", tmp_path / "r.png")
    assert printed.startswith("12288 numbers in the image, 256 in its latents\n")
    assert opened(tmp_path / "r.png").width > 3 * 64


@pytest.mark.slow
def test_patch_a_pipeline() -> None:
    printed = run("patch_a_pipeline", "--steps", 2, "--size", 64)
    assert int(re.findall(r"replaced (\d+) blocks", printed)[0]) > 40
    assert "the same with the patch: True\nthe same after it: True\n" in printed


@pytest.mark.slow
def test_look_inside(tmp_path: Path) -> None:
    printed = run("look_inside", "--steps", 2, "--size", 64, "--out", tmp_path / "m.png")
    assert printed.count(": 2 feature maps, timesteps 999 to 499, (1, 3, ") == 3
    assert opened(tmp_path / "m.png").size == (2 * 128, 3 * 128)


@pytest.mark.slow
def test_edit_while_it_runs(tmp_path: Path) -> None:
    printed = run("edit_while_it_runs", "--steps", 2, "--size", 64, "--out", tmp_path / "e.png")
    assert "plain again after the edits: True\n" in printed
    sheet = opened(tmp_path / "e.png")
    plain, *edited = (sheet.crop((64 * i, 0, 64 * (i + 1), 64)) for i in range(3))
    assert all(image.tobytes() != plain.tobytes() for image in edited)
