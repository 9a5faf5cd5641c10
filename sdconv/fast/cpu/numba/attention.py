"""Softmax attention of float32 heads by Numba, without a matrix of all scores (online softmax).

Each lane of the vectors holds one query of a panel, with its own largest score, sum and output, so
that nothing is ever summed across lanes. A unit of work is a few panels of queries of one head.
Keys are read in chunks that stay in a core's own cache while all panels of the unit use them; the
output so far is rescaled when a chunk has a larger score. Scores are binary logarithms: the
queries' scale includes that factor.

Source: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867; Dao et al. 2022,
https://arxiv.org/abs/2205.14135.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from sdconv.fast.cpu.numba.dsl import (
    atomic_next,
    carray,
    copy,
    f32,
    floats,
    inner,
    job,
    kernel,
    llvm,
)
from sdconv.fast.cpu.numba.gemm import PANEL, ROWS, VECTORS, block
from sdconv.fast.cpu.numba.vectors import LANES, VectorCode

ATTENTION = job(
    *("heads", "queries", "unit_queries", "keys", "depth", "value_depth"),
    *("q", "q_batch", "q_head", "q_row"),
    *("k", "k_batch", "k_head", "k_row"),
    *("v", "v_batch", "v_head", "v_row"),
    *("out", "out_batch", "out_head", "out_row"),
    "scale",
)

# panels of queries in a unit of work, at most: their outputs stay in a core's own cache
_PANELS = 192 // PANEL
# keys in a chunk
KEYS = 16 * ROWS

_LEAST = f32(-3.0e38)
# these begin with zeros
_scores, _score = block(ROWS, VECTORS, zero=True), block(1, VECTORS, zero=True)
_mix_6, _mix_5, _mix_4 = (block(rows, VECTORS) for rows in (6, 5, 4))


def has_kernel(value_depth: int) -> bool:
    """Whether the output of a value's depth divides into blocks."""
    return value_depth % 5 == 0 or value_depth % 4 == 0


def unit_queries(queries: int, heads: int, threads: int) -> int:
    """Queries in a unit of work: as many as leave each thread some units."""
    panels = -(-queries // PANEL)
    most = max(1, min(_PANELS, panels * heads // (4 * threads)))
    units = -(-panels // most)
    return PANEL * -(-panels // units)


def scratch_size(depth: int, value_depth: int, queries: int) -> int:
    """Floats of scratch memory for each thread, with units of ``queries`` queries."""
    return (depth + value_depth + 2) * queries + KEYS * (PANEL + value_depth)


class _Code(VectorCode):
    """Writes the LLVM code of the softmax."""

    def weight(self, x: Any) -> Any:
        """2^x within 1.1e-7 for x <= 0; numbers below -126 count as -126, NaN stays NaN."""
        return self.power(self.larger(self.constant(-126.0), x))

    def softmax(self, scores: Any, keys: Any, mixed: Any, depth: Any, most: Any, sums: Any) -> None:
        """Writes the body of ``_softmax``."""
        builder, count, zero = self.builder, range(VECTORS), keys.type(0)

        def rows(
            end: Any, base: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]
        ) -> list[Any]:
            def row(i: Any, values: list[Any]) -> list[Any]:
                return body(self.at(base, builder.mul(i, end.type(PANEL))), values)

            return self.loop(zero, end, carried, row)

        before = [self.load(most, v * LANES) for v in count]

        def larger(at: Any, found: list[Any]) -> list[Any]:
            return [self.larger(found[v], self.load(at, v * LANES)) for v in count]

        found = rows(keys, scores, before, larger)
        # a NaN among the scores makes its weight NaN; here it only has to pass
        factors = [self.weight(builder.fsub(a, b)) for a, b in zip(before, found, strict=True)]
        for v in count:
            self.store(found[v], most, v * LANES)

        def rescale(at: Any, none: list[Any]) -> list[Any]:
            for v in count:
                self.store(builder.fmul(self.load(at, v * LANES), factors[v]), at, v * LANES)
            return none

        rows(depth, mixed, [], rescale)

        def weigh(at: Any, totals: list[Any]) -> list[Any]:
            for v in count:
                weight = self.weight(builder.fsub(self.load(at, v * LANES), found[v]))
                self.store(weight, at, v * LANES)
                totals = [*totals[:v], builder.fadd(totals[v], weight), *totals[v + 1 :]]
            return totals

        totals = rows(keys, scores, [self.constant(0.0) for _ in count], weigh)
        for v in count:
            rescaled = builder.fmul(self.load(sums, v * LANES), factors[v])
            self.store(builder.fadd(rescaled, totals[v]), sums, v * LANES)


@llvm
def _softmax(
    typing_context: Any, scores: Any, keys: Any, mixed: Any, value_depth: Any, most: Any, sums: Any
) -> Any:
    """Turns a chunk's scores ``(keys, PANEL)`` into weights, and rescales the output so far
    ``(value_depth, PANEL)`` and the sums of weights to the largest score."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _Code(builder).softmax(*args)
        return context.get_dummy_value()

    return types.void(scores, keys, mixed, value_depth, most, sums), codegen


@inner
def _score_keys(k: int, k_row: int, q: Any, depth: int, scores: int, keys: int) -> None:
    """Scores ``(keys, PANEL)`` of a chunk of keys and the packed queries."""
    if keys < ROWS:
        for key in range(keys):
            to = floats(scores + 4 * key * PANEL)
            _score(q, 0, floats(k + 4 * key * k_row), k_row, 1, q, depth, to, PANEL)
        return
    for first in range(0, keys, ROWS):
        # the last block ends with the last key and overlaps the block before
        key = min(first, keys - ROWS)
        to = floats(scores + 4 * key * PANEL)
        _scores(q, 0, floats(k + 4 * key * k_row), k_row, 1, q, depth, to, PANEL)


@inner
def _mix_values(mixed: int, depth: int, values: int, weights: Any, keys: int) -> None:
    """Adds a chunk's values ``(keys, depth)`` by their weights ``(keys, PANEL)`` to the output
    ``(depth, PANEL)``, in blocks of 5 rows, or of 6 and 4."""
    if depth % 5 == 0:
        for d in range(0, depth, 5):
            to = floats(mixed + 4 * d * PANEL)
            _mix_5(to, PANEL, floats(values + 4 * d), 1, depth, weights, keys, to, PANEL)
        return
    # 6 divides what is left after one block of 4, or two
    fours = depth * 2 % 6 * 2
    for d in range(0, depth - fours, 6):
        to = floats(mixed + 4 * d * PANEL)
        _mix_6(to, PANEL, floats(values + 4 * d), 1, depth, weights, keys, to, PANEL)
    for d in range(depth - fours, depth, 4):
        to = floats(mixed + 4 * d * PANEL)
        _mix_4(to, PANEL, floats(values + 4 * d), 1, depth, weights, keys, to, PANEL)


@kernel(ATTENTION)
def attention(pointer: Any) -> None:
    """Softmax attention, ``softmax(q k^T scale) v``; ``scale`` includes log2(e). A unit is
    ``unit_queries`` queries of one head."""
    job = carray(pointer, 1)[0]
    own = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
    depth, value_depth, size = job.depth, job.value_depth, job.unit_queries
    packed_at, mixed_at = own, own + 4 * depth * size
    most_at = mixed_at + 4 * value_depth * size
    sums_at = most_at + 4 * size
    scores_at = sums_at + 4 * size
    values_at = scores_at + 4 * KEYS * PANEL
    packed, mixed, scores = floats(packed_at), floats(mixed_at), floats(scores_at)
    values = floats(values_at)
    most, sums = floats(most_at), floats(sums_at)
    scale = floats(job.scale)[0]
    blocks = (job.queries + size - 1) // size
    while True:
        unit = atomic_next(pointer, 0)
        if unit >= job.units:
            break
        batch, head = unit // blocks // job.heads, unit // blocks % job.heads
        first = unit % blocks * size
        count = min(size, job.queries - first)
        panels = (count + PANEL - 1) // PANEL
        q = floats(job.q + 4 * (batch * job.q_batch + head * job.q_head + first * job.q_row))
        k = job.k + 4 * (batch * job.k_batch + head * job.k_head)
        v = job.v + 4 * (batch * job.v_batch + head * job.v_head)
        for i in range(panels * PANEL):
            most[i] = _LEAST
            sums[i] = f32(0)
            # lanes without a query read the last one again
            row, to = min(i, count - 1) * job.q_row, i // PANEL * depth * PANEL + i % PANEL
            for d in range(depth):
                packed[to + d * PANEL] = q[row + d] * scale
        for i in range(panels * value_depth * PANEL):
            mixed[i] = f32(0)
        for key in range(0, job.keys, KEYS):
            keys = min(KEYS, job.keys - key)
            for i in range(keys):
                # where they are, rows may be a power of two apart and evict each other
                copy(values, i * value_depth, floats(v), (key + i) * job.v_row, value_depth)
            for panel in range(panels):
                own_q = floats(packed_at + 4 * panel * depth * PANEL)
                own_mixed = mixed_at + 4 * panel * value_depth * PANEL
                own_k = k + 4 * key * job.k_row
                _score_keys(own_k, job.k_row, own_q, depth, scores_at, keys)
                own_most, own_sums = most_at + 4 * panel * PANEL, sums_at + 4 * panel * PANEL
                _softmax(
                    scores, keys, floats(own_mixed), value_depth, floats(own_most), floats(own_sums)
                )
                _mix_values(own_mixed, value_depth, values_at, scores, keys)
        out = floats(job.out + 4 * (batch * job.out_batch + head * job.out_head))
        for i in range(count):
            at = i // PANEL * value_depth * PANEL + i % PANEL
            for d in range(value_depth):
                out[(first + i) * job.out_row + d] = mixed[at + d * PANEL] / sums[i]
