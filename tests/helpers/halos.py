"""Strips that lack a row of what lies beyond them: what every check of strips must notice.

Each of these puts a fault into the shipped code; whatever the strip lacks is zeros instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdconv.fast.cpu import kernels as engines
from sdconv.fast.cpu.tiling import Scratch, Strip
from sdconv.fast.cpu.winograd import Scheme
from sdconv.streaming.layers import SlidingWindow

Fault = Callable[[pytest.MonkeyPatch], None]


def top_of_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every strip takes its first row for the map's."""

    def at_the_top(scheme: Scheme, rows: Tensor, row: int, above: Any, strip: Strip) -> Any:
        own = replace(strip, height=strip.height - strip.first, tile_row=0)
        return scheme, rows[scheme.step * strip.tile_row - row :], 0, None, own

    _loads(monkeypatch, at_the_top)


def bottom_of_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every strip takes its last row for the map's."""

    def at_the_bottom(*given: Any) -> Any:
        *others, strip = given
        return *others, replace(strip, height=strip.end)

    _loads(monkeypatch, at_the_bottom)


def _loads(monkeypatch: pytest.MonkeyPatch, instead: Callable[..., Any]) -> None:
    """``instead``: what a strip is loaded from, of what it should be."""
    engine = engines.of(torch.float32)
    right = engine.load
    monkeypatch.setattr(engine, "load", lambda *given: right(*instead(*given[:5]), *given[5:]))


def a_row_less_above(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are copied: from a row too late."""
    _reads(monkeypatch, lambda strip, first, end: (first + (strip.tile_row > 0), end))


def a_row_less_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are copied: up to a row too early."""
    _reads(monkeypatch, lambda strip, first, end: (first, end - (strip.end < strip.height)))


def _reads(
    monkeypatch: pytest.MonkeyPatch, short: Callable[[Strip, int, int], tuple[int, int]]
) -> None:
    pytest.importorskip("numba", reason="plain operations take what they get for the whole strip")
    right, take = Strip.reads, Scratch.take

    def reads(self: Strip, scheme: Scheme) -> tuple[int, int]:
        return short(self, *right(self, scheme))

    def between_zeros(
        self: Scratch, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        if name != "input":
            return take(self, name, shape, dtype)
        # a kernel reads beyond what was copied
        return torch.zeros(shape[0] + 2, *shape[1:], dtype=dtype)[1:-1]

    monkeypatch.setattr(Strip, "reads", reads)
    monkeypatch.setattr(Scratch, "take", between_zeros)


def window_without_its_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row of a window, which the next window shares, is missing."""
    slide_right = SlidingWindow.slide

    def slide(self: SlidingWindow, first: int, last: int) -> Tensor:
        rows = slide_right(self, first, last).clone()
        rows[-1] = 0
        return rows

    monkeypatch.setattr(SlidingWindow, "slide", slide)


# of rows read where they lie; of rows that are copied first
WHERE_THEY_LIE: tuple[Fault, ...] = (top_of_the_map, bottom_of_the_map)
COPIED: tuple[Fault, ...] = (*WHERE_THEY_LIE, a_row_less_above, a_row_less_below)


def border_rows(fault: Fault, step: int, height: int) -> list[int]:
    """The rows of an output of ``height`` that such a fault spoils, in strips of ``step`` rows."""
    above = fault in (top_of_the_map, a_row_less_above)
    return [start - (not above) for start in range(step, height, step)]
