"""Numba kernels that reduce: sums of a feature map, and a hash of a weight."""

from __future__ import annotations

from typing import Any

import numpy as np

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
    uint32s,
    uint64s,
)
from sdconv.fast.cpu.numba.sixteen_bits import FLOAT32, read

SUMS = job("width", "channels", "dtype", "x", "groups", "sums")
HASH = job("words", "size", "keys", "hashes")
# pixels that are read at a time
_PIXELS = 16
SUMS_SCRATCH = (4 + _PIXELS) * BLOCK
# the number of 32-bit words that one hash covers, and that the key has
WORDS, KEYS = 1 << 16, 1 << 10
_ODD = np.uint64(0x9E3779B97F4A7C15)


@kernel(SUMS)
def group_sums(pointer: Any) -> None:
    """Each group's sum and sum of squares in float64. A unit is a row of a feature map in
    channels-last order."""
    job = carray(pointer, 1)[0]
    x, sums = floats(job.x), doubles(job.sums)
    own = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
    channel_sums, squares = doubles(own), doubles(own + 8 * BLOCK)
    widened = floats(own + 16 * BLOCK)
    size = job.channels // job.groups
    clear(channel_sums, 0, 2 * BLOCK)
    while True:
        unit = atomic_next(pointer, 0)
        if unit >= job.units:
            break
        clear(sums, 2 * unit * job.groups, 2 * job.groups)
        for c0 in range(0, job.channels, BLOCK):
            n = min(BLOCK, job.channels - c0)
            at = unit * job.width * job.channels + c0
            if job.dtype == FLOAT32:
                accumulate(channel_sums, squares, x, at, job.channels, job.width, n)
            else:
                for first in range(0, job.width, _PIXELS):
                    pixels = min(_PIXELS, job.width - first)
                    for i in range(pixels):
                        address = job.x + 2 * (at + (first + i) * job.channels)
                        read(widened, i * BLOCK, address, n, job.dtype)
                    accumulate(channel_sums, squares, widened, 0, BLOCK, pixels, n)
            flush_groups(sums, unit, job.groups, size, c0, n, channel_sums)


@inner
def _nh(x: Any, at: int, n: int, keys: Any) -> Any:
    """The hash ``NH`` of 2 n words (Black et al. 1999, "UMAC", section 4).

    A linear sum would not do: for certain patterns of signs it stays the same when all change."""
    half = KEYS // 2
    total = np.uint64(0)
    for i in range(n):
        first = np.uint32(x[at + i] + keys[i])
        second = np.uint32(x[at + n + i] + keys[half + i])
        total += np.uint64(first) * np.uint64(second)
    return total


@kernel(HASH)
def fingerprint(pointer: Any) -> None:
    """A 64-bit hash of every ``WORDS`` 32-bit words, by ``KEYS`` words of key."""
    job = carray(pointer, 1)[0]
    x, keys, hashes = uint32s(job.words), uint32s(job.keys), uint64s(job.hashes)
    atomic_next(pointer, 1)
    while True:
        unit = atomic_next(pointer, 0)
        if unit >= job.units:
            break
        at = unit * WORDS
        last = min(at + WORDS, job.size)
        found = np.uint64(0)
        while at < last:
            n = min(KEYS, last - at) // 2
            if n > 0:
                found = found * _ODD + _nh(x, at, n, keys)
                at += 2 * n
            else:
                found = found * _ODD + np.uint64(x[at])
                at += 1
        hashes[unit] = found
