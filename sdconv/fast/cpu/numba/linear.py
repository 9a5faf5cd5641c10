"""Linear layers of float32 by Numba, with what follows them: a residual, or a GELU gate (GEGLU).

A unit of work is a panel of the output's columns. It packs its panel of the weight, so that no
packed copy of a weight is kept; rows are multiplied a few at a time, and what follows is computed
while they are in the cache.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

from typing import Any

from sdconv.fast.cpu.numba.dsl import atomic_next, carray, f32, floats, inner, job, kernel
from sdconv.fast.cpu.numba.gemm import PANEL, ROWS, multiply
from sdconv.fast.cpu.numba.packing import pack
from sdconv.fast.cpu.numba.sixteen_bits import size_of
from sdconv.fast.cpu.numba.vectors import LANES, LINE, prefetch

# dtype: of the weight's numbers
LINEAR = job("rows", "chunk", "depth", "width", "a", "dtype", "b", "start", "residual", "out")

# rows of the output that are finished together
_FINISHED = 8 * ROWS

# erf(x) = x p(x^2) / q(x^2) within 3e-7, and exactly 1 from _ERF_IS_1 on (Eigen's coefficients)
_ERF_IS_1 = f32(3.832506856900711)
_P8, _P6, _P4 = f32(0.00022905065861350646), f32(0.0034082910107109506), f32(0.050955695062380861)
_P2, _P0 = f32(0.18520832239976145), f32(1.128379143519084)
_Q12, _Q10, _Q8 = f32(-1.1791602954361697e-7), f32(2.3547966471313185e-5), f32(1.01796252789e-3)
_Q6, _Q4, _Q2 = f32(0.014070470171167667), f32(0.11098505178285362), f32(0.49746925110067538)


def scratch_size(depth: int) -> int:
    """Floats of scratch memory for each thread."""
    return (2 * depth + _FINISHED) * PANEL


@inner
def _gelu(x: Any) -> Any:
    """``x`` times the probability that a standard normal variable is less."""
    z = x * f32(0.7071067811865476)
    z = z if z > -_ERF_IS_1 else -_ERF_IS_1
    z = z if z < _ERF_IS_1 else _ERF_IS_1
    s = z * z
    p = (((_P8 * s + _P6) * s + _P4) * s + _P2) * s + _P0
    q = (((((_Q12 * s + _Q10) * s + _Q8) * s + _Q6) * s + _Q4) * s + _Q2) * s + f32(1)
    return f32(0.5) * x * (f32(1) + z * p / q)


@kernel(LINEAR)
def linear(pointer: Any) -> None:
    """``(rows, depth)`` times the transpose of ``(width, depth)``, plus the bias ``start`` and the
    ``residual`` ``(rows, width)``, unless that is 0. A unit is a panel of ``chunk`` rows."""
    job = carray(pointer, 1)[0]
    own = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
    depth, width, number = job.depth, job.width, size_of(job.dtype)
    panels = (width + PANEL - 1) // PANEL
    while True:
        unit = atomic_next(pointer, 0)
        if unit >= job.units:
            break
        column = unit % panels * PANEL
        columns = min(PANEL, width - column)
        pack(job.b + number * column * depth, job.dtype, depth, columns, depth, own)
        first = unit // panels * job.chunk
        end = min(job.rows, first + job.chunk)
        for row in range(first, end, _FINISHED):
            rows = min(_FINISHED, end - row)
            at = 4 * (row * width + column)
            a, to = job.a + 4 * row * depth, job.out + at
            if job.residual != 0:  # while it is multiplied
                for r in range(rows):
                    for c in range(0, columns, LINE):
                        prefetch(job.residual + at + 4 * (r * width + c))
            multiply(job.start + 4 * column, a, own, to, depth, width, rows, columns // LANES)
            if job.residual != 0:
                out, residual = floats(to), floats(job.residual + at)
                for r in range(rows):
                    for c in range(columns):
                        out[r * width + c] += residual[r * width + c]


@kernel(LINEAR)
def geglu(pointer: Any) -> None:
    """``x * gelu(gate)``, where ``x`` and ``gate`` ``(rows, width)`` are the halves of a linear
    layer whose weight is ``(2 * width, depth)``. A unit is a panel of ``chunk`` rows."""
    job = carray(pointer, 1)[0]
    own = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
    depth, width, number = job.depth, job.width, size_of(job.dtype)
    own_gate = own + 4 * depth * PANEL
    gate_at = own_gate + 4 * depth * PANEL
    gate = floats(gate_at)
    panels = (width + PANEL - 1) // PANEL
    while True:
        unit = atomic_next(pointer, 0)
        if unit >= job.units:
            break
        column = unit % panels * PANEL
        columns = min(PANEL, width - column)
        pack(job.b + number * column * depth, job.dtype, depth, columns, depth, own)
        gate_weight = job.b + number * (width + column) * depth
        pack(gate_weight, job.dtype, depth, columns, depth, own_gate)
        first = unit // panels * job.chunk
        end = min(job.rows, first + job.chunk)
        for row in range(first, end, _FINISHED):
            rows = min(_FINISHED, end - row)
            a, to = job.a + 4 * row * depth, job.out + 4 * (row * width + column)
            start, vectors = job.start + 4 * column, columns // LANES
            multiply(start, a, own, to, depth, width, rows, vectors)
            multiply(start + 4 * width, a, own_gate, gate_at, depth, PANEL, rows, vectors)
            out = floats(to)
            for r in range(rows):
                for c in range(columns):
                    out[r * width + c] *= _gelu(gate[r * PANEL + c])
