"""Upsampling convolutions in each variant, against torch's operations in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.numbers import error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdconv.fast.cpu.conv import direct_upsample_conv
from sdconv.fast.cuda import choices, upsample
from sdconv.fast.cuda.epilogue import interleave

# relative to the largest value; the summed taps are rounded to the weight's dtype once more
WITHIN = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def drawn(
    seed: int, batch: int, channels: int, out_channels: int, height: int, width: int
) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=random)
    return x, torch.randn(out_channels, channels, 3, 3, generator=random)


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
    variant=st.sampled_from(list(upsample.VARIANTS)),
    stride=st.sampled_from([1, 2]),
)
@settings(max_examples=60)
def test_equals_torch_in_float64(
    given_: tuple[Tensor, Tensor], dtype: torch.dtype, variant: str, stride: int
) -> None:
    x, weight = (tensor.to(dtype) for tensor in given_)
    x = x[..., ::stride]
    out = run(variant, x, weight)
    exact = direct_upsample_conv(x.double(), weight.double(), None)
    assert out.dtype is dtype
    assert error(out, exact) < WITHIN[dtype]


def run(variant: str, x: Tensor, weight: Tensor) -> Tensor:
    with choices.using({"upsample": variant}):
        out, subpixel = upsample.upsample_conv(x, weight)
    assert subpixel is (variant == "subpixel")
    return interleave(out) if subpixel else out


@pytest.mark.parametrize("variant", ["subpixel", "transposed"])
def test_exchanged_rows_and_columns_are_noticed(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = drawn(0, 1, 3, 2, 5, 6)  # the fault: kernels of even columns on even rows
    exact = direct_upsample_conv(x, weight, None)
    assert error(run(variant, x, weight), exact) < 2e-6
    right = upsample.sub_pixel_weights
    monkeypatch.setattr(upsample, "sub_pixel_weights", lambda weight: right(weight).transpose(0, 1))
    assert error(run(variant, x, weight), exact) > 1e-2


@pytest.mark.parametrize("variant", upsample.VARIANTS)
def test_gradients(variant: str) -> None:
    x, weight = (t.double().requires_grad_() for t in drawn(1, 1, 2, 2, 3, 2))
    assert torch.autograd.gradcheck(lambda x, weight: run(variant, x, weight), (x, weight))
