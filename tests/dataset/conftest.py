"""A network that encodes small images in milliseconds, images for it, and a data set of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import seeded
from helpers.datasets import SMALL
from helpers.photos import files_of, photos, spoil

import sdconv
from sdconv import dataset


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


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 22 images, and some that cannot be read."""
    folder = photos(tmp_path_factory.mktemp("source") / "photos", 22)
    spoil(folder)
    return folder


@pytest.fixture(scope="session")
def whole(source: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run over ``source``."""
    out = tmp_path_factory.mktemp("whole") / "out"
    dataset.encode(source, vae, out, options=SMALL)
    return files_of(out)
