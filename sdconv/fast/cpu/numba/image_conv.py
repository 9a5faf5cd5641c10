"""3x3 convolutions of images by Numba, such as an encoder's first: with three channels, direct
summation.

So few products leave much of the time to the feature map that they make. It is written once, in its
own dtype, and the sums for the next GroupNorm are computed while it is in the cache.
"""

from __future__ import annotations

from typing import Any

from sdconv.fast.cpu.numba.dsl import (
    BLOCK,
    accumulate,
    atomic_next,
    carray,
    clear,
    doubles,
    floats,
    flush_groups,
    inner,
    job,
    kernel,
)
from sdconv.fast.cpu.numba.gemm import PANEL, ROWS, VECTORS, block
from sdconv.fast.cpu.numba.sixteen_bits import size_of, write

# x: with a border. b: ``(9 channels, width)``, packed. dtype: of the output's numbers
IMAGE_CONV = job("columns", "channels", "width", "x", "b", "bias", "dtype", "out", "groups", "sums")

# pixels whose output is in a core's first cache until it is written
_PIXELS = 8 * ROWS
# floats of scratch memory for each thread
IMAGE_CONV_SCRATCH = 4 * BLOCK + PANEL * _PIXELS

_several, _one = (block(rows, VECTORS) for rows in (ROWS, 1))


@inner
def _multiply(bias: int, x: int, row: int, channels: int, b: int, out: int, pixels: int) -> None:
    """Writes some pixels of a panel: the bias, and the products of the patches' three rows one
    after the other, each of which lies in the image as it is."""
    run = 3 * channels
    p = 0
    while p < pixels:
        several = pixels - p >= ROWS
        to = floats(out + 4 * p * PANEL)
        for i in range(3):
            start, step = (floats(bias), 0) if i == 0 else (to, PANEL)
            left = floats(x + 4 * (i * row + p * channels))
            right = floats(b + 4 * i * run * PANEL)
            if several:
                _several(start, step, left, channels, 1, right, run, to, PANEL)
            else:
                _one(start, step, left, channels, 1, right, run, to, PANEL)
        p += ROWS if several else 1


@kernel(IMAGE_CONV)
def image_conv(pointer: Any) -> None:
    """A convolution with padding 1, bias and each group's sums. A unit is a row of the output."""
    job = carray(pointer, 1)[0]
    own = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
    channel_sums, squares = doubles(own), doubles(own + 8 * BLOCK)
    made_at, sums = own + 16 * BLOCK, doubles(job.sums)
    made = floats(made_at)
    columns, width, number = job.columns, job.width, size_of(job.dtype)
    row = (columns + 2) * job.channels
    depth, size = 9 * job.channels, width // job.groups
    clear(channel_sums, 0, 2 * BLOCK)
    while True:
        unit = atomic_next(pointer, 0)
        if unit >= job.units:
            break
        clear(sums, 2 * unit * job.groups, 2 * job.groups)
        for column in range(0, width, PANEL):
            b = job.b + 4 * column * depth
            for first in range(0, columns, _PIXELS):
                pixels = min(_PIXELS, columns - first)
                x = job.x + 4 * (unit * row + first * job.channels)
                _multiply(job.bias + 4 * column, x, row, job.channels, b, made_at, pixels)
                to = job.out + number * ((unit * columns + first) * width + column)
                for p in range(pixels):
                    write(to + number * p * width, made, p * PANEL, PANEL, job.dtype)
                accumulate(channel_sums, squares, made, 0, PANEL, pixels, PANEL)
            flush_groups(sums, unit, job.groups, size, column, PANEL, channel_sums)
