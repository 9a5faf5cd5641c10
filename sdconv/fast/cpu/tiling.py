"""Maps in strips of rows: the geometry, rows as float32 in channels-last order, and working memory.

Rows are ``(rows, W, C)``, one picture at a time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdconv.fast.cpu.winograd import OUTPUTS, Scheme

# bytes of working memory that a strip takes at least and at most: few enough for a cache, enough
# for a matrix product to have rows to work on
LEAST_BYTES, MOST_BYTES = 4 << 20, 24 << 20


def strip_bytes(weight: int) -> int:
    """Bytes of working memory for a strip, by those of the prepared weight. A large weight, which
    no cache keeps, is read anew for every strip; beside a small one a small strip stays in it."""
    return min(max(LEAST_BYTES, 2 * weight), MOST_BYTES)


@dataclass(frozen=True)
class Strip:
    """Tile rows ``tile_row`` to ``tile_row + tile_rows`` of an output of ``height`` x ``width``."""

    height: int
    width: int
    tile_row: int
    tile_rows: int

    @property
    def tile_columns(self) -> int:
        return -(-self.width // OUTPUTS)

    @property
    def tiles(self) -> int:
        return self.tile_rows * self.tile_columns

    @property
    def first(self) -> int:
        """The first row that it gives."""
        return OUTPUTS * self.tile_row

    @property
    def end(self) -> int:
        """The row after the last that it gives."""
        return min(self.first + OUTPUTS * self.tile_rows, self.height)

    def reads(self, scheme: Scheme) -> tuple[int, int]:
        """The input's rows, from and up to, that it is made of."""
        height = self.height * scheme.step // OUTPUTS
        first = scheme.step * self.tile_row
        return max(first - 1, 0), min(first + scheme.step * self.tile_rows + 1, height)


def strips(height: int, width: int, tiles: int, tile_rows: int | None) -> Iterator[Strip]:
    """A map's strips, from above: as many tile rows in each as are asked for, or with about so many
    tiles, in strips of about one size."""
    whole = Strip(height, width, 0, -(-height // OUTPUTS))
    fitting = max(1, tiles // whole.tile_columns)
    step = tile_rows or -(-whole.tile_rows // -(-whole.tile_rows // fitting))
    for row in range(0, whole.tile_rows, step):
        yield Strip(height, width, row, min(step, whole.tile_rows - row))


def dense_rows(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """One map ``(C, H, W)`` as rows without copying, if that is how it lies in memory."""
    rows = x.permute(1, 2, 0)
    return rows if x.dtype is dtype and rows.is_contiguous() else None


class Scratch(threading.local):
    """Working memory that a thread's calls hand on, so that the system does not clear it anew for
    each."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        # what was taken last of each
        self._taken: dict[str, tuple[tuple[int, ...], torch.dtype, Tensor]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of that shape with anything in it; the last one of that name is given up."""
        taken = self._taken.get(name)
        if taken is not None and taken[0] == shape and taken[1] is dtype:
            return taken[2]
        size = dtype.itemsize * math.prod(shape)
        made = self.block(name, size)[:size].view(dtype).view(shape)
        self._taken[name] = (shape, dtype, made)
        return made

    def block(self, name: str, size: int) -> Tensor:
        """So many bytes or more; the last ones of that name are given up."""
        held = self._held.get(name)
        if held is None or len(held) < size:
            with torch.inference_mode(False):
                held = self._held[name] = torch.empty(size, dtype=torch.uint8)
        return held

    def release(self) -> None:
        """Frees this thread's."""
        self._held.clear()
        self._taken.clear()


scratch = Scratch()
