"""Matrix products of float32 by Numba: most of the fast backend's arithmetic.

The innermost loop is written in LLVM vectors, because a loop over scalars does not keep a block of
the output in registers: ROWS rows and up to PANEL columns stay there while the rows of the right
factor are multiplied in one after another. The right factor is packed into panels of PANEL columns
beforehand, so that it is read in one stream.

The idea is that of Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication".
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from numba import types

from sdconv.fast.cpu.numba.dsl import atomic_next, carray, floats, inner, int64s, job, kernel, llvm
from sdconv.fast.cpu.numba.vectors import LANES, VectorCode

# order: numbers of the items' right factors; 0 where each has its own
BMM = job("rows", "depth", "width", "a", "a_step", "b", "order", "start", "out", "out_step")

# vectors in a panel: with ROWS, as many as the registers hold
VECTORS = 4 if LANES == 16 else 2
PANEL = LANES * VECTORS
ROWS = 6
# rows of the left factor in a unit of work: they stay in a core's own cache
CHUNK = 40 * ROWS
# what sums begin with where nothing is added
ZEROS = torch.zeros(PANEL, dtype=torch.float32, device="cpu")


@cache
def padded(columns: int) -> int:
    """The number of columns that are written for so many columns of the output."""
    return -(-columns // LANES) * LANES


def block(rows: int, vectors: int, *, zero: bool = False, ahead: bool = False) -> Any:
    """Makes a function that computes a block of the output, ``rows`` high and ``vectors`` vectors
    wide.

    ``out[r, v] = start[r, v] + sum over k < depth of a[r, k] * b[k, v]``: the sum first, so that
    its rounding does not grow with ``start``, which may be ``out``. Rows of ``start`` and
    ``out`` are ``start_step`` and ``step`` numbers apart, rows and columns of ``a`` are ``a_row``
    and ``a_column`` apart; ``b`` is a packed panel. With ``zero``, ``start`` is not read and counts
    as 0. With ``ahead``, the rows of ``a`` that the next block reads are brought into the cache
    meanwhile; rows must be contiguous, or nothing is gained.
    """

    def fill(
        typing_context: Any,
        start: Any,
        start_step: Any,
        a: Any,
        a_row: Any,
        a_column: Any,
        b: Any,
        depth: Any,
        out: Any,
        step: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            start = (None, None) if zero else args[:2]
            _Code(builder).block(rows, vectors, ahead, *start, *args[2:])
            return context.get_dummy_value()

        given = (start, start_step, a, a_row, a_column, b, depth, out, step)
        return types.void(*given), codegen

    return llvm(fill)


class _Code(VectorCode):
    """Writes the LLVM code of a block."""

    def block(
        self,
        rows: int,
        vectors: int,
        ahead: bool,
        start: Any,
        start_step: Any,
        a: Any,
        a_row: Any,
        a_column: Any,
        b: Any,
        depth: Any,
        out: Any,
        out_step: Any,
    ) -> None:
        """Writes the body of the function that `block` makes."""
        builder, integer = self.builder, depth.type
        cells = [(r, v) for r in range(rows) for v in range(vectors)]

        def step(k: Any, sums: list[Any]) -> list[Any]:
            if ahead:
                below = builder.mul(builder.add(a_row, k), integer(rows))
                self.prefetch(self.at(a, below))
            from_b = builder.mul(k, integer(vectors * LANES))
            right = [self.load(b, from_b, v * LANES) for v in range(vectors)]
            column = builder.mul(k, a_column)
            left = [
                self.broadcast(self.at(a, builder.mul(a_row, integer(r)), column))
                for r in range(rows)
            ]
            return [
                builder.call(self.fma, [left[r], right[v], total])
                for (r, v), total in zip(cells, sums, strict=True)
            ]

        totals = self.loop(integer(0), depth, [self.constant(0.0)] * len(cells), step)
        for (r, v), total in zip(cells, totals, strict=True):
            if start is not None:
                begin = self.load(start, builder.mul(start_step, integer(r)), v * LANES)
                total = builder.fadd(begin, total)
            self.store(total, out, builder.mul(out_step, integer(r)), v * LANES)


def _panel(vectors: int) -> Any:
    """Makes a function that computes some rows of the output, in one panel's columns."""
    several, one = block(ROWS, vectors, ahead=True), block(1, vectors)

    @inner
    def panel(start: int, a: int, b: int, out: int, depth: int, width: int, rows: int) -> None:
        begin, right = floats(start), floats(b)
        if rows < ROWS:
            for row in range(rows):
                to = floats(out + 4 * row * width)
                one(begin, 0, floats(a + 4 * row * depth), depth, 1, right, depth, to, width)
            return
        for first in range(0, rows, ROWS):
            # the last block ends with the last row and overlaps the block before
            row = min(first, rows - ROWS)
            to = floats(out + 4 * row * width)
            several(begin, 0, floats(a + 4 * row * depth), depth, 1, right, depth, to, width)

    return panel


_panel_of_1, _panel_of_2, _panel_of_3, _whole_panel = (
    _panel(vectors) for vectors in (1, 2, 3, VECTORS)
)


@inner
def multiply(
    start: int, a: int, b: int, out: int, depth: int, width: int, rows: int, vectors: int
) -> None:
    """Computes some rows in one panel's columns; ``vectors`` vectors or more are left."""
    if vectors >= VECTORS:
        _whole_panel(start, a, b, out, depth, width, rows)
    elif vectors == 3:
        _panel_of_3(start, a, b, out, depth, width, rows)
    elif vectors == 2:
        _panel_of_2(start, a, b, out, depth, width, rows)
    else:
        _panel_of_1(start, a, b, out, depth, width, rows)


@kernel(BMM)
def bmm(pointer: Any) -> None:
    """Batched product of ``(rows, depth)`` and packed ``(depth, width)``. A unit is a panel of a
    chunk of rows. ``start``: a panel of zeros. ``a_step``, ``out_step``: from item to item."""
    job = carray(pointer, 1)[0]
    atomic_next(pointer, 1)
    depth, width, order = job.depth, job.width, int64s(job.order)
    panels = (width + PANEL - 1) // PANEL
    chunks = (job.rows + CHUNK - 1) // CHUNK
    while True:
        unit = atomic_next(pointer, 0)
        if unit >= job.units:
            break
        column = unit % panels * PANEL
        item = unit // panels // chunks
        row = unit // panels % chunks * CHUNK
        a = job.a + 4 * (item * job.a_step + row * depth)
        right = order[item] if job.order != 0 else item
        b = job.b + 4 * (right * width + column) * depth
        out = job.out + 4 * (item * job.out_step + row * width + column)
        rows = min(CHUNK, job.rows - row)
        multiply(job.start, a, b, out, depth, width, rows, (width - column) // LANES)
