"""Winograd's input and output transforms by Numba, on strips of rows, channels last.

:mod:`sdconv.fast.cpu.winograd` computes the same in torch operations. A tile's numbers stay in
registers or in a core's first cache from the feature map to its tile positions, and back. They are
float32 there; a feature map may be of 16 bits. Importing this module compiles the kernels, or reads
them from Numba's cache.
"""

from __future__ import annotations

from itertools import accumulate as running_sums
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
    f32,
    floats,
    flush_groups,
    inner,
    job,
    kernel,
    uint16s,
    zero,
)
from sdconv.fast.cpu.numba.sixteen_bits import BFLOAT16, FLOAT16, FLOAT32, read, size_of, write
from sdconv.fast.cpu.numba.transform_code import (
    affine,
    along,
    along_planes,
    downsample_input_1d,
    downsample_output_1d,
    input_1d,
    output_1d,
    output_tile,
    upsample_input_1d,
    upsample_output_1d,
)
from sdconv.fast.cpu.numba.vectors import LANES
from sdconv.fast.cpu.winograd import CONV3X3, DOWNSAMPLE_CONV, OUTPUT_TILE, UPSAMPLE_CONV, Scheme

# plane: from one tile position to the next
_STRIP = ("height", "width", "channels", "tile_row", "tile_rows", "tile_columns", "plane")
# dtype: of the input's numbers. block: from one block of channels to the next; block_channels: in
# each
INPUT = job(
    *(*_STRIP, "dtype", "x", "x_row", "above", "below", "scale", "shift", "silu"),
    *("tiles", "block", "block_channels"),
)
# dtype, residual_dtype: of the numbers of the output and the residual
OUTPUT = job(
    *(*_STRIP, "products_step", "products", "bias"),
    *("residual_dtype", "residual", "residual_step"),
    *("dtype", "out", "out_row", "relu", "groups", "sums"),
)

# channels that the input transform works on at a time: each pixel's are read in one stream
WIDE = 128
# adjacent tiles in a unit of work
TILES = 16
_PIXELS = OUTPUT_TILE**2


def _input_places(scheme: Scheme) -> tuple[int, int, int, int]:
    """Where things are in the input transform's scratch memory, after scale and shift: a column of
    the tile, a row of tile positions, the tile's columns, each transformed, and the end."""
    size, side = scheme.input_tile, len(scheme.input)
    ends = running_sums((2, size, side, size * side))
    column, row, grid, end = (count * WIDE for count in ends)
    return column, row, grid, end


# floats of scratch memory for each thread
INPUT_SCRATCH = max(_input_places(one)[3] for one in (CONV3X3, UPSAMPLE_CONV, DOWNSAMPLE_CONV))
OUTPUT_SCRATCH = (4 + 4 + 1 + _PIXELS + 1) * BLOCK

_normalise, _normalise_silu = affine(False), affine(True)
_silu_of_bfloat16, _silu_of_float16 = affine(True, BFLOAT16), affine(True, FLOAT16)


@inner
def _read_normalised(
    out: Any, to: int, address: int, dtype: int, scale: Any, shift: Any, vectors: int, ahead: int
) -> None:
    """Reads whole vectors of a feature map, normalised, with SiLU."""
    if dtype == FLOAT32:
        _normalise_silu(out, to, floats(address), 0, scale, shift, vectors, ahead)
    elif dtype == BFLOAT16:
        _silu_of_bfloat16(out, to, uint16s(address), 0, scale, shift, vectors, ahead)
    else:
        _silu_of_float16(out, to, uint16s(address), 0, scale, shift, vectors, ahead)


def _input_kernel(scheme: Scheme, transform_1d: Any) -> Any:
    """Makes the input transform of a scheme from its transform along one axis."""
    step, size, side, before = scheme.step, scheme.input_tile, len(scheme.input), scheme.before
    transform, to_planes = along(transform_1d, size), along_planes(transform_1d, size)
    column_at, row_at, grid_at, _ = _input_places(scheme)

    @inner
    def body(pointer: Any) -> None:
        job = carray(pointer, 1)[0]
        tiles, scale, shift = floats(job.tiles), floats(job.scale), floats(job.shift)
        number = size_of(job.dtype)
        own = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
        own_scale, own_shift, scratch = floats(own), floats(own + 4 * WIDE), floats(own)
        channels, width, columns = job.channels, job.width, job.tile_columns
        block_channels = job.block_channels
        chunks = (columns + TILES - 1) // TILES
        first_row = job.tile_row * step - before
        last_row = first_row + 1 + job.tile_rows * step
        while True:
            unit = atomic_next(pointer, 0)
            if unit >= job.units:
                break
            tile_row = unit // chunks
            first = (unit % chunks) * TILES
            top = first_row + tile_row * step
            for c0 in range(0, channels, WIDE):
                n = min(WIDE, channels - c0)
                vectors = (n + LANES - 1) // LANES
                whole = n == vectors * LANES
                if job.scale != 0:
                    copy(own_scale, 0, scale, c0, n)
                    copy(own_shift, 0, shift, c0, n)
                for tile in range(first, min(first + TILES, columns)):
                    known = 0
                    if tile > first:
                        known = size - step
                        for i in range(side):
                            at = grid_at + i * size * WIDE
                            copy(scratch, at, scratch, at + step * WIDE, known * WIDE)
                    for j in range(known, size):
                        column = tile * step - before + j
                        for i in range(size):
                            row, to = top + i, column_at + i * WIDE
                            if row < 0 or row >= job.height or column < 0 or column >= width:
                                zero(scratch, to, vectors * LANES)
                                continue
                            pixel = (row - job.x_row) * width + column
                            address = job.x + number * (pixel * channels + c0)
                            if row == first_row and job.above != 0:
                                address = job.above + number * (column * channels + c0)
                            elif row == last_row and job.below != 0:
                                address = job.below + number * (column * channels + c0)
                            if whole and job.scale != 0 and job.silu != 0:
                                _read_normalised(
                                    *(scratch, to, address, job.dtype),
                                    *(own_scale, own_shift, vectors, step * channels),
                                )
                                continue
                            read(scratch, to, address, n, job.dtype)
                            if job.scale != 0:
                                given = scratch, to, scratch, to, own_scale, own_shift, vectors, 0
                                if job.silu != 0:
                                    _normalise_silu(*given)
                                else:
                                    _normalise(*given)
                        to = grid_at + j * WIDE
                        transform(scratch, to, size * WIDE, scratch, column_at, WIDE, vectors)
                    for b in range(0, n, block_channels):
                        some = min(block_channels, n - b)
                        some_vectors = (some + LANES - 1) // LANES
                        start = (c0 + b) // block_channels * job.block + (c0 + b) % block_channels
                        start += (tile_row * columns + tile) * block_channels
                        for i in range(side):
                            at = grid_at + i * size * WIDE + b
                            to = start + i * side * job.plane
                            if whole:
                                to_planes(
                                    *(tiles, to, job.plane, block_channels),
                                    *(scratch, at, WIDE, some_vectors),
                                )
                                continue
                            transform(scratch, row_at, WIDE, scratch, at, WIDE, some_vectors)
                            for j in range(side):
                                copy(tiles, to + j * job.plane, scratch, row_at + j * WIDE, some)

    return body


def _tile(transform_1d: Any, side: int, dtype: int, residuals: bool) -> Any:
    """Makes a function that writes a whole tile of an output of a ``dtype``, and adds residuals of
    that dtype or of float32 if ``residuals``."""
    pointer = floats if dtype == FLOAT32 else uint16s
    bare = output_tile(transform_1d, side, dtype)
    with_own, with_float32 = (output_tile(transform_1d, side, dtype, by) for by in (dtype, FLOAT32))

    @inner
    def tile(
        job: Any,
        products: Any,
        at: int,
        bias: Any,
        least: Any,
        to: int,
        sums: Any,
        vectors: int,
        by: int,
    ) -> None:
        channels, step, ahead = job.channels, job.residual_step, job.products_step
        place = pointer(job.out), to, job.width * channels, channels
        given = products, at, job.plane, ahead, bias, least, *place, sums, vectors
        if not residuals or job.residual == 0:
            bare(*given, floats(job.residual), 0, 0, 0)
        elif dtype == FLOAT32 or job.residual_dtype == dtype:
            with_own(*given, pointer(job.residual), by, job.width * step, step)
        else:
            with_float32(*given, floats(job.residual), by, job.width * step, step)

    return tile


def _output_kernel(scheme: Scheme, transform_1d: Any, *, residuals: bool = False) -> Any:
    """Makes the output transform of a scheme from its transform along one axis. One that is made
    without ``residuals`` adds them, too, as in tiles that are cut off: slowly."""
    side = len(scheme.input)
    tile, tile_of_bfloat16, tile_of_float16 = (
        _tile(transform_1d, side, dtype, residuals) for dtype in (FLOAT32, BFLOAT16, FLOAT16)
    )
    tile_of_products = output_tile(transform_1d, side)

    @inner
    def body(pointer: Any) -> None:
        job = carray(pointer, 1)[0]
        products, bias = floats(job.products), floats(job.bias)
        number, residual_number = size_of(job.dtype), size_of(job.residual_dtype)
        own = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
        # float64 first: their addresses must be multiples of 8
        channel_sums, squares, unused = (
            doubles(own),
            doubles(own + 8 * BLOCK),
            doubles(own + 16 * BLOCK),
        )
        own_bias, made, added, sums = (
            floats(own + 32 * BLOCK),
            floats(own + 36 * BLOCK),
            floats(own + (36 + 4 * _PIXELS) * BLOCK),
            doubles(job.sums),
        )
        channels, width, columns = job.channels, job.width, job.tile_columns
        chunks = (columns + TILES - 1) // TILES
        group_size = channels // job.groups
        least = f32(0.0) if job.relu != 0 else f32(-inf)
        row, by_row = width * channels, width * job.residual_step
        clear(channel_sums, 0, 2 * BLOCK)
        clear(unused, 0, 2 * BLOCK)
        while True:
            unit = atomic_next(pointer, 0)
            if unit >= job.units:
                break
            clear(sums, 2 * unit * job.groups, 2 * job.groups)
            tile_row = unit // chunks
            first = (unit % chunks) * TILES
            top = (job.tile_row + tile_row) * OUTPUT_TILE
            down = min(OUTPUT_TILE, job.height - top)
            for c0 in range(0, channels, BLOCK):
                n = min(BLOCK, channels - c0)
                vectors = (n + LANES - 1) // LANES
                copy(own_bias, 0, bias, c0, n)
                for column in range(first, min(first + TILES, columns)):
                    at = (tile_row * columns + column) * job.products_step + c0
                    across = min(OUTPUT_TILE, width - column * OUTPUT_TILE)
                    pixel = (top - job.out_row) * width + column * OUTPUT_TILE
                    to, by = pixel * channels + c0, pixel * job.residual_step + c0
                    if (
                        down * across == _PIXELS
                        and n == vectors * LANES
                        and (residuals or job.residual == 0)
                    ):
                        given = job, products, at, own_bias, least, to, channel_sums, vectors, by
                        if job.dtype == FLOAT32:
                            tile(*given)
                        elif job.dtype == BFLOAT16:
                            tile_of_bfloat16(*given)
                        else:
                            tile_of_float16(*given)
                        continue
                    tile_of_products(
                        *(products, at, job.plane, job.products_step, own_bias, f32(-inf), made, 0),
                        *(OUTPUT_TILE * BLOCK, BLOCK, unused, vectors, made, 0, 0, 0),
                    )
                    for i in range(down):
                        for j in range(across):
                            pixel_to = to + i * row + j * channels
                            made_at = (i * OUTPUT_TILE + j) * BLOCK
                            if job.residual != 0:
                                pixel_by = by + i * by_row + j * job.residual_step
                                address = job.residual + residual_number * pixel_by
                                read(added, 0, address, n, job.residual_dtype)
                                for c in range(n):
                                    made[made_at + c] += added[c]
                            for c in range(n):
                                y = made[made_at + c]
                                made[made_at + c] = least if y < least else y  # NaN stays
                            write(job.out + number * pixel_to, made, made_at, n, job.dtype)
                        made_at = i * OUTPUT_TILE * BLOCK
                        accumulate(channel_sums, squares, made, made_at, BLOCK, across, n)
                flush_groups(sums, unit, job.groups, group_size, c0, n, channel_sums)

    return body


_input_body = _input_kernel(CONV3X3, input_1d)
_output_body = _output_kernel(CONV3X3, output_1d, residuals=True)
_upsample_input_body = _input_kernel(UPSAMPLE_CONV, upsample_input_1d)
_upsample_output_body = _output_kernel(UPSAMPLE_CONV, upsample_output_1d)
_downsample_input_body = _input_kernel(DOWNSAMPLE_CONV, downsample_input_1d)
_downsample_output_body = _output_kernel(DOWNSAMPLE_CONV, downsample_output_1d)


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


@kernel(INPUT)
def downsample_input_transform(pointer: Any) -> None:
    """`input_transform` by DOWNSAMPLE_CONV."""
    _downsample_input_body(pointer)


@kernel(OUTPUT)
def downsample_output_transform(pointer: Any) -> None:
    """`output_transform` by DOWNSAMPLE_CONV."""
    _downsample_output_body(pointer)
