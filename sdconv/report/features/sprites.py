"""Sprite sheets: many small images in one WebP, within a number of bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdconv.features.rendering import Pixels

LARGEST = 16383
"""The largest side of a WebP in pixels."""

LOSSLESS_SIDE = 32
"""Tiles with sides up to this are encoded losslessly if they fit: in few pixels, losses show."""

QUALITIES = (80, 60, 40, 25)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """``count`` tiles of one size, row by row in ``columns``, in one WebP."""

    data: bytes
    count: int
    columns: int
    width: int
    height: int


def tile_grid(tiles: Pixels) -> tuple[Pixels, int]:
    """Tiles ``(N, h, w)`` or ``(N, h, w, 3)`` in one image that is about square, and its number of
    columns; unused cells are black."""
    count, height, width = tiles.shape[:3]
    columns = max(1, min(count, round(math.sqrt(count * height / width)), LARGEST // width))
    rows = -(-count // columns)
    room = np.zeros((rows * columns, *tiles.shape[1:]), np.uint8)
    room[:count] = tiles
    grid = room.reshape(rows, columns, height, width, *tiles.shape[3:]).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, *tiles.shape[3:]), columns


def sheet_of(versions: Iterable[Pixels], allowed: int) -> Sheet:
    """The first version of the tiles, in the best quality, that fits into ``allowed`` bytes; the
    last and coarsest if none does.

    Args:
        versions: the same tiles, from large to small; iterated only as far as needed.
        allowed: bytes.
    """
    found: Sheet | None = None
    for tiles in versions:
        image, columns = tile_grid(tiles)
        lossless = max(tiles.shape[1:3]) <= LOSSLESS_SIDE
        for quality in (None, *QUALITIES) if lossless else QUALITIES:
            found = Sheet(
                data=webp(image, quality),
                count=len(tiles),
                columns=columns,
                width=tiles.shape[2],
                height=tiles.shape[1],
            )
            if len(found.data) <= allowed:
                return found
    assert found is not None
    return found


def webp(image: Pixels, quality: int | None) -> bytes:
    """An image ``(H, W)`` or ``(H, W, 3)`` as WebP, lossless if ``quality`` is None."""
    file = io.BytesIO()
    options = {"lossless": True, "quality": 30} if quality is None else {"quality": quality}
    Image.fromarray(image).convert("RGB").save(file, "WEBP", method=2, **options)
    return file.getvalue()
