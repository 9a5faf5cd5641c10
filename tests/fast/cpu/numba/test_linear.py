"""Numba's linear layers, with a residual and with a GELU gate, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.numbers import error, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu.kernels import numba_kernels

pytest.importorskip("numba", reason="the kernels need numba: pip install sdconv[fast]")


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


def exact_geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    value, gate = exact_linear(x, weight, bias).chunk(2, dim=-1)
    return value * functional.gelu(gate)


def geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = numba_kernels()[0].geglu(x, weight, bias)
    assert out is not None
    return out


ROWS, DEPTH, BIAS = st.integers(256, 700), st.integers(1, 150), st.booleans()


@given(rows=ROWS, depth=DEPTH, columns=st.sampled_from([16, 48, 64, 144, 208]), bias=BIAS)
@settings(max_examples=25)
def test_a_residual(rows: int, depth: int, columns: int, bias: bool) -> None:
    x, weight = randn(1, rows, depth), randn(columns, depth, seed=1)
    added = randn(columns, seed=2) if bias else None
    residual = randn(1, rows, columns, seed=3)
    kept = residual.clone()
    out = numba_kernels()[0].linear(x, weight, added, residual)
    assert out is not None
    expected = exact_linear(x, weight, added) + residual
    assert error(out, expected) <= 1e-6
    assert torch.equal(residual, kept)
    # the residual of another row, and none
    assert error(out, expected - residual + residual.roll(1, 1)) > 0.01
    assert error(out, expected - residual) > 0.01


@given(rows=ROWS, depth=DEPTH, columns=st.sampled_from([16, 48, 64, 144, 208]), bias=BIAS)
@settings(max_examples=25)
def test_geglu(rows: int, depth: int, columns: int, bias: bool) -> None:
    x = randn(1, rows, depth)
    weight = randn(2 * columns, depth, seed=1) / depth**0.5
    added = randn(2 * columns, seed=2) if bias else None
    out, expected = geglu(x, weight, added), exact_geglu(x, weight, added)
    assert out.shape == (1, rows, columns)
    assert error(out, expected) <= 1e-6
    # the halves exchanged
    assert error(out, exact_geglu(x, weight.roll(columns, 0), added)) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depth", [5, 16, 70])
def test_a_weight_of_16_bits(dtype: torch.dtype, depth: int) -> None:
    """It is read as it is: the bits are those of a copy in float32."""
    kernels, x, full = numba_kernels()[0], randn(1, 300, depth), randn(96, depth, seed=1)
    weight = full.to(dtype)
    for out, wide, other in (
        (kernels.linear(x, one, None) for one in (weight, weight.float(), full)),
        (kernels.geglu(x, one, None) for one in (weight, weight.float(), full)),
    ):
        assert out is not None and wide is not None and other is not None
        assert torch.equal(out, wide)
        assert not torch.equal(out, other), "the control"


def test_gelu_in_its_whole_range() -> None:
    gates = torch.linspace(-30, 30, 512 * 16).view(512, 16)
    # the first half of the output is 1, the second half the gates
    weight = torch.cat([torch.zeros(16, 16), torch.eye(16)])
    bias = torch.cat([torch.ones(16), torch.zeros(16)])
    out, exact = geglu(gates, weight, bias), functional.gelu(gates.double())
    assert float((out - exact).abs().max()) < 1.5e-6
    assert float((out - exact)[gates < -5.5].abs().max()) < 2e-7
    # the approximation by tanh is noticed
    approximate = functional.gelu(gates.double(), approximate="tanh")
    assert float((out - approximate).abs().max()) > 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    x, weight = randn(300, 32), randn(64, 32, seed=1).abs()
    x[123, 4] = value
    for out in (geglu(x, weight, None), numba_kernels()[0].linear(x, weight, None, randn(300, 64))):
        assert out is not None
        assert not out[123].isfinite().any()
        assert out[:123].isfinite().all() and out[124:].isfinite().all()


def test_few_rows_and_odd_widths_are_left_to_torch() -> None:
    kernels = numba_kernels()[0]
    assert kernels.geglu(randn(255, 8), randn(32, 8), None) is None
    assert kernels.geglu(randn(256, 8), randn(36, 8), None) is None
    assert kernels.linear(randn(256, 8), randn(17, 8), None, randn(256, 17)) is None
