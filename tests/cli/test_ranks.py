"""--ranks: one image over the processes that torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import answer, run
from helpers.paths import ROOT, TINY_VAE, WEIGHTS
from PIL import Image
from safetensors.torch import load_file, save_file

from sdconv.cli import running
from sdconv.models.vae import AutoencoderKL

PHOTO = WEIGHTS / "photo.jpg"


def torchrun(folder: Path, *arguments: object, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """A command over ranks of one thread each, in ``folder``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "sdconv", *map(str, arguments), "--ranks"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("command", "source", "out"), [
    ("decode", "z.safetensors", "out.png"), ("encode", PHOTO, "out.safetensors"),
])  # fmt: skip
def test_without_torchrun(command: str, source: Any, out: str, tmp_path: Path) -> None:
    save_file({"z": torch.zeros(1, 4, 4, 4)}, tmp_path / "z.safetensors")
    result = run(command, tmp_path / source, "-m", TINY_VAE, "-o", tmp_path / out, "--ranks")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--ranks: there are no other processes" in result.stderr
    assert "hint: start the command with torchrun --nproc-per-node N" in result.stderr


@pytest.mark.slow
def test_two_ranks_make_the_same_files(tmp_path: Path) -> None:
    encode = ("encode", PHOTO, "-m", TINY_VAE, "--size", "96x80")
    answer(*encode, "-o", tmp_path / "alone.safetensors")
    ran = torchrun(tmp_path, *encode, "-o", "z.safetensors", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["shape"] == [1, 4, 12, 10], "the first rank speaks alone"
    latents, alone = (
        load_file(tmp_path / name)["latents"] for name in ("z.safetensors", "alone.safetensors")
    )
    assert (latents - alone).abs().max() < 1e-4 * alone.abs().max()

    decode = ("decode", tmp_path / "z.safetensors", "-m", TINY_VAE)
    answer(*decode, "-o", tmp_path / "alone.png")
    ran = torchrun(tmp_path, *decode, "-o", "out.png")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "out.png: 80x96 from raw latents\n"
    pixels, expected = (
        np.asarray(Image.open(tmp_path / name), dtype=int) for name in ("out.png", "alone.png")
    )
    assert abs(pixels - expected).max() <= 1

    ran = torchrun(tmp_path, *decode, "-o", "out.png")
    assert ran.returncode != 0
    assert "out.png: exists already, and is not overwritten" in ran.stderr
    save_file({"z": torch.zeros(1, 4, 2, 9)}, tmp_path / "few.safetensors")
    ran = torchrun(tmp_path, "decode", "few.safetensors", "-m", TINY_VAE, "-o", "more.png", ranks=3)
    assert ran.returncode != 0
    assert ran.stderr.count("error: --ranks: more ranks than rows") == 1, "the first rank says it"
    assert not (tmp_path / "more.png").exists()


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan"])
def test_a_timeout_is_a_number_of_seconds(seconds: str, tmp_path: Path) -> None:
    save_file({"z": torch.zeros(1, 4, 4, 4)}, tmp_path / "z.safetensors")
    decode = ("decode", tmp_path / "z.safetensors", "-m", TINY_VAE, "-o", tmp_path / "z.png")
    result = run(*decode, "--ranks", "--timeout", seconds)
    assert result.exit_code != 0
    assert "--timeout: not a number of seconds to wait" in result.stderr


def test_the_timeout_reaches_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without other processes: what would connect to them tells what it was called with."""
    given: list[object] = []

    def join(device: str, timeout: float) -> str:
        given.append(timeout)
        return device

    monkeypatch.setattr(running, "join_ranks", join)
    monkeypatch.setattr(
        AutoencoderKL, "enable_parallel", lambda self, **how: given.append(how["timeout"])
    )
    save_file({"z": torch.zeros(1, 4, 4, 4)}, tmp_path / "z.safetensors")
    decode = ("decode", tmp_path / "z.safetensors", "-m", TINY_VAE, "--ranks")
    for number, (more, seconds) in enumerate([((), 60.0), (("--timeout", "600"), 600.0)]):
        result = run(*decode, "-o", tmp_path / f"{number}.png", *more)
        assert result.exit_code == 0, result.stderr
        assert given == [seconds, seconds]
        given.clear()
