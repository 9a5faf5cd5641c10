"""Upsampling convolutions by sub-pixel decomposition, against torch's operations in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.numbers import error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdconv.fast.cpu.conv import direct_upsample_conv
from sdconv.fast.cuda import upsample

# relative to the largest value; the summed taps are rounded to the weight's dtype once more
WITHIN = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def drawn(
    seed: int, batch: int, channels: int, out_channels: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=random)
    weight = torch.randn(out_channels, channels, 3, 3, generator=random)
    return x, weight, torch.randn(out_channels, generator=random)


@given(
    given_=st.builds(
        drawn,
        seed=st.integers(0, 2**16),
        batch=st.integers(1, 2),
        channels=st.integers(1, 9),
        out_channels=st.integers(1, 9),
        height=st.integers(1, 9),
        width=st.integers(1, 9),
    ),
    dtype=st.sampled_from(list(WITHIN)),
    with_bias=st.booleans(),
    stride=st.sampled_from([1, 2]),
)
@settings(max_examples=60)
def test_equals_torch_in_float64(
    given_: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, with_bias: bool, stride: int
) -> None:
    x, weight, bias = (tensor.to(dtype) for tensor in given_)
    x = x[..., ::stride]
    out = upsample.upsample_conv(x, weight, bias if with_bias else None)
    exact = direct_upsample_conv(x.double(), weight.double(), bias.double() if with_bias else None)
    assert out.dtype is dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, exact) < WITHIN[dtype]


def test_swapped_rows_and_columns_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = drawn(0, 1, 3, 2, 5, 6)  # the fault: kernels of even columns on even rows
    exact = direct_upsample_conv(x, weight, bias)
    assert error(upsample.upsample_conv(x, weight, bias), exact) < 2e-6
    right = upsample.sub_pixel_weights
    swapped = lambda weight: right(weight).transpose(0, 1)  # noqa: E731
    monkeypatch.setattr(upsample, "sub_pixel_weights", swapped)
    assert error(upsample.upsample_conv(x, weight, bias), exact) > 1e-2


def test_gradients() -> None:
    x, weight, bias = (t.double().requires_grad_() for t in drawn(1, 1, 2, 2, 3, 2))
    assert torch.autograd.gradcheck(upsample.upsample_conv, (x, weight, bias))
