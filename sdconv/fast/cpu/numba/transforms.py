"""Winograd's two transforms on strips of float32 maps in channels-last order, compiled by Numba.

What they compute is written plainly, in torch's operations, in :mod:`sdconv.fast.cpu.winograd`.
Importing this module compiles the kernels, or reads what an earlier import left in Numba's cache.
"""

from __future__ import annotations

from typing import Any

from sdconv.fast.cpu.numba.dsl import (
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
from sdconv.fast.cpu.winograd import DOUBLED, PLAIN, Scheme

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
# floats of each thread's own memory: for the plain scheme, which takes more
LOAD_SCRATCH = 6 * BLOCK + 6 * (4 * TILES + 2) * BLOCK
STORE_SCRATCH = 28 * BLOCK + 4 * BLOCK

# the schemes' points, as in `sdconv.fast.cpu.winograd`, and what the transforms need of them
_P, _Q, _R = f32(PLAIN.output[1][1]), f32(PLAIN.output[1][3]), f32(DOUBLED.output[1][2])
_PP, _QQ, _RR = _P * _P, _Q * _Q, _R * _R
_PPQQ, _PP_QQ = _PP * _QQ, _PP + _QQ


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
    """Six numbers to six by the plain scheme's ``B^T``, for n channels."""
    a, b, d, e, f, g = at, at + step, at + 2 * step, at + 3 * step, at + 4 * step, at + 5 * step
    for c in range(n):
        out[to + c] = _PPQQ * x[a + c] - _PP_QQ * x[d + c] + x[f + c]
    to += out_step
    for c in range(n):
        out[to + c] = (x[f + c] - _QQ * x[d + c]) + _P * (x[e + c] - _QQ * x[b + c])
    to += out_step
    for c in range(n):
        out[to + c] = (x[f + c] - _QQ * x[d + c]) - _P * (x[e + c] - _QQ * x[b + c])
    to += out_step
    for c in range(n):
        out[to + c] = (x[f + c] - _PP * x[d + c]) + _Q * (x[e + c] - _PP * x[b + c])
    to += out_step
    for c in range(n):
        out[to + c] = (x[f + c] - _PP * x[d + c]) - _Q * (x[e + c] - _PP * x[b + c])
    to += out_step
    for c in range(n):
        out[to + c] = _PPQQ * x[b + c] - _PP_QQ * x[e + c] + x[g + c]


@inner
def _doubled_input_transform(
    out: Any, to: int, out_step: int, x: Any, at: int, step: int, n: int
) -> None:
    """Four numbers to five by the doubled scheme's ``B^T``, for n channels."""
    a, b, d, e = at, at + step, at + 2 * step, at + 3 * step
    for c in range(n):
        out[to + c] = _RR * x[a + c] - (_RR + f32(1)) * x[b + c] + x[d + c]
    to += out_step
    for c in range(n):
        out[to + c] = f32(2) * (x[d + c] - _RR * x[b + c])
    to += out_step
    for c in range(n):
        out[to + c] = (_R + f32(1)) * (x[d + c] - x[b + c])
    to += out_step
    for c in range(n):
        out[to + c] = (_R - f32(1)) * (x[b + c] - x[d + c])
    to += out_step
    for c in range(n):
        out[to + c] = _RR * x[b + c] - (_RR + f32(1)) * x[d + c] + x[e + c]


@inner
def _output_transform(out: Any, to: int, out_step: int, x: Any, at: int, step: int, n: int) -> None:
    """Six numbers to four by the plain scheme's ``A^T``, for n channels."""
    a, b, d, e, f, g = at, at + step, at + 2 * step, at + 3 * step, at + 4 * step, at + 5 * step
    for c in range(n):
        out[to + c] = x[a + c] + (x[b + c] + x[d + c]) + (x[e + c] + x[f + c])
    to += out_step
    for c in range(n):
        out[to + c] = _P * (x[b + c] - x[d + c]) + _Q * (x[e + c] - x[f + c])
    to += out_step
    for c in range(n):
        out[to + c] = _PP * (x[b + c] + x[d + c]) + _QQ * (x[e + c] + x[f + c])
    to += out_step
    for c in range(n):
        odd = _P * _PP * (x[b + c] - x[d + c]) + _Q * _QQ * (x[e + c] - x[f + c])
        out[to + c] = odd + x[g + c]


@inner
def _doubled_output_transform(
    out: Any, to: int, out_step: int, x: Any, at: int, step: int, n: int
) -> None:
    """Five numbers to four by the doubled scheme's ``A^T``, for n channels."""
    a, b, d, e, f = at, at + step, at + 2 * step, at + 3 * step, at + 4 * step
    for c in range(n):
        out[to + c] = x[a + c] + x[b + c] + (x[d + c] + x[e + c])
    to += out_step
    for c in range(n):
        out[to + c] = x[b + c] + _R * (x[d + c] - x[e + c])
    to += out_step
    for c in range(n):
        out[to + c] = x[b + c] + _RR * (x[d + c] + x[e + c])
    to += out_step
    for c in range(n):
        out[to + c] = x[b + c] + _R * _RR * (x[d + c] - x[e + c]) + x[f + c]


def _loading(scheme: Scheme, transform: Any) -> Any:
    """A function that fills a strip's tiles."""
    step, reads, side = scheme.step, scheme.reads, len(scheme.input)
    longest = step * TILES + 2

    @inner
    def loading(pointer: Any) -> None:
        job = carray(pointer, 1)[0]
        x, above, tiles = floats(job.x), floats(job.above), floats(job.tiles)
        scale, shift = floats(job.scale), floats(job.shift)
        scratch = floats(job.scratch + 4 * take(pointer, 1) * job.scratch_size)
        channels, width, columns = job.channels, job.width, job.tile_columns
        plane = job.tile_rows * columns * channels
        chunks = (columns + TILES - 1) // TILES
        first_row = job.tile_row * step - 1
        while True:
            unit = take(pointer, 0)
            if unit >= job.units:
                break
            tile_row = unit // chunks
            first = (unit % chunks) * TILES
            last = min(first + TILES, columns)
            top = first_row + tile_row * step
            for c0 in range(0, channels, BLOCK):
                n = min(BLOCK, channels - c0)
                for j in range((last - first) * step + 2):
                    column = first * step - 1 + j
                    for i in range(reads):
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
                    transform(scratch, (reads + j) * BLOCK, longest * BLOCK, scratch, 0, BLOCK, n)
                for tile in range(first, last):
                    for i in range(side):
                        to = i * side * plane + (tile_row * columns + tile) * channels + c0
                        at = (reads + i * longest + (tile - first) * step) * BLOCK
                        transform(tiles, to, plane, scratch, at, BLOCK, n)

    return loading


def _storing(scheme: Scheme, transform: Any) -> Any:
    """A function that writes a strip's outputs."""
    side = len(scheme.input)

    @inner
    def storing(pointer: Any) -> None:
        job = carray(pointer, 1)[0]
        tiles, bias, residual, out = (
            floats(job.tiles),
            floats(job.bias),
            floats(job.residual),
            floats(job.out),
        )
        mine = job.scratch + 4 * take(pointer, 1) * job.scratch_size
        # float64 first: addresses of them are multiples of 8
        counts, squares = doubles(mine), doubles(mine + 8 * BLOCK)
        scratch, sums = floats(mine + 16 * BLOCK), doubles(job.sums)
        channels, width, columns = job.channels, job.width, job.tile_columns
        plane = job.tile_rows * columns * job.step
        chunks = (columns + TILES - 1) // TILES
        size = channels // job.groups
        # a tile's four rows of outputs, made of as many rows of places
        value = 4 * side
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
                    beside = min(4, width - tile * 4)
                    for j in range(side):
                        to = j * BLOCK
                        transform(scratch, to, side * BLOCK, tiles, at, side * plane, n)
                        at += plane
                    for i in range(min(4, job.height - top)):
                        transform(
                            scratch, value * BLOCK, BLOCK, scratch, i * side * BLOCK, BLOCK, n
                        )
                        pixel = (top + i - job.out_row) * width + tile * 4
                        for j in range(beside):
                            to, made = (pixel + j) * channels + c0, (value + j) * BLOCK
                            if job.residual != 0:
                                by = (pixel + j) * job.residual_step + c0
                                for c in range(n):
                                    out[to + c] = (
                                        scratch[made + c] + bias[c0 + c] + residual[by + c]
                                    )
                            else:
                                for c in range(n):
                                    out[to + c] = scratch[made + c] + bias[c0 + c]
                        count(counts, squares, out, pixel * channels + c0, channels, beside, n)
                gather(sums, unit, job.groups, size, c0, n, counts)

    return storing


_load, _store = _loading(PLAIN, _input_transform), _storing(PLAIN, _output_transform)
_load_doubled = _loading(DOUBLED, _doubled_input_transform)
_store_doubled = _storing(DOUBLED, _doubled_output_transform)


@kernel(LOAD)
def load(pointer: Any) -> None:
    """Normalisation, SiLU and F(4x4,3x3)'s input transform of a strip of tile rows."""
    _load(pointer)


@kernel(STORE)
def store(pointer: Any) -> None:
    """F(4x4,3x3)'s output transform of a strip, bias, residual, and each group's sums."""
    _store(pointer)


@kernel(LOAD)
def load_doubled(pointer: Any) -> None:
    """What `load` does, of the doubled map from the small one."""
    _load_doubled(pointer)


@kernel(STORE)
def store_doubled(pointer: Any) -> None:
    """What `store` does, of a doubled map's places."""
    _store_doubled(pointer)
