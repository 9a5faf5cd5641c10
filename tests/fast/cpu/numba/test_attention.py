"""Numba's attention against torch's in float64, and faults that this must show."""

from __future__ import annotations

import pytest
import torch
from helpers.numbers import error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu.kernels import numba_kernels

pytest.importorskip("numba", reason="the kernels need numba: pip install sdconv[fast]")


def drawn(
    batch: int, heads: int, queries: int, keys: int, depth: int, value_depth: int
) -> list[Tensor]:
    """Queries, keys and values, in memory row by row with the heads of a row together."""
    random = torch.Generator().manual_seed(queries + keys)
    sizes = ((queries, depth), (keys, depth), (keys, value_depth))
    return [
        torch.randn(batch, rows, heads, width, generator=random).transpose(1, 2)
        for rows, width in sizes
    ]


def ours(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    out = numba_kernels()[0].attention(query, key, value, scale)
    assert out is not None
    return out


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    given = (query.double(), key.double(), value.double())
    return functional.scaled_dot_product_attention(*given, scale=scale)


@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    queries=st.integers(1, 420),
    keys=st.sampled_from([1, 5, 6, 7, 77, 96, 97, 192, 400]),
    depth=st.sampled_from([1, 40, 64]),
    value_depth=st.sampled_from([4, 5, 8, 12, 32, 40, 64]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
)
@settings(max_examples=60)
def test_any_shape(
    batch: int, heads: int, queries: int, keys: int, depth: int, value_depth: int, scale: float
) -> None:
    given = drawn(batch, heads, queries, keys, depth, value_depth)
    # the error of a score grows with the score, which has a deviation of scale * sqrt(depth)
    within = 3e-6 * max(1.0, scale * depth**0.5 / 4)
    assert error(ours(*given, scale), exact(*given, scale)) < within
    assert torch.equal(ours(*given, scale), ours(*given, scale))


def test_many_keys_do_not_add_up_to_an_error() -> None:
    given = drawn(1, 1, 32, 20000, 40, 40)
    assert error(ours(*given, 0.16), exact(*given, 0.16)) < 2e-6


def test_scores_far_below_the_largest_count_as_nothing() -> None:
    query, key, value = drawn(1, 1, 20, 300, 40, 40)
    key[:, :, 250] = 100 * query[:, :, 3]
    given = (query, key, value)
    out = ours(*given, 1.0)
    assert error(out, exact(*given, 1.0)) < 1e-5
    assert error(out[0, 0, 3], value[0, 0, 250]) < 1e-6


def test_other_memory_layouts() -> None:
    given = drawn(2, 3, 70, 90, 8, 8)
    expected = ours(*given, 0.3)
    assert torch.equal(ours(*(one.contiguous() for one in given), 0.3), expected)
    query, key, value = given
    one_for_all = key[:, :1].expand_as(key)
    assert error(ours(query, one_for_all, value, 0.3), exact(query, one_for_all, value, 0.3)) < 5e-6


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_where_torch_has_it(which: int) -> None:
    given = drawn(1, 2, 70, 80, 8, 8)
    given[which][0, 1, 66, 3] = float("nan")
    out, expected = ours(*given, 0.3), exact(*given, 0.3)
    assert torch.equal(out.isnan(), expected.isnan())
    assert 0 < int(out.isnan().sum()) <= out[0, 1].numel()


def test_another_scale_and_missing_keys_are_noticed() -> None:
    given = drawn(1, 2, 70, 200, 40, 40)
    out = ours(*given, 0.2)
    assert error(out, exact(*given, 0.2)) < 5e-6
    assert error(out, exact(*given, 0.21)) > 1e-3
    query, key, value = given
    # the last chunk of keys left out
    assert error(out, exact(query, key[:, :, :192], value[:, :, :192], 0.2)) > 1e-3


def test_value_depths_and_layouts_without_a_kernel_are_left_to_torch() -> None:
    query, key, value = drawn(1, 1, 3, 3, 4, 7)
    assert numba_kernels()[0].attention(query, key, value, 1.0) is None
    turned = key.transpose(2, 3).contiguous().transpose(2, 3)
    assert numba_kernels()[0].attention(query, turned, key, 1.0) is None
