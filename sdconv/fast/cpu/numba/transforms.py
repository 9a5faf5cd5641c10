"""Winograd's input and output transforms by Numba, on strips of rows in float32, channels last.

:mod:`sdconv.fast.cpu.winograd` computes the same in torch operations. Importing this module
compiles the kernels, or reads them from Numba's cache.
"""

from __future__ import annotations

from math import inf
from typing import Any

from sdconv.fast.cpu.numba.dsl import (
    BLOCK,
    accumulate,
    atomic_next,
    carray,
    clear,
    copy,
    doubles,
    exp,
    f32,
    floats,
    flush_groups,
    inner,
    job,
    kernel,
    zero,
)
from sdconv.fast.cpu.winograd import CONV3X3, UPSAMPLE_CONV, Scheme

_STRIP = ("height", "width", "channels", "tile_row", "tile_rows", "tile_columns")
INPUT = job(*_STRIP, "x", "x_row", "above", "scale", "shift", "silu", "tiles")
OUTPUT = job(
    *_STRIP,
    "products_step",
    "products",
    "bias",
    "residual",
    "residual_step",
    "out",
    "out_row",
    "relu",
    "groups",
    "sums",
)

# adjacent tiles in a unit of work
TILES = 8
# floats of scratch memory for each thread: those of CONV3X3, which needs more than UPSAMPLE_CONV
INPUT_SCRATCH = 6 * BLOCK + 6 * (4 * TILES + 2) * BLOCK
OUTPUT_SCRATCH = 28 * BLOCK + 4 * BLOCK

# the schemes' points, as in `sdconv.fast.cpu.winograd`, and their products that the transforms use
_P, _Q, _R = (
    f32(CONV3X3.output[1][1]),
    f32(CONV3X3.output[1][3]),
    f32(UPSAMPLE_CONV.output[1][2]),
)
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
def _input_1d(out: Any, to: int, out_step: int, x: Any, at: int, step: int, n: int) -> None:
    """Multiplies six values by ``B^T`` of CONV3X3, to six, for n channels."""
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
def _upsample_input_1d(
    out: Any, to: int, out_step: int, x: Any, at: int, step: int, n: int
) -> None:
    """Multiplies four values by ``B^T`` of UPSAMPLE_CONV, to five, for n channels."""
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
def _output_1d(out: Any, to: int, out_step: int, x: Any, at: int, step: int, n: int) -> None:
    """Multiplies six values by ``A^T`` of CONV3X3, to four, for n channels."""
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
def _upsample_output_1d(
    out: Any, to: int, out_step: int, x: Any, at: int, step: int, n: int
) -> None:
    """Multiplies five values by ``A^T`` of UPSAMPLE_CONV, to four, for n channels."""
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


def _input_kernel(scheme: Scheme, transform: Any) -> Any:
    """Makes the input transform of a scheme from its transform along one axis."""
    step, size, side = scheme.step, scheme.input_tile, len(scheme.input)
    longest = step * TILES + 2

    @inner
    def body(pointer: Any) -> None:
        job = carray(pointer, 1)[0]
        x, above, tiles = floats(job.x), floats(job.above), floats(job.tiles)
        scale, shift = floats(job.scale), floats(job.shift)
        scratch = floats(job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size)
        channels, width, columns = job.channels, job.width, job.tile_columns
        plane = job.tile_rows * columns * channels
        chunks = (columns + TILES - 1) // TILES
        first_row = job.tile_row * step - 1
        while True:
            unit = atomic_next(pointer, 0)
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
                    for i in range(size):
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
                    transform(scratch, (size + j) * BLOCK, longest * BLOCK, scratch, 0, BLOCK, n)
                for tile in range(first, last):
                    for i in range(side):
                        to = i * side * plane + (tile_row * columns + tile) * channels + c0
                        at = (size + i * longest + (tile - first) * step) * BLOCK
                        transform(tiles, to, plane, scratch, at, BLOCK, n)

    return body


def _output_kernel(scheme: Scheme, transform: Any) -> Any:
    """Makes the output transform of a scheme from its transform along one axis."""
    side = len(scheme.input)

    @inner
    def body(pointer: Any) -> None:
        job = carray(pointer, 1)[0]
        products, bias, residual, out = (
            floats(job.products),
            floats(job.bias),
            floats(job.residual),
            floats(job.out),
        )
        own = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
        # float64 first: their addresses must be multiples of 8
        channel_sums, squares = doubles(own), doubles(own + 8 * BLOCK)
        scratch, sums = floats(own + 16 * BLOCK), doubles(job.sums)
        channels, width, columns = job.channels, job.width, job.tile_columns
        plane = job.tile_rows * columns * job.products_step
        chunks = (columns + TILES - 1) // TILES
        group_size = channels // job.groups
        least = f32(0.0) if job.relu != 0 else f32(-inf)
        # where a row of the output tile begins: after the columns transformed along the first axis
        value = 4 * side
        clear(channel_sums, 0, 2 * BLOCK)
        while True:
            unit = atomic_next(pointer, 0)
            if unit >= job.units:
                break
            clear(sums, 2 * unit * job.groups, 2 * job.groups)
            tile_row = unit // chunks
            first = (unit % chunks) * TILES
            top = (job.tile_row + tile_row) * 4
            for c0 in range(0, channels, BLOCK):
                n = min(BLOCK, channels - c0)
                for tile in range(first, min(first + TILES, columns)):
                    at = (tile_row * columns + tile) * job.products_step + c0
                    across = min(4, width - tile * 4)
                    for j in range(side):
                        to = j * BLOCK
                        transform(scratch, to, side * BLOCK, products, at, side * plane, n)
                        at += plane
                    for i in range(min(4, job.height - top)):
                        transform(
                            scratch, value * BLOCK, BLOCK, scratch, i * side * BLOCK, BLOCK, n
                        )
                        pixel = (top + i - job.out_row) * width + tile * 4
                        for j in range(across):
                            to, made = (pixel + j) * channels + c0, (value + j) * BLOCK
                            if job.residual != 0:
                                by = (pixel + j) * job.residual_step + c0
                                for c in range(n):
                                    y = scratch[made + c] + bias[c0 + c] + residual[by + c]
                                    out[to + c] = least if y < least else y  # NaN stays
                            else:
                                for c in range(n):
                                    y = scratch[made + c] + bias[c0 + c]
                                    out[to + c] = least if y < least else y
                        at = pixel * channels + c0
                        accumulate(channel_sums, squares, out, at, channels, across, n)
                flush_groups(sums, unit, job.groups, group_size, c0, n, channel_sums)

    return body


_input_body = _input_kernel(CONV3X3, _input_1d)
_output_body = _output_kernel(CONV3X3, _output_1d)
_upsample_input_body = _input_kernel(UPSAMPLE_CONV, _upsample_input_1d)
_upsample_output_body = _output_kernel(UPSAMPLE_CONV, _upsample_output_1d)


@kernel(INPUT)
def input_transform(pointer: Any) -> None:
    """Normalisation, SiLU and the input transform of a strip by CONV3X3. A unit is TILES tiles."""
    _input_body(pointer)


@kernel(OUTPUT)
def output_transform(pointer: Any) -> None:
    """The output transform of a strip by CONV3X3, bias, residual, ReLU, and each group's sums. A
    unit is TILES tiles."""
    _output_body(pointer)


@kernel(INPUT)
def upsample_input_transform(pointer: Any) -> None:
    """`input_transform` by UPSAMPLE_CONV, from the input before upsampling."""
    _upsample_input_body(pointer)


@kernel(OUTPUT)
def upsample_output_transform(pointer: Any) -> None:
    """`output_transform` by UPSAMPLE_CONV."""
    _upsample_output_body(pointer)
