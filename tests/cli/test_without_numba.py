"""Without Numba, the commands use the reference backend and say how to get the fast one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.commands import run
from helpers.paths import ROOT, WEIGHTS
from safetensors.torch import load_file

from sdconv.cli.common import Backend
from sdconv.cli.running import image_backend
from sdconv.fast.cpu import kernels

VAE, PHOTO = WEIGHTS / "tiny-vae.safetensors", WEIGHTS / "photo.jpg"
NOTE = "note: without Numba, the reference backend computes this"
HIDDEN = "import sys; sys.modules['numba'] = None; from sdconv.cli import main; main()"


@pytest.fixture
def no_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Numba is not installed."""
    for function in (kernels.numba_kernels, kernels.kernels_for, kernels.methods_for):
        function.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    yield
    for function in (kernels.numba_kernels, kernels.kernels_for, kernels.methods_for):
        function.cache_clear()


def encoded(folder: Path, name: str, *options: str) -> tuple[bytes, list[str]]:
    """The bits of the latents that a command writes, and what it says about Numba."""
    out = folder / f"{name}.safetensors"
    result = run("encode", PHOTO, "-m", VAE, "--size", "64", "-o", out, *options)
    assert result.exit_code == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if "resized" not in line]
    return load_file(out)["latents"].numpy().tobytes(), said


@pytest.mark.usefixtures("no_numba")
def test_the_reference_is_the_default(tmp_path: Path) -> None:
    default, said = encoded(tmp_path, "default")
    assert len(said) == 1 and said[0].startswith(NOTE)
    assert "pip install 'sdconv[fast]'" in said[0]
    assert encoded(tmp_path, "reference", "--backend", "reference") == (default, [])
    fast, silent = encoded(tmp_path, "fast", "--backend", "fast")
    assert silent == [] and fast != default, "fast is computed if it is asked for"
    assert encoded(tmp_path, "quiet", "--quiet") == (default, [])
    assert "fast" not in run("plan", "--size", "64", "--no-time", "--json").stdout
    # CUDA needs no Numba
    assert image_backend(None, "cuda:0") is Backend.fast


def test_with_numba_fast_is_the_default(tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="the kernels need numba: pip install 'sdconv[fast]'")
    default, said = encoded(tmp_path, "default")
    assert said == []
    assert default == encoded(tmp_path, "fast", "--backend", "fast")[0]
    assert default != encoded(tmp_path, "reference", "--backend", "reference")[0]


@pytest.mark.slow
def test_a_process_without_numba(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    command = ["reconstruct", str(PHOTO), "-m", str(VAE), "--size", "64", "-o", str(out)]
    ran = subprocess.run(
        [sys.executable, "-c", HIDDEN, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(os.environ),
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert NOTE in ran.stderr and out.is_file()
