"""One pass over a float32 map or over a weight, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from sdconv.ops.compiled import (
    BLOCK,
    carray,
    clear,
    count,
    doubles,
    floats,
    gather,
    inner,
    job,
    kernel,
    take,
    whole_numbers,
    words,
)

SUM = job("width", "channels", "x", "groups", "sums")
HASH = job("words", "size", "sums")
SUM_SCRATCH = 4 * BLOCK
WORDS = 1 << 16


@kernel(SUM)
def add_up(pointer: Any) -> None:
    """Each group's sum and sum of squares, in float64; a unit is a row of a map in channels-last
    order."""
    job = carray(pointer, 1)[0]
    x, sums = floats(job.x), doubles(job.sums)
    mine = job.scratch + 4 * take(pointer, 1) * job.scratch_size
    counts, squares = doubles(mine), doubles(mine + 8 * BLOCK)
    size = job.channels // job.groups
    clear(counts, 0, 2 * BLOCK)
    while True:
        unit = take(pointer, 0)
        if unit >= job.units:
            break
        clear(sums, 2 * unit * job.groups, 2 * job.groups)
        for c0 in range(0, job.channels, BLOCK):
            n = min(BLOCK, job.channels - c0)
            for column in range(job.width):
                at = (unit * job.width + column) * job.channels + c0
                count(counts, squares, x, at, n)
            gather(sums, unit, job.groups, size, c0, n, counts)


@inner
def _hash(x: Any, first: int, last: int) -> Any:
    total = np.uint64(0)
    for i in range(first, last):
        # an odd factor that differs from place to place, so that what moves is seen as well
        total += np.uint64(x[i]) * np.uint64((np.uint32(i) << np.uint32(1)) | np.uint32(1))
    return total


@kernel(HASH)
def fingerprint(pointer: Any) -> None:
    """Of every ``WORDS`` 32-bit words, a sum weighted by place, modulo 2^64."""
    job = carray(pointer, 1)[0]
    x, sums = words(job.words), whole_numbers(job.sums)
    take(pointer, 1)
    while True:
        unit = take(pointer, 0)
        if unit >= job.units:
            break
        sums[unit] = _hash(x, unit * WORDS, min((unit + 1) * WORDS, job.size))
