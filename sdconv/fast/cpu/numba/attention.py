"""Softmax attention of float32 heads by Numba, without a matrix of all scores (online softmax).

Each lane of the vectors holds one query of a panel, with its own largest score, sum and output, so
that nothing is ever summed across lanes. Keys are read in chunks; the output so far is
rescaled when a chunk has a larger score.

Source: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867; Dao et al. 2022,
https://arxiv.org/abs/2205.14135.
"""

from __future__ import annotations

from typing import Any

from sdconv.fast.cpu.numba.dsl import atomic_next, carray, exp, f32, floats, inner, job, kernel
from sdconv.fast.cpu.numba.gemm import PANEL, ROWS, VECTORS, block

ATTENTION = job(
    *("heads", "queries", "keys", "depth", "value_depth", "rows"),
    *("q", "q_batch", "q_head", "q_row"),
    *("k", "k_batch", "k_head", "k_row"),
    *("v", "v_batch", "v_head", "v_row"),
    *("out", "out_batch", "out_head", "out_row"),
    *("scale", "zeros"),
)

# keys in a chunk, whose scores are held at once
KEYS = 32 * ROWS
# the number of output rows of a block, the best first: it must divide a value's depth
BLOCKS = (5, 4)

_LEAST = f32(-3.0e38)
_scores, _score = block(ROWS, VECTORS), block(1, VECTORS)
_mix_5, _mix_4 = (block(rows, VECTORS) for rows in BLOCKS)


def scratch_size(depth: int, value_depth: int) -> int:
    """Floats of scratch memory for each thread."""
    return (depth + value_depth + KEYS + 3) * PANEL


@inner
def _score_keys(zeros: Any, k: int, k_row: int, q: Any, depth: int, scores: int, keys: int) -> None:
    """Scores ``(keys, PANEL)`` of a chunk of keys and the packed queries."""
    if keys < ROWS:
        for key in range(keys):
            to = floats(scores + 4 * key * PANEL)
            _score(zeros, 0, floats(k + 4 * key * k_row), k_row, 1, q, depth, to, PANEL)
        return
    for first in range(0, keys, ROWS):
        # the last block ends with the last key and overlaps the block before
        key = min(first, keys - ROWS)
        to = floats(scores + 4 * key * PANEL)
        _scores(zeros, 0, floats(k + 4 * key * k_row), k_row, 1, q, depth, to, PANEL)


@inner
def _softmax(
    scores: Any, keys: int, mixed: Any, value_depth: int, most: Any, total: Any, by: Any
) -> None:
    """Turns a chunk's scores into weights, and rescales the output so far to the largest score."""
    for c in range(PANEL):
        by[c] = most[c]
    for key in range(keys):
        for c in range(PANEL):
            score = scores[key * PANEL + c]
            most[c] = score if score > most[c] else most[c]
    for c in range(PANEL):
        by[c] = exp(by[c] - most[c])
        total[c] *= by[c]
    for d in range(value_depth):
        for c in range(PANEL):
            mixed[d * PANEL + c] *= by[c]
    for key in range(keys):
        for c in range(PANEL):
            less = scores[key * PANEL + c] - most[c]
            # NaN stays NaN, which `exp` does not ensure
            weight = exp(less) if less == less else less
            scores[key * PANEL + c] = weight
            total[c] += weight


@kernel(ATTENTION)
def attention(pointer: Any) -> None:
    """Softmax attention, ``softmax(q k^T scale) v``. A unit is a panel of queries of one head."""
    job = carray(pointer, 1)[0]
    own = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
    depth, value_depth = job.depth, job.value_depth
    packed, mixed_at = own, own + 4 * depth * PANEL
    scores_at = mixed_at + 4 * value_depth * PANEL
    after = scores_at + 4 * KEYS * PANEL
    q_panel, mixed, scores = floats(packed), floats(mixed_at), floats(scores_at)
    most, total, by = floats(after), floats(after + 4 * PANEL), floats(after + 8 * PANEL)
    zeros, scale = floats(job.zeros), floats(job.scale)[0]
    panels = (job.queries + PANEL - 1) // PANEL
    while True:
        unit = atomic_next(pointer, 0)
        if unit >= job.units:
            break
        batch, head = unit // panels // job.heads, unit // panels % job.heads
        first = unit % panels * PANEL
        count = min(PANEL, job.queries - first)
        q = floats(job.q + 4 * (batch * job.q_batch + head * job.q_head + first * job.q_row))
        k = job.k + 4 * (batch * job.k_batch + head * job.k_head)
        v = job.v + 4 * (batch * job.v_batch + head * job.v_head)
        for c in range(PANEL):
            most[c] = _LEAST
            total[c] = f32(0)
            for d in range(depth):
                # lanes without a query read the last one again
                q_panel[d * PANEL + c] = q[min(c, count - 1) * job.q_row + d] * scale
        for i in range(value_depth * PANEL):
            mixed[i] = f32(0)
        for key in range(0, job.keys, KEYS):
            keys = min(KEYS, job.keys - key)
            _score_keys(zeros, k + 4 * key * job.k_row, job.k_row, q_panel, depth, scores_at, keys)
            _softmax(scores, keys, mixed, value_depth, most, total, by)
            for d in range(0, value_depth, job.rows):
                to, values = floats(mixed_at + 4 * d * PANEL), floats(v + 4 * (key * job.v_row + d))
                if job.rows == 5:
                    _mix_5(to, PANEL, values, 1, job.v_row, scores, keys, to, PANEL)
                else:
                    _mix_4(to, PANEL, values, 1, job.v_row, scores, keys, to, PANEL)
        out = floats(job.out + 4 * (batch * job.out_batch + head * job.out_head))
        for c in range(count):
            for d in range(value_depth):
                out[(first + c) * job.out_row + d] = mixed[d * PANEL + c] / total[c]
