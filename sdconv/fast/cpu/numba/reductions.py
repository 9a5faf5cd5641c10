"""One pass over a float32 map or over a weight, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from sdconv.fast.cpu.numba.dsl import (
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
HASH = job("words", "size", "keys", "sums")
SUM_SCRATCH = 4 * BLOCK
WORDS, KEYS = 1 << 16, 1 << 10
_ODD = np.uint64(0x9E3779B97F4A7C15)


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
            at = unit * job.width * job.channels + c0
            count(counts, squares, x, at, job.channels, job.width, n)
            gather(sums, unit, job.groups, size, c0, n, counts)


@inner
def _products(x: Any, at: int, n: int, keys: Any) -> Any:
    """``NH`` of 2 n words: Black and others 1999, "UMAC", section 4. No linear sum: those of
    weights whose signs alternate in certain ways stay the same when all change."""
    half = KEYS // 2
    total = np.uint64(0)
    for i in range(n):
        first = np.uint32(x[at + i] + keys[i])
        second = np.uint32(x[at + n + i] + keys[half + i])
        total += np.uint64(first) * np.uint64(second)
    return total


@kernel(HASH)
def fingerprint(pointer: Any) -> None:
    """Of every ``WORDS`` 32-bit words, 64 bits that depend on ``KEYS`` words of the caller's."""
    job = carray(pointer, 1)[0]
    x, keys, sums = words(job.words), words(job.keys), whole_numbers(job.sums)
    take(pointer, 1)
    while True:
        unit = take(pointer, 0)
        if unit >= job.units:
            break
        at = unit * WORDS
        last = min(at + WORDS, job.size)
        found = np.uint64(0)
        while at < last:
            n = min(KEYS, last - at) // 2
            if n > 0:
                found = found * _ODD + _products(x, at, n, keys)
                at += 2 * n
            else:
                found = found * _ODD + np.uint64(x[at])
                at += 1
        sums[unit] = found
