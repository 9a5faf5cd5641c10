"""GroupNorm by torch's operations, as where Triton is missing, and as an operator. The kernels'
tests are in ``test_triton_kernels.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.numbers import error
from helpers.versions import fails_on_torch_2_6
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cuda import group_norm
from sdconv.fast.cuda.epilogue import group_stats

GROUPS, EPS = 4, 1e-6
# relative to the largest value
WITHIN = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def drawn(
    seed: int = 0,
    batch: int = 1,
    channels: int = 12,
    height: int = 9,
    width: int = 7,
    dtype: torch.dtype = torch.float32,
    terms: int = 2,
    strided: bool = False,
) -> list[Any]:
    """Feature map, offset, time embedding, statistics, weight and bias."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    x = draw(batch, channels, height, (1 + strided) * width)[..., :: 1 + strided] + 3
    offset = draw(channels) if terms > 0 else None
    added = draw(batch, channels) if terms > 1 else None
    return [x, offset, added, None, draw(channels), draw(channels)]


def exact(case: list[Any], silu: bool) -> Tensor:
    """The result in float64, written out."""
    x, offset, added, _, weight, bias = (None if one is None else one.double() for one in case)
    assert x is not None
    for one in (offset, added):
        if one is not None:
            x = x + one[..., None, None]
    grouped = x.reshape(len(x), GROUPS, -1)
    mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, correction=0)
    x = ((grouped - mean) / (variance + EPS).sqrt()).reshape(x.shape)
    assert weight is not None and bias is not None
    x = x * weight[:, None, None] + bias[:, None, None]
    return functional.silu(x) if silu else x


cases = st.builds(
    drawn,
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 2),
    channels=st.sampled_from([8, 12, 40]),
    # of fewer values the deviation can be small compared with the mean
    height=st.integers(3, 9),
    width=st.integers(2, 8),
    dtype=st.sampled_from(list(WITHIN)),
    terms=st.integers(0, 2),
    strided=st.booleans(),
)


@given(case=cases, silu=st.booleans(), known=st.booleans())
@settings(max_examples=40)
def test_by_torch(case: list[Any], silu: bool, known: bool) -> None:
    expected = exact(case, silu)
    if known:
        x, offset, added, *_ = case
        case[3] = group_stats(group_norm.total(x, offset, added), GROUPS)
    out = group_norm.group_norm(*case, GROUPS, EPS, silu)
    assert out.dtype == case[0].dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, expected) < WITHIN[out.dtype]


def test_other_statistics_give_another_result() -> None:
    case = drawn()
    case[3] = group_stats(case[0], GROUPS)  # the fault: without offset and time embedding
    assert error(group_norm.group_norm(*case, GROUPS, EPS, True), exact(case, True)) > 1e-2


@fails_on_torch_2_6("its GroupNorm has no gradient for sizes that are symbols")
@pytest.mark.parametrize("terms", [0, 2])
def test_the_operator(terms: int) -> None:
    case = [None if one is None else one.requires_grad_() for one in drawn(terms=terms)]
    torch.library.opcheck(group_norm.operator, (*case, GROUPS, EPS, True))


def test_gradients_with_known_statistics() -> None:
    # the statistics depend on the feature map, though they are passed apart from it
    case = [None if one is None else one.double().requires_grad_() for one in drawn(height=3)]

    def run(x: Tensor) -> Tensor:
        total = group_norm.total(x, *case[1:3])
        stats = group_stats(total.detach(), GROUPS)
        out: Tensor = group_norm.operator(x, *case[1:3], stats, *case[4:], GROUPS, EPS, True)
        return out

    def plain(x: Tensor) -> Tensor:
        return exact([x, *case[1:]], True)

    found, expected = (
        torch.autograd.grad(function(case[0]).square().sum(), case[0])[0]
        for function in (run, plain)
    )
    assert error(found, expected) < 1e-6
