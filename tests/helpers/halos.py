"""Faults injected into strips, which every check of strips must notice: a strip lacks a row beyond
its edge, and reads zeros instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdconv.fast.cpu import conv
from sdconv.fast.cpu.buffer_pool import Scratch
from sdconv.fast.cpu.kernels import kernels_for
from sdconv.fast.cpu.tiling import Bands, Strip
from sdconv.fast.cpu.winograd import OUTPUT_TILE, Scheme
from sdconv.streaming.layers import SlidingWindow

Fault = Callable[[pytest.MonkeyPatch], None]


@contextmanager
def strips_of(tile_rows: int | None) -> Iterator[None]:
    """Replaces the division into strips by one into this many tile rows each, which threads share;
    None keeps it."""

    def divided(scheme: Scheme, height: int, width: int, *_: int) -> list[Strip]:
        assert tile_rows is not None
        whole = -(-height // OUTPUT_TILE)
        return [
            Strip(scheme, height, width, row, min(tile_rows, whole - row))
            for row in range(0, whole, tile_rows)
        ]

    with pytest.MonkeyPatch.context() as patch:
        if tile_rows is not None:
            patch.setattr(conv, "strips", divided)
            patch.setattr(conv, "bands", lambda *_: None)
        yield


@contextmanager
def bands_of(count: int, tile_rows: int) -> Iterator[None]:
    """Threads work on so many bands (no more than tile rows), in strips of this many tile rows,
    whatever the weight's size."""

    def divided(whole: Strip, *_: int) -> Bands:
        return Bands(min(count, whole.tile_rows), tile_rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "bands", divided)
        yield


def top_of_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every strip treats its first row as the feature map's."""

    def at_the_top(strip: Strip, rows: Tensor, row: int, above: Any) -> Any:
        own = replace(strip, height=strip.height - strip.first, tile_row=0)
        return own, rows[strip.scheme.step * strip.tile_row - row :], 0, None

    _transform_instead(monkeypatch, at_the_top)


def bottom_of_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every strip treats its last row as the feature map's."""

    def at_the_bottom(strip: Strip, *others: Any) -> Any:
        return replace(strip, height=strip.end), *others

    _transform_instead(monkeypatch, at_the_bottom)


def _transform_instead(monkeypatch: pytest.MonkeyPatch, instead: Callable[..., Any]) -> None:
    """Passes the input transform what ``instead`` makes of a strip, its rows and the row above."""
    kernels = kernels_for(torch.float32)
    right = kernels.input_transform
    monkeypatch.setattr(
        kernels, "input_transform", lambda *given: right(*instead(*given[:4]), *given[4:])
    )


def a_row_less_above(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are copied: from a row too late."""
    _copy_fewer(monkeypatch, lambda strip, first, end: (first + (strip.tile_row > 0), end))


def a_row_less_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are copied: up to a row too early."""
    _copy_fewer(monkeypatch, lambda strip, first, end: (first, end - (strip.end < strip.height)))


def _copy_fewer(
    monkeypatch: pytest.MonkeyPatch, short: Callable[[Strip, int, int], tuple[int, int]]
) -> None:
    pytest.importorskip("numba", reason="torch's kernels take given rows for the whole strip")
    right, take = Strip.input_rows.func, Scratch.take

    def input_rows(self: Strip) -> tuple[int, int]:
        return short(self, *right(self))

    def between_zeros(
        self: Scratch, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        if name != "input":
            return take(self, name, shape, dtype)
        # a kernel reads beyond the rows copied
        return torch.zeros(shape[0] + 2, *shape[1:], dtype=dtype)[1:-1]

    monkeypatch.setattr(Strip, "input_rows", property(input_rows))
    monkeypatch.setattr(Scratch, "take", between_zeros)


def window_without_its_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window lacks its last row, which is also the next window's first."""
    slide_right = SlidingWindow.slide

    def slide(self: SlidingWindow, first: int, last: int) -> Tensor:
        rows = slide_right(self, first, last).clone()
        rows[-1] = 0
        return rows

    monkeypatch.setattr(SlidingWindow, "slide", slide)


# for rows that are read in place; for rows that are copied first
IN_PLACE: tuple[Fault, ...] = (top_of_the_map, bottom_of_the_map)
COPIED: tuple[Fault, ...] = (*IN_PLACE, a_row_less_above, a_row_less_below)


def border_rows(fault: Fault, step: int, height: int) -> list[int]:
    """The rows that such a fault spoils of an output of ``height`` in strips of ``step`` rows."""
    above = fault in (top_of_the_map, a_row_less_above)
    return [start - (not above) for start in range(step, height, step)]
