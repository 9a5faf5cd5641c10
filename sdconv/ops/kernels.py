"""Winograd's two transforms on strips of float32 maps in channels-last order, compiled by Numba.

What they compute is written plainly, in torch's operations, in :mod:`sdconv.ops.winograd`.
Importing this module compiles the kernels, or reads what an earlier import left in Numba's cache.
"""

from __future__ import annotations

from typing import Any

from sdconv.ops.compiled import (
    BLOCK,
    carray,
    clear,
    copy,
    count,
    doubles,
    exp,
    f32,
    floats,
    gather,
    inner,
    job,
    kernel,
    take,
    zero,
)

_STRIP = ("height", "width", "channels", "tile_row", "tile_rows", "tile_columns")
LOAD = job(*_STRIP, "x", "x_row", "above", "scale", "shift", "silu", "tiles")
STORE = job(
    *_STRIP,
    "step",
    "tiles",
    "bias",
    "residual",
    "residual_step",
    "out",
    "out_row",
    "groups",
    "sums",
)

# tiles beside one another in a unit of work
TILES = 8
_COLUMNS = 4 * TILES + 2
# floats of each thread's own memory
LOAD_SCRATCH = 6 * BLOCK + 6 * _COLUMNS * BLOCK
STORE_SCRATCH = 28 * BLOCK + 4 * BLOCK


@inner
def _normalise(out: Any, to: int, x: Any, at: int, scale: Any, shift: Any, c0: int, n: int) -> None:
    for c in range(n):
        out[to + c] = x[at + c] * scale[c0 + c] + shift[c0 + c]


@inner
def _silu(x: Any, at: int, n: int) -> None:
    """``x / (1 + exp(-x))`` in place."""
    for c in range(n):
        y = x[at + c]
        x[at + c] = y / (f32(1.0) + exp(-y))


@inner
def _input_transform(out: Any, to: int, out_step: int, x: Any, at: int, step: int, n: int) -> None:
    """Six numbers to six by F(4,3)'s ``B^T``, for n channels."""
    a, b, d, e, f, g = at, at + step, at + 2 * step, at + 3 * step, at + 4 * step, at + 5 * step
    for c in range(n):
        out[to + c] = f32(4) * x[a + c] - f32(5) * x[d + c] + x[f + c]
    to += out_step
    for c in range(n):
        out[to + c] = (x[f + c] - f32(4) * x[d + c]) + (x[e + c] - f32(4) * x[b + c])
    to += out_step
    for c in range(n):
        out[to + c] = (x[f + c] - f32(4) * x[d + c]) - (x[e + c] - f32(4) * x[b + c])
    to += out_step
    for c in range(n):
        out[to + c] = (x[f + c] - x[d + c]) + f32(2) * (x[e + c] - x[b + c])
    to += out_step
    for c in range(n):
        out[to + c] = (x[f + c] - x[d + c]) - f32(2) * (x[e + c] - x[b + c])
    to += out_step
    for c in range(n):
        out[to + c] = f32(4) * x[b + c] - f32(5) * x[e + c] + x[g + c]


@inner
def _output_transform(out: Any, to: int, out_step: int, x: Any, at: int, step: int, n: int) -> None:
    """Six numbers to four by F(4,3)'s ``A^T``, for n channels."""
    a, b, d, e, f, g = at, at + step, at + 2 * step, at + 3 * step, at + 4 * step, at + 5 * step
    for c in range(n):
        out[to + c] = x[a + c] + (x[b + c] + x[d + c]) + (x[e + c] + x[f + c])
    to += out_step
    for c in range(n):
        out[to + c] = (x[b + c] - x[d + c]) + f32(2) * (x[e + c] - x[f + c])
    to += out_step
    for c in range(n):
        out[to + c] = (x[b + c] + x[d + c]) + f32(4) * (x[e + c] + x[f + c])
    to += out_step
    for c in range(n):
        out[to + c] = (x[b + c] - x[d + c]) + f32(8) * (x[e + c] - x[f + c]) + x[g + c]


@kernel(LOAD)
def load(pointer: Any) -> None:
    """Normalisation, SiLU and F(4x4,3x3)'s input transform of a strip of tile rows."""
    job = carray(pointer, 1)[0]
    x, above, tiles = floats(job.x), floats(job.above), floats(job.tiles)
    scale, shift = floats(job.scale), floats(job.shift)
    scratch = floats(job.scratch + 4 * take(pointer, 1) * job.scratch_size)
    channels, width, columns = job.channels, job.width, job.tile_columns
    plane = job.tile_rows * columns * channels
    chunks = (columns + TILES - 1) // TILES
    first_row = job.tile_row * 4 - 1
    while True:
        unit = take(pointer, 0)
        if unit >= job.units:
            break
        tile_row = unit // chunks
        first = (unit % chunks) * TILES
        last = min(first + TILES, columns)
        top = first_row + tile_row * 4
        for c0 in range(0, channels, BLOCK):
            n = min(BLOCK, channels - c0)
            for j in range((last - first) * 4 + 2):
                column = first * 4 - 1 + j
                for i in range(6):
                    row = top + i
                    if row < 0 or row >= job.height or column < 0 or column >= width:
                        zero(scratch, i * BLOCK, n)
                        continue
                    source, at = x, ((row - job.x_row) * width + column) * channels + c0
                    if row == first_row and job.above != 0:
                        source, at = above, column * channels + c0
                    if job.scale != 0:
                        _normalise(scratch, i * BLOCK, source, at, scale, shift, c0, n)
                        if job.silu != 0:
                            _silu(scratch, i * BLOCK, n)
                    else:
                        copy(scratch, i * BLOCK, source, at, n)
                _input_transform(scratch, (6 + j) * BLOCK, _COLUMNS * BLOCK, scratch, 0, BLOCK, n)
            for tile in range(first, last):
                for i in range(6):
                    _input_transform(
                        tiles,
                        i * 6 * plane + (tile_row * columns + tile) * channels + c0,
                        plane,
                        scratch,
                        (6 + i * _COLUMNS + (tile - first) * 4) * BLOCK,
                        BLOCK,
                        n,
                    )


@kernel(STORE)
def store(pointer: Any) -> None:
    """F(4x4,3x3)'s output transform of a strip, bias, residual, and each group's sums."""
    job = carray(pointer, 1)[0]
    tiles, bias, residual, out = (
        floats(job.tiles),
        floats(job.bias),
        floats(job.residual),
        floats(job.out),
    )
    mine = job.scratch + 4 * take(pointer, 1) * job.scratch_size
    # float64 first: addresses of them are multiples of 8
    counts, squares, scratch = doubles(mine), doubles(mine + 8 * BLOCK), floats(mine + 16 * BLOCK)
    sums = doubles(job.sums)
    channels, width, columns = job.channels, job.width, job.tile_columns
    plane = job.tile_rows * columns * job.step
    chunks = (columns + TILES - 1) // TILES
    size = channels // job.groups
    clear(counts, 0, 2 * BLOCK)
    while True:
        unit = take(pointer, 0)
        if unit >= job.units:
            break
        clear(sums, 2 * unit * job.groups, 2 * job.groups)
        tile_row = unit // chunks
        first = (unit % chunks) * TILES
        top = (job.tile_row + tile_row) * 4
        for c0 in range(0, channels, BLOCK):
            n = min(BLOCK, channels - c0)
            for tile in range(first, min(first + TILES, columns)):
                at = (tile_row * columns + tile) * job.step + c0
                for j in range(6):
                    _output_transform(
                        scratch, j * BLOCK, 6 * BLOCK, tiles, j * plane + at, 6 * plane, n
                    )
                for i in range(min(4, job.height - top)):
                    _output_transform(scratch, 24 * BLOCK, BLOCK, scratch, i * 6 * BLOCK, BLOCK, n)
                    beside = min(4, width - tile * 4)
                    for j in range(beside):
                        pixel = (top + i - job.out_row) * width + tile * 4 + j
                        to, value = pixel * channels + c0, (24 + j) * BLOCK
                        if job.residual != 0:
                            at = pixel * job.residual_step + c0
                            for c in range(n):
                                out[to + c] = scratch[value + c] + bias[c0 + c] + residual[at + c]
                        else:
                            for c in range(n):
                                out[to + c] = scratch[value + c] + bias[c0 + c]
                    pixel = (top + i - job.out_row) * width + tile * 4
                    count(counts, squares, out, pixel * channels + c0, channels, beside, n)
            gather(sums, unit, job.groups, size, c0, n, counts)
