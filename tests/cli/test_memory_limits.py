"""The commands when memory is short: what they say, and the plan that they follow."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from helpers.commands import answer, run
from helpers.paths import TINY_VAE as VAE
from PIL import Image
from safetensors.torch import save_file

import sdconv


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: it reads /proc/meminfo")
def test_too_little_memory_is_refused_with_a_hint(tmp_path: Path) -> None:
    wide = seeded.kl((128, 32, 32, 32), 4, True, layers_per_block=1)
    sdconv.save(seeded.network(wide), tmp_path / "vae.safetensors")
    # the side of a square image for which one layer's input and output exceed the memory
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    side = math.isqrt(memory // (2 * 128 * 8)) // 16 * 16 + 32
    Image.new("1", (side, side)).save(tmp_path / "large.png")
    # two latents, each of half that size
    save_file({"z": torch.zeros(2, 4, side // 8, side // 16)}, tmp_path / "z.safetensors")
    options = ("--dtype", "float64", "-m", tmp_path / "vae.safetensors")
    found = {
        command: run(command, tmp_path / source, *options, *out)
        for command, source, *out in (
            ("decode", "z.safetensors", "-o", tmp_path / "a.png"),
            ("encode", "large.png", "-o", tmp_path / "out.safetensors"),
            ("reconstruct", "large.png", "-o", tmp_path / "a.png"),
            ("features", "large.png", "-o", tmp_path / "maps"),
        )
    }
    for command, result in found.items():
        assert result.exit_code == 2, command
        assert "the image is too large for the free memory" in result.stderr
        assert ("--memory 2GiB, and --spill FOLDER" in result.stderr) == (command != "features")
        assert ("--size" in result.stderr) == (command != "decode")
    # control: in strips it is not refused for this reason
    strips = run("decode", tmp_path / "z.safetensors", *options, "--memory", "1MiB")
    assert "the memory limit cannot be met" in strips.stderr


def test_an_allocation_that_the_system_refuses() -> None:
    result = run("check", VAE, "--size", "99999999x99999999")
    assert result.exit_code == 2
    assert "not enough memory" in result.stderr
    assert "a smaller --size, or compute in a narrower --dtype" in result.stderr
    assert "--memory" not in result.stderr, "an option that it lacks"


def test_decoding_follows_the_plan(tmp_path: Path) -> None:
    def planned(*words: str) -> Any:
        size = ("--size", "32x40", "--no-time")
        return answer("plan", VAE, *size, *words)

    least = planned()["decode"]["least_without_spill"]
    save_file({"z": torch.zeros(1, 4, 4, 5)}, tmp_path / "z.safetensors")
    command = ["decode", tmp_path / "z.safetensors", "-m", VAE]
    command += ["-o", tmp_path / "a.png", "--memory"]
    assert run(*command, least).exit_code == 0
    of_another = planned("--backend", "reference")["decode"]["least_without_spill"]
    for too_little in (least - 1, of_another):
        short = run(*command, too_little, "--force")
        assert short.exit_code == 2 and "the memory limit cannot be met" in short.stderr
