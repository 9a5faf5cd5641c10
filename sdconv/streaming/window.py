"""The rows of a map that a strip needs, as they are needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdconv.streaming.arena import zeros


class Window:
    """Rows of a map, prepared, with zeros outside the map.

    Each row is prepared once: those that two strips share are carried from one to the next, which
    also lets a step write over the map that it reads.

    Args:
        source: the map, ``(H, W, C)``. rows: at most, of a strip. right: columns of zeros there.
        prepare: called with rows of the map and where to put them. device: of the window.
    """

    def __init__(
        self,
        source: Tensor,
        rows: int,
        right: int,
        prepare: Callable[[Tensor, Tensor], None],
        device: torch.device,
    ) -> None:
        self._source, self._prepare = source, prepare
        self._height, self._width, channels = source.shape
        self._buffer = zeros((rows, self._width + right, channels), source.dtype, device)
        self._first = self._last = -rows

    def slide(self, first: int, last: int) -> Tensor:
        """Rows ``first`` up to ``last``, no earlier than those before."""
        kept = max(0, self._last - first)
        if kept:
            start = first - self._first
            self._buffer[:kept] = self._buffer[start : start + kept].clone()
        strip = self._buffer[: last - first]
        top, bottom = max(first + kept, 0), min(last, self._height)
        if top < bottom:
            strip[kept : top - first] = 0
            rows = self._source[top:bottom].to(self._buffer.device)
            self._prepare(rows, strip[top - first : bottom - first, : self._width])
        strip[max(bottom - first, kept) :] = 0
        self._first, self._last = first, last
        return strip
