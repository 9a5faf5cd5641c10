"""A whole Winograd convolution in one launch, by Numba.

Threads take bands of tile rows. Each takes its band through the input transform, the products and
the output transform strip by strip, in scratch memory of its own: no thread waits for another at
the end of a strip, and one's transforms, which memory slows down, run beside another's products.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sdconv.fast.cpu.numba.dsl import (
    atomic_next,
    call,
    carray,
    copy,
    floats,
    inner,
    int64s,
    job,
    kernel,
    uint16s,
)
from sdconv.fast.cpu.numba.gemm import BMM, CHUNK
from sdconv.fast.cpu.numba.sixteen_bits import read
from sdconv.fast.cpu.numba.transforms import INPUT, OUTPUT, TILES
from sdconv.fast.cpu.winograd import OUTPUT_TILE

# The kernels, and an array of each one's jobs, with one for each thread; all are addresses.
# product_panels, shortcut_panels: units of a chunk of rows; the latter is 0 without a shortcut.
# row: bytes in a row of ``x``; residual_row: numbers in a row of the residual; shortcut_row: floats
# in a row of its product. widened: the residual in float32 for each thread, 0 if it is float32.
# above: a row for each thread, 0 unless the output overwrites ``x``; borders: the rows of ``x``
# above and below the border between two bands.
CONV = job(
    *("tile_rows", "tile_columns", "strip_rows", "height", "width"),
    *("input_kernel", "bmm_kernel", "output_kernel"),
    *("input_jobs", "product_jobs", "shortcut_jobs", "output_jobs"),
    *("product_panels", "shortcut_panels", "x", "row", "above", "borders"),
    *("residual", "residual_dtype", "residual_row", "widened", "widened_step", "shortcut_row"),
    *("sums", "groups"),
)


def _at(kind: np.dtype[Any], *names: str) -> tuple[int, ...]:
    """The positions of a job's fields."""
    return tuple((kind.names or ()).index(name) for name in names)


_INPUT_SIZE, _BMM_SIZE, _OUTPUT_SIZE = INPUT.itemsize, BMM.itemsize, OUTPUT.itemsize
_NEXT_UNIT, _NEXT_THREAD, _UNITS = _at(INPUT, "next_unit", "next_thread", "units")
_IN_ROW, _IN_ROWS, _ABOVE, _BELOW = _at(INPUT, "tile_row", "tile_rows", "above", "below")
_BMM_ROWS, _BMM_A, _BMM_OUT = _at(BMM, "rows", "a", "out")
_OUT_ROW, _OUT_ROWS, _RESIDUAL, _SUMS = _at(OUTPUT, "tile_row", "tile_rows", "residual", "sums")


@inner
def _run(function: int, address: int, units: int) -> None:
    """Runs a kernel in this thread alone."""
    own = int64s(address)
    own[_NEXT_UNIT] = own[_NEXT_THREAD] = 0
    own[_UNITS] = units
    call(function, address)


@kernel(CONV)
def conv(pointer: Any) -> None:
    """A Winograd convolution by the kernels of its scheme. A unit is a band."""
    job = carray(pointer, 1)[0]
    thread, bands, row_size = atomic_next(pointer, 1), job.units, job.row
    input_job, output_job = (
        job.input_jobs + thread * _INPUT_SIZE,
        job.output_jobs + thread * _OUTPUT_SIZE,
    )
    product_job, shortcut_job = (
        job.product_jobs + thread * _BMM_SIZE,
        job.shortcut_jobs + thread * _BMM_SIZE,
    )
    given, written = int64s(input_job), int64s(output_job)
    product, added = int64s(product_job), int64s(shortcut_job)
    x, above, widened = uint16s(job.x), uint16s(job.above), job.widened
    half_row = row_size // 2
    chunks = (job.tile_columns + TILES - 1) // TILES
    while True:
        band = atomic_next(pointer, 0)
        if band >= bands:
            break
        begin = job.tile_rows * band // bands
        end = job.tile_rows * (band + 1) // bands
        row = begin
        while row < end:
            strips = (end - row + job.strip_rows - 1) // job.strip_rows
            rows = (end - row + strips - 1) // strips
            after = row + rows
            given[_IN_ROW], given[_IN_ROWS] = row, rows
            if job.above != 0:
                given[_ABOVE] = job.above + thread * row_size
                given[_BELOW] = 0
                if row == begin:
                    given[_ABOVE] = job.borders + (2 * band - 2) * row_size if band else 0
                if after == end and band < bands - 1:
                    given[_BELOW] = job.borders + (2 * band + 1) * row_size
            _run(job.input_kernel, input_job, rows * chunks)
            if job.above != 0 and after < end:
                # the output of this strip overwrites the row that the next one begins with
                copy(above, thread * half_row, x, (OUTPUT_TILE * after - 1) * half_row, half_row)
            tiles = rows * job.tile_columns
            product[_BMM_ROWS] = tiles
            units = job.product_panels * ((tiles + CHUNK - 1) // CHUNK)
            _run(job.bmm_kernel, product_job, units)
            if job.shortcut_panels != 0:
                first = OUTPUT_TILE * row
                pixels = (min(OUTPUT_TILE * after, job.height) - first) * job.width
                added[_BMM_ROWS] = pixels
                added[_BMM_A] = job.residual + 4 * first * job.residual_row
                if widened != 0:
                    numbers, at = pixels // job.width * job.residual_row, first * job.residual_row
                    added[_BMM_A] = widened + 4 * thread * job.widened_step
                    read(
                        *(floats(added[_BMM_A]), 0, job.residual + 2 * at),
                        *(numbers, job.residual_dtype),
                    )
                units = job.shortcut_panels * ((pixels + CHUNK - 1) // CHUNK)
                _run(job.bmm_kernel, shortcut_job, units)
                # such that the output's row number leads to the strip's first row
                written[_RESIDUAL] = added[_BMM_OUT] - 4 * first * job.shortcut_row
            written[_OUT_ROW], written[_OUT_ROWS] = row, rows
            written[_SUMS] = job.sums + 16 * row * chunks * job.groups
            _run(job.output_kernel, output_job, rows * chunks)
            row = after
