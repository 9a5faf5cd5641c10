"""How many files of sdconv a reader has to open to follow one call."""

from __future__ import annotations

import sys
from types import FrameType

import pytest
import torch
from helpers.paths import ROOT, TINY_VAE

import sdconv


def files_run_by_decode(backend: str) -> set[str]:
    """The files of sdconv that run code during a second ``vae.decode``."""
    vae = sdconv.load(TINY_VAE, backend=backend, dtype=torch.float32)
    latents = torch.randn(1, vae.config["latent_channels"], 32, 32)
    files = set()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and "<" not in frame.f_code.co_filename:
            files.add(frame.f_code.co_filename)

    package = str(ROOT / "sdconv")
    with torch.no_grad():
        vae.decode(latents)
        sys.setprofile(profile)
        try:
            vae.decode(latents)
        finally:
            sys.setprofile(None)
    return {file.removeprefix(package) for file in files if file.startswith(package)}


@pytest.mark.parametrize(("backend", "most"), [("reference", 6), ("fast", 15)])
def test_few_files_run_in_a_decode(backend: str, most: int) -> None:
    files = files_run_by_decode(backend)
    assert len(files) <= most, sorted(files)
