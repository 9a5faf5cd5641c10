"""A network that encodes small images in milliseconds, and images for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import seeded
from helpers.photos import photos

import sdconv


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a VAE whose latents are a quarter as wide as its images."""
    config = seeded.kl((32, 32, 32), 4, True, layers_per_block=1, scaling_factor=0.5)
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    sdconv.save(seeded.network(config), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of nine images."""
    return photos(tmp_path / "photos", 9)
