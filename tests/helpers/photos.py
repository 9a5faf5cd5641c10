"""Folders of small images for data sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

BAD = {
    "cut.jpg": "damaged",
    "empty.png": "empty",
    "moving.gif": "animated",
    "text.jpg": "not an image",
}
"""What ``spoil`` writes, and the reason for which each file is left out."""


def pixels(seed: int, rows: int = 20, columns: int = 24) -> np.ndarray:
    """A smooth image, ``(rows, columns, 3)``, uint8."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return np.asarray(small.resize((columns, rows), Image.Resampling.BICUBIC))


def write(path: Path, seed: int, rows: int = 20, columns: int = 24) -> Path:
    """An image file, always with the same date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, rows, columns)).save(path)
    os.utime(path, (1e9, 1e9))
    return path


def photos(folder: Path, count: int, start: int = 0) -> Path:
    """A folder of images of several sizes, in two folders and two formats."""
    for number in range(start, start + count):
        name = f"{'cats/' if number % 2 else ''}photo{number:02d}.{'jpg' if number % 3 else 'png'}"
        write(folder / name, number, 18 + number % 5, 20 + number % 7)
    return folder


def spoil(folder: Path) -> None:
    """Writes images that cannot be encoded: those of ``BAD``."""
    good = write(folder / "cut.jpg", 99, 64, 64).read_bytes()
    (folder / "cut.jpg").write_bytes(good[: len(good) * 4 // 5])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"not an image at all")
    frames = [Image.fromarray(pixels(seed)) for seed in (1, 2)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    for name in BAD:
        os.utime(folder / name, (1e9, 1e9))


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file in a folder, by its path."""

    def found() -> Iterator[tuple[str, bytes]]:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                yield str(path.relative_to(folder)), path.read_bytes()

    return dict(found())
