"""The loops round the products of a doubled convolution, on strips of float32 maps in channels-last
order, compiled by Numba.

What they compute is written plainly, in torch's operations, in :mod:`sdconv.ops.doubling`.
"""

from __future__ import annotations

from typing import Any

from sdconv.ops.compiled import (
    BLOCK,
    carray,
    clear,
    count,
    doubles,
    f32,
    floats,
    gather,
    inner,
    job,
    kernel,
    take,
)

DIFFERENCES = job(
    "height", "width", "channels", "row", "rows", "x", "x_row", "across", "down", "both"
)
MEET = job(
    "width", "channels", "step", "plain", "across", "down", "both", "bias", "out", "groups", "sums"
)
# pixels beside one another in a unit of work
PIXELS = 16
MEET_SCRATCH = 4 * BLOCK


@inner
def _minus(out: Any, to: int, x: Any, a: int, has_a: bool, b: int, has_b: bool, n: int) -> None:
    """``x[a] - x[b]`` for n channels, 0 for a pixel outside the map."""
    if has_a and has_b:
        for c in range(n):
            out[to + c] = x[a + c] - x[b + c]
    elif has_a:
        for c in range(n):
            out[to + c] = x[a + c]
    elif has_b:
        for c in range(n):
            out[to + c] = -x[b + c]
    else:
        for c in range(n):
            out[to + c] = f32(0)


@kernel(DIFFERENCES)
def differences(pointer: Any) -> None:
    """Differences of each pixel to the one before it, along rows, along columns, and along both.

    A unit is a row: ``across`` has a strip's rows, ``down`` and ``both`` one row more.
    """
    job = carray(pointer, 1)[0]
    x, across, down, both = (
        floats(job.x),
        floats(job.across),
        floats(job.down),
        floats(job.both),
    )
    take(pointer, 1)
    height, width, n = job.height, job.width, job.channels
    while True:
        unit = take(pointer, 0)
        if unit >= job.units:
            break
        row = job.row + unit
        here = row < height
        before = row > 0
        at = (row - job.x_row) * width * n
        for column in range(width + 1):
            a, b = at + column * n, at + (column - 1) * n
            has_a, has_b = column < width, column > 0
            if unit < job.rows:
                to = (unit * (width + 1) + column) * n
                _minus(across, to, x, a, has_a, b, has_b, n)
            if column < width:
                _minus(down, (unit * width + column) * n, x, a, here, a - width * n, before, n)
            to = (unit * (width + 1) + column) * n
            _minus(both, to, x, a, here and has_a, b, here and has_b, n)
            if before and column < width:
                for c in range(n):
                    both[to + c] -= x[a - width * n + c]
            if before and column > 0:
                for c in range(n):
                    both[to + c] += x[b - width * n + c]


@kernel(MEET)
def meet(pointer: Any) -> None:
    """Adds up what belongs to each pixel of the doubled strip, its bias, and each group's sums."""
    job = carray(pointer, 1)[0]
    plain, across, down, both = (
        floats(job.plain),
        floats(job.across),
        floats(job.down),
        floats(job.both),
    )
    bias, out, sums = floats(job.bias), floats(job.out), doubles(job.sums)
    mine = job.scratch + 4 * take(pointer, 1) * job.scratch_size
    counts, squares = doubles(mine), doubles(mine + 8 * BLOCK)
    width, channels, step = job.width, job.channels, job.step
    size = channels // job.groups
    chunks = (width + PIXELS - 1) // PIXELS
    clear(counts, 0, 2 * BLOCK)
    while True:
        unit = take(pointer, 0)
        if unit >= job.units:
            break
        clear(sums, 2 * unit * job.groups, 2 * job.groups)
        row = unit // chunks
        first = (unit % chunks) * PIXELS
        for c0 in range(0, channels, BLOCK):
            n = min(BLOCK, channels - c0)
            for column in range(first, min(first + PIXELS, width)):
                p = (row * width + column) * step + c0
                for i in range(2):
                    d = (((row + i) * width + column) * 2 + i) * step + c0
                    for j in range(2):
                        a = ((row * (width + 1) + column + j) * 2 + j) * step + c0
                        e = ((row + i) * (width + 1) + column + j) * 4 + 2 * i + j
                        e = e * step + c0
                        to = ((2 * row + i) * 2 * width + 2 * column + j) * channels + c0
                        for c in range(n):
                            out[to + c] = (plain[p + c] + across[a + c]) + (
                                down[d + c] + both[e + c] + bias[c0 + c]
                            )
            pixels = 2 * (min(first + PIXELS, width) - first)
            for i in range(2):
                at = ((2 * row + i) * 2 * width + 2 * first) * channels + c0
                count(counts, squares, out, at, channels, pixels, n)
            gather(sums, unit, job.groups, size, c0, n, counts)
