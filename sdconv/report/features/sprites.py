"""Many small pictures in one: sheets in WebP that keep within so many bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdconv.report.features.pictures import Pixels

LARGEST = 16383
"""Pixels of either side of a WebP."""

EXACT = 32
"""Tiles with no longer side than this are kept exactly: in so few pixels, losses show."""

QUALITIES = (80, 60, 40, 25)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """``count`` tiles of one size, row by row in ``columns``, in one WebP."""

    data: bytes
    count: int
    columns: int
    width: int
    height: int


def arranged(tiles: Pixels) -> tuple[Pixels, int]:
    """``(N, h, w)`` or ``(N, h, w, 3)`` as one picture, about as high as wide, and its number of
    columns; what is left over is black."""
    count, height, width = tiles.shape[:3]
    columns = max(1, min(count, round(math.sqrt(count * height / width)), LARGEST // width))
    rows = -(-count // columns)
    room = np.zeros((rows * columns, *tiles.shape[1:]), np.uint8)
    room[:count] = tiles
    grid = room.reshape(rows, columns, height, width, *tiles.shape[3:]).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, *tiles.shape[3:]), columns


def sheet_of(versions: Iterable[Pixels], allowed: int) -> Sheet:
    """The first version of the tiles, in the best quality, that takes no more than ``allowed``
    bytes; the last and coarsest if none does.

    Args:
        versions: the same tiles, from large to small; made as they are asked for.
        allowed: bytes.
    """
    found: Sheet | None = None
    for tiles in versions:
        picture, columns = arranged(tiles)
        exact = max(tiles.shape[1:3]) <= EXACT
        for quality in (None, *QUALITIES) if exact else QUALITIES:
            found = Sheet(
                data=webp(picture, quality),
                count=len(tiles),
                columns=columns,
                width=tiles.shape[2],
                height=tiles.shape[1],
            )
            if len(found.data) <= allowed:
                return found
    assert found is not None
    return found


def webp(picture: Pixels, quality: int | None) -> bytes:
    """A picture ``(H, W)`` or ``(H, W, 3)`` in WebP, exactly if ``quality`` is None."""
    file = io.BytesIO()
    options = {"lossless": True, "quality": 30} if quality is None else {"quality": quality}
    Image.fromarray(picture).convert("RGB").save(file, "WEBP", method=2, **options)
    return file.getvalue()
