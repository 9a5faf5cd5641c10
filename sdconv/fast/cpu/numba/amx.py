"""3x3 convolutions of bfloat16 by Intel's matrix units (AMX), by Numba: direct summation.

A thread takes some rows at a time, band by band from the top. It normalises a band's input into
scratch memory, with a border of zeros, so that the 9 taps of a kernel are 9 offsets there;
multiplies 32 pixels by 32 output channels at a time, summed in float32; and adds bias and residual
while the sums are in the cache. Scratch memory has planes of 32 channels, in which pixels follow
each other row after row: those of the border are computed too, and dropped. The two rows that a
band shares with the next one stay there, so that the output may overwrite the input.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np

from sdconv.fast.cpu.numba.amx_code import (
    SIDE,
    STEP,
    clear_tiles,
    configure,
    finish,
    finish_with_residual,
    multiply,
    normalise,
    normalise_silu,
    restore,
    store_tiles,
)
from sdconv.fast.cpu.numba.dsl import (
    atomic_next,
    carray,
    copy,
    doubles,
    f32,
    floats,
    inner,
    int64s,
    job,
    kernel,
    uint16s,
    uint64s,
)
from sdconv.fast.cpu.numba.sixteen_bits import narrow_bfloat16, widen_bfloat16

# rows: of the input in a band; unit_rows: in a unit; plane: numbers in a plane of scratch memory;
# first, end: the rows that are computed; steps: planes of the input's channels; taps: the bytes
# from a pixel's upper left neighbour to each tap, for each phase; phases: 4 after upsampling, each
# of which has weights of its own and writes every other row and column; residual_steps: planes of
# the residual where it is multiplied; sums: of each channel, and of their squares, in each row of
# the input; borders: the rows of the input above and below the border between two units, 0 unless
# the output overwrites it
CONV = job(
    *("rows", "unit_rows", "plane", "first", "end", "height", "width", "channels", "steps"),
    *("out_channels", "x", "borders"),
    *("scale", "shift", "silu", "taps", "tap_count", "phases", "weight", "offsets"),
    *("residual", "residual_channels", "residual_steps", "shortcut", "relu", "out", "sums"),
)


# bytes before a band in scratch memory: the tile registers' shapes, and those before; the sums
_SHAPES = 128
BEFORE = _SHAPES + 4 * SIDE * SIDE


@inner
def _write_shapes(shapes: Any) -> None:
    """Writes a configuration of 8 tile registers of 16 rows of 64 bytes, by 8 words of 64 bits."""
    for i in range(8):
        shapes[i] = np.uint64(0)
    shapes[0] = np.uint64(1)  # the palette
    shapes[2] = shapes[3] = np.uint64(0x0040004000400040)  # bytes in a row
    shapes[6] = np.uint64(0x1010101010101010)  # rows


@inner
def _fill(out: Any, to: int, n: int) -> None:
    """Writes zeros."""
    for i in range(n):
        out[to + i] = np.uint16(0)


@inner
def _copy(out: Any, to: int, plane: int, x: Any, at: int, channels: int, pixels: int) -> None:
    """Copies pixels to planes; a last plane that is not filled is filled up with zeros."""
    for pixel in range(pixels):
        for c0 in range(0, channels, STEP):
            start = to + c0 // STEP * plane + pixel * STEP
            n = min(STEP, channels - c0)
            for c in range(n):
                out[start + c] = x[at + pixel * channels + c0 + c]
            for c in range(n, STEP):
                out[start + c] = np.uint16(0)


@inner
def _row(job: Any, unit: int, y: int) -> Any:
    """The address of a row of the input that a unit reads."""
    size, begin = 2 * job.width * job.channels, job.first + unit * job.unit_rows
    if job.borders != 0 and y < begin:
        return job.borders + (2 * unit - 2) * size
    if job.borders != 0 and y == begin + job.unit_rows:
        return job.borders + (2 * unit + 1) * size
    return job.x + y * size


@inner
def _fill_band(job: Any, unit: int, first: int, known: int, rows: int, plane: int, to: int) -> None:
    """Writes the input of a band, normalised and with its border, but for the first ``known``
    rows."""
    band, width, channels = uint16s(to), job.width, job.channels
    scale, shift = floats(job.scale), floats(job.shift)
    row_size, last = (width + 2) * STEP, channels // STEP
    for r in range(known, rows + 2):
        y = first - 1 + r
        inside = 0 <= y and y < job.height
        for step in range(job.steps):
            at = step * plane + r * row_size
            # nothing but zeros, or zeros on both sides; and where channels are missing
            _fill(band, at, row_size if not inside or (step == last) else STEP)
            _fill(band, at + row_size - STEP, STEP)
        if not inside:
            continue
        at = r * row_size + STEP
        out, given = uint16s(to + 2 * at), uint16s(_row(job, unit, y))
        if job.scale == 0:
            _copy(band, at, plane, given, 0, channels, width)
        elif job.silu != 0:
            normalise_silu(out, plane, given, scale, shift, width, channels)
        else:
            normalise(out, plane, given, scale, shift, width, channels)


@inner
def _finish_few(
    products: Any,
    offsets: Any,
    added: Any,
    added_step: int,
    least: Any,
    out: Any,
    step: int,
    pixels: int,
    sums: Any,
    squares: Any,
    n: int,
) -> None:
    """Writes some pixels of ``n`` output channels, and adds their sums."""
    for i in range(pixels):
        for c in range(n):
            y = products[i * SIDE + c] + offsets[c]
            if added_step != 0:
                y += widen_bfloat16(added[i * added_step + c])
            half = narrow_bfloat16(least if y < least else y)
            out[i * step + c] = half
            y = widen_bfloat16(half)
            sums[c] += np.float64(y)
            squares[c] += np.float64(y) * np.float64(y)


@inner
def _finish_rows(
    job: Any, first: int, phase: int, block: int, position: int, end: int, products: int
) -> None:
    """Writes the sums of the pixels from ``position`` up to ``end`` of a band that begins with row
    ``first``, without those of the border."""
    width, channels, scale = job.width, job.out_channels, 2 if job.phases == 4 else 1
    down, across, pitch = phase // 2, phase % 2, width + 2
    c0 = block * SIDE
    n = min(SIDE, channels - c0)
    bias, least = floats(job.offsets + 4 * c0), f32(0.0) if job.relu != 0 else f32(-inf)
    added = job.residual if job.shortcut == 0 else 0
    step, by_step = scale * channels, channels if added != 0 else 0
    at = position
    while at < end:
        row = at // pitch
        column = at - row * pitch
        pixels = min(end - at, width - column)
        if pixels <= 0:
            at = (row + 1) * pitch
            continue
        pixel = (((first + row) * scale + down) * width + column) * scale + across
        to = 2 * (pixel * channels + c0)
        made = floats(products + 4 * (at - position) * SIDE)
        out, by = uint16s(job.out + to), uint16s(added + to)
        own = job.sums + 8 * (2 * (first + row) * channels + c0)
        sums, squares = doubles(own), doubles(own + 8 * channels)
        if n < SIDE:
            _finish_few(made, bias, by, by_step, least, out, step, pixels, sums, squares, n)
        elif added != 0:
            finish_with_residual(made, bias, by, by_step, least, out, step, pixels, sums, squares)
        else:
            finish(made, bias, by, by_step, least, out, step, pixels, sums, squares)
        at += pixels


@inner
def _place(job: Any, first: int, phase: int, block: int, position: int) -> Any:
    """The bytes of the output, and of the residual, before those of a position."""
    width, channels, scale = job.width, job.out_channels, 2 if job.phases == 4 else 1
    row = position // (width + 2)
    column = min(position - row * (width + 2), width - 1)
    pixel = (((first + row) * scale + phase // 2) * width + column) * scale + phase % 2
    return 2 * (pixel * channels + block * SIDE)


@inner
def _multiply_band(
    job: Any, first: int, rows: int, band: int, added_band: int, products: int
) -> None:
    """Multiplies a band by the kernels, and writes its rows of the output."""
    plane, steps, pitch, count = job.plane, job.steps, job.width + 2, job.tap_count
    blocks = (job.out_channels + SIDE - 1) // SIDE
    # from pixel to pixel
    by_step = 2 * job.out_channels
    step = 2 * by_step if job.phases == 4 else by_step
    added = job.residual if job.residual != 0 and job.shortcut == 0 else job.out
    size = 2 * STEP * SIDE * count * steps
    added_size = 2 * STEP * SIDE * job.residual_steps
    end = (rows - 1) * pitch + job.width
    for phase in range(job.phases):
        taps = int64s(job.taps + 8 * phase * job.tap_count)
        for block in range(blocks):
            weight = job.weight + (phase * blocks + block) * size
            shortcut = job.shortcut + block * added_size
            for position in range(0, end, SIDE):
                clear_tiles()
                pixels = band + 2 * STEP * position
                to = _place(job, first, phase, block, position)
                out, by = job.out + to, added + to
                multiply(pixels, 2 * plane, taps, count, steps, weight, out, step, by, by_step)
                if job.shortcut != 0:  # by the first tap, which is the pixel itself
                    pixels = added_band + 2 * STEP * position
                    many, own_taps = job.residual_steps, int64s(job.taps)
                    multiply(pixels, 2 * plane, own_taps, 1, many, shortcut, out, 0, out, 0)
                store_tiles(products)
                after = min(position + SIDE, end)
                _finish_rows(job, first, phase, block, position, after, products)


@kernel(CONV)
def conv(pointer: Any) -> None:
    """A 3x3 convolution. A unit is ``unit_rows`` rows of the input."""
    job = carray(pointer, 1)[0]
    own = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
    shapes = (own + 63) // 64 * 64
    products, band = shapes + _SHAPES, shapes + BEFORE
    _write_shapes(uint64s(shapes))
    width, plane, row_size = job.width, job.plane, (job.width + 2) * STEP
    planes, added_band = uint16s(band), band + 2 * job.steps * plane
    residual, channels = uint16s(job.residual), job.residual_channels
    configure(shapes + 64, shapes)
    while True:
        unit = atomic_next(pointer, 0)
        if unit >= job.units:
            break
        begin = job.first + unit * job.unit_rows
        end = min(begin + job.unit_rows, job.end)
        for first in range(begin, end, job.rows):
            rows = min(job.rows, end - first)
            if first > begin:  # the last two rows of the band before, which was whole
                for step in range(job.steps):
                    at = step * plane
                    copy(planes, at, planes, at + job.rows * row_size, 2 * row_size)
            _fill_band(job, unit, first, 2 if first > begin else 0, rows, plane, band)
            if job.shortcut != 0:
                for r in range(rows):
                    source, to = (first + r) * width * channels, r * row_size
                    _copy(uint16s(added_band), to, plane, residual, source, channels, width)
            _multiply_band(job, first, rows, band, added_band, products)
    restore(shapes + 64)
