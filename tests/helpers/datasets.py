"""Small data sets: what they hold, and what each image alone gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.photos import files_of
from PIL import Image
from torch import Tensor

import sdconv
from sdconv import dataset
from sdconv.dataset import Options
from sdconv.images import read_image, to_tensor

SMALL = Options(size="16", shard_size=4)


def assert_same(out: Path, whole: dict[str, bytes]) -> None:
    """A folder has these files, and no others."""
    found = files_of(out)
    assert sorted(found) == sorted(whole)
    assert [name for name in whole if found[name] != whole[name]] == []


def latents_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The stored tensors of each key."""
    found = dataset.open_latents(folder)
    return {found.keys[n]: dict(found.sample(n).tensors) for n in range(len(found))}


def one_by_one(vae: Path, folder: Path, path: str, mirrored: bool = False) -> Any:
    """The posterior of an image of 16 rows, by diffusers' own calls."""
    network = sdconv.load(vae)
    image = read_image(folder / path).image
    rows, columns = image.height, image.width
    factor = max(16 / rows, 16 / columns)
    size = (max(16, int(columns * factor + 0.5)), max(16, int(rows * factor + 0.5)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
    x = to_tensor(image.crop((left, top, left + 16, top + 16)))
    with torch.inference_mode():
        return network.encode(x.flip(3) if mirrored else x).latent_dist
