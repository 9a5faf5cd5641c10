"""Winograd's products with a weight that is transformed as it is read, by Numba.

A transformed weight has four times as many values as the weight. With few tiles, reading it takes
longer than the products do. Here each panel of output channels transforms the kernels of a few
input channels at a time, which stay in a core's own cache while they are multiplied, so that only
the weight itself is read, and nothing is kept from call to call.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sdconv.fast.cpu.numba.dsl import atomic_next, carray, copy, floats, inner, job, kernel
from sdconv.fast.cpu.numba.gemm import PANEL, ROWS, VECTORS, block
from sdconv.fast.cpu.numba.packing import (
    CHANNELS,
    PACK_SCRATCH,
    PLANE,
    TAPS,
    pack,
    transform,
)
from sdconv.fast.cpu.numba.sixteen_bits import size_of
from sdconv.fast.cpu.numba.vectors import LINE, prefetch
from sdconv.fast.cpu.tiling import MULTIPLE
from sdconv.fast.cpu.winograd import CONV3X3, UPSAMPLE_CONV, Scheme

# dtype: of the weight's numbers
PRODUCTS = job(
    *("rows", "chunk", "channels", "columns", "width", "dtype"),
    *("a", "a_step", "block", "b", "start", "out", "out_step"),
)


@cache
def scratch_size(rows: int) -> int:
    """Floats of scratch memory for each thread, with units of ``rows`` tiles."""
    return PACK_SCRATCH + CONV3X3.positions * rows * PANEL


_rows_6, _rows_4, _rows_2, _rows_1 = (block(rows, VECTORS) for rows in (ROWS, 4, 2, 1))


@inner
def _multiply(
    start: int,
    start_step: int,
    a: int,
    a_row: int,
    b: Any,
    depth: int,
    out: int,
    step: int,
    rows: int,
) -> None:
    """Adds the products of some rows with a panel to ``start``, as `block` does."""
    row = 0
    while row < rows:
        left, begin = floats(a + 4 * row * a_row), floats(start + 4 * row * start_step)
        to = floats(out + 4 * row * step)
        if rows - row >= ROWS:
            _rows_6(begin, start_step, left, a_row, 1, b, depth, to, step)
            row += ROWS
        elif rows - row >= 4:
            _rows_4(begin, start_step, left, a_row, 1, b, depth, to, step)
            row += 4
        elif rows - row >= 2:
            _rows_2(begin, start_step, left, a_row, 1, b, depth, to, step)
            row += 2
        else:
            _rows_1(begin, start_step, left, a_row, 1, b, depth, to, step)
            row += 1


def _kernel(scheme: Scheme) -> Any:
    """Makes the kernel of a scheme. A unit is a panel of ``chunk`` tiles, of all positions.

    ``a_step``: from one position's tiles to the next; ``block``: from one block of channels."""
    positions, transformed = scheme.positions, transform(scheme, exact=False)

    @inner
    def body(pointer: Any) -> None:
        job = carray(pointer, 1)[0]
        taps = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
        kernels = taps + 4 * TAPS * CHANNELS * PANEL
        sums = kernels + 4 * positions * PLANE
        channels, width, panels = job.channels, job.width, job.columns // PANEL
        number = size_of(job.dtype)
        while True:
            unit = atomic_next(pointer, 0)
            if unit >= job.units:
                break
            column, first = unit % panels * PANEL, unit // panels * job.chunk
            rows = min(job.chunk, job.rows - first)
            for c in range(0, channels, CHANNELS):
                weight = job.b + number * TAPS * (column * channels + c)
                pack(weight, job.dtype, TAPS * channels, PANEL, TAPS * CHANNELS, taps)
                transformed(floats(taps), floats(kernels), CHANNELS)
                at = c // MULTIPLE * job.block + c % MULTIPLE + first * MULTIPLE
                for position in range(positions):
                    a = job.a + 4 * (at + position * job.a_step)
                    for row in range(PANEL):  # a line of each row of the next weights
                        ahead = row * channels + CHANNELS
                        prefetch(weight + number * (TAPS * ahead + position * LINE))
                    b = floats(kernels + 4 * position * PLANE)
                    to = sums + 4 * position * rows * PANEL
                    if c == 0:
                        _multiply(job.start, 0, a, MULTIPLE, b, CHANNELS, to, PANEL, rows)
                    else:
                        _multiply(to, PANEL, a, MULTIPLE, b, CHANNELS, to, PANEL, rows)
            out, made = floats(job.out), floats(sums)
            for position in range(positions):
                for row in range(rows):
                    to = position * job.out_step + (first + row) * width + column
                    copy(out, to, made, (position * rows + row) * PANEL, PANEL)

    return body


_body, _upsample_body = _kernel(CONV3X3), _kernel(UPSAMPLE_CONV)


@kernel(PRODUCTS)
def products(pointer: Any) -> None:
    """Tiles ``(channels / 64, 36, rows, 64)`` times the kernels of a weight ``(columns, channels,
    3, 3)``, transformed by CONV3X3, into ``(36, rows, width)``."""
    _body(pointer)


@kernel(PRODUCTS)
def upsample_products(pointer: Any) -> None:
    """`products` by UPSAMPLE_CONV, with 25 tile positions."""
    _upsample_body(pointer)
