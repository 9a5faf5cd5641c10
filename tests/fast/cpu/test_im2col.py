"""Convolutions by im2col against torch's in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from helpers.numbers import error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu.conv import Epilogue, Prologue, direct_conv, im2col_conv
from sdconv.fast.cpu.group_stats import group_stats


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(x: Tensor, weight: Tensor, before: Prologue | None, after: Epilogue) -> Tensor:
    def double(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.double()

    before = before and replace(before, weight=before.weight.double(), bias=before.bias.double())
    after = Epilogue(double(after.bias), double(after.temb), double(after.residual))
    return direct_conv(x.double(), weight.double(), before, after)


@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([4, 24, 64]),
    out_channels=st.sampled_from([3, 16, 80, 136]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    full=st.booleans(),
)
def test_any_shape(
    batch: int,
    channels: int,
    out_channels: int,
    height: int,
    width: int,
    layout: torch.memory_format,
    full: bool,
) -> None:
    x = random(batch, channels, height, width).contiguous(memory_format=layout)
    weight = random(out_channels, channels, 3, 3, seed=1) / (9 * channels) ** 0.5
    before, after = None, Epilogue(random(out_channels, seed=2))
    if full and height * width > 1:
        scale, shift = random(channels, seed=3), random(channels, seed=4)
        before = Prologue(group_stats(x, 4), scale, shift, 1e-5, True)
        residual = random(batch, out_channels, height, width, seed=5)
        after = Epilogue(after.bias, random(batch, out_channels, seed=6), residual)
    out = im2col_conv(x, weight, before, after)
    # groups of a few nearly equal values lose digits in the normalisation
    assert error(out, expected(x, weight, before, after)) < (1e-4 if before else 2e-6)
    assert out.permute(0, 2, 3, 1).is_contiguous()


def test_an_output_shifted_by_a_pixel_is_noticed() -> None:
    x, weight = random(1, 8, 6, 6), random(16, 8, 3, 3, seed=1)
    out = im2col_conv(x, weight, None, Epilogue())
    assert error(out.roll(1, dims=3), functional.conv2d(x.double(), weight.double(), padding=1)) > 1


def test_infinity_stays_where_the_sum_has_it() -> None:
    x, weight = random(1, 8, 6, 6), random(16, 8, 3, 3, seed=1)
    x[0, 3, 2, 2] = torch.inf
    out = im2col_conv(x, weight, None, Epilogue())
    assert torch.equal(out.isfinite(), functional.conv2d(x, weight, padding=1).isfinite())
