"""The Triton kernel between the two matrix products of an attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdconv.fast.cuda.triton_kernels import kernel

# Scores that a program holds at a time.
COLUMNS, WARPS = 4096, 8


@kernel
def softmax_rows(
    scores: tl.tensor,
    weights: tl.tensor,
    sums: tl.tensor,
    columns: tl.tensor,
    scale: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """Writes ``exp(scale * (scores - their row's largest))`` and each row's sum of what it wrote.

    ``scores`` and ``weights`` are (R, columns), ``sums`` (R,). A program has one row, and reads it
    twice, the second time from the cache.
    """
    row = tl.program_id(0).to(tl.int64)
    from_row, to_row = scores + row * columns, weights + row * columns
    c = tl.arange(0, COLUMNS)
    largest = tl.full([COLUMNS], float("-inf"), tl.float32)
    for start in range(0, columns, COLUMNS):
        inside = start + c < columns
        value = tl.load(from_row + start + c, mask=inside, other=float("-inf"))
        largest = tl.maximum(largest, value)
    most = tl.max(largest, 0)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        inside = start + c < columns
        value = tl.load(from_row + start + c, mask=inside, other=float("-inf"))
        weight = tl.exp((value - most) * scale).to(weights.dtype.element_ty)
        tl.store(to_row + start + c, weight, mask=inside)
        total += tl.where(inside, weight.to(tl.float32), 0)
    tl.store(sums + row, tl.sum(total, 0))


def run_softmax_rows(scores: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Runs `softmax_rows` on ``(R, C)`` in float32; returns the weights, ``(R, C)`` in ``dtype``,
    and their sums, ``(R, 1)`` in float32."""
    rows, columns = scores.shape
    weights = torch.empty_like(scores, dtype=dtype)
    sums = scores.new_empty(rows, 1)
    block = min(COLUMNS, triton.next_power_of_2(columns))
    with torch.cuda.device_of(scores):  # type: ignore[no-untyped-call]
        softmax_rows[(rows,)](scores, weights, sums, columns, scale, COLUMNS=block, num_warps=WARPS)
    return weights, sums
