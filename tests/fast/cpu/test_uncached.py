"""Winograd's products with a weight that is not cached, against torch's in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.numbers import error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu import torch_kernels
from sdconv.fast.cpu.buffer_pool import scratch
from sdconv.fast.cpu.conv import Epilogue, conv3x3, plan_for, upsample_conv
from sdconv.fast.cpu.kernels import Kernels, numba_kernels, uncached_bytes
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.fast.cpu.winograd import CONV3X3, UPSAMPLE_CONV, Scheme

WITHIN = 1e-6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_blocks(tiles: Tensor) -> Tensor:
    """Tiles ``(positions, T, C)`` as ``(C / 64, positions, T, 64)``."""
    return tiles.unflatten(2, (-1, 64)).permute(2, 0, 1, 3).contiguous()


def multiplied(kernels: Kernels, scheme: Scheme, tiles: Tensor, weight: Tensor) -> Tensor:
    shape = (tiles.shape[1], len(weight))
    tiles = in_blocks(tiles)
    out = scratch.planes("products", scheme.positions, shape, torch.float32)
    kernels.multiply_tiles(scheme, tiles, weight, out)
    return out.clone()


@pytest.mark.parametrize("scheme", [CONV3X3, UPSAMPLE_CONV], ids=["conv3x3", "upsample_conv"])
@given(
    tiles=st.integers(1, 70),
    channels=st.sampled_from([64, 128, 192]),
    out_channels=st.sampled_from([64, 128, 320]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_any_shape_dtype_and_layout(
    scheme: Scheme, tiles: int, channels: int, out_channels: int, dtype: Any, layout: Any
) -> None:
    given = random(scheme.positions, tiles, channels)
    weight = random(out_channels, channels, 3, 3, seed=1).to(dtype).contiguous(memory_format=layout)
    expected = torch.bmm(given.double(), scheme.kernel_transform(weight.double()))
    for kernels in (numba_kernels()[0], torch_kernels):
        assert error(multiplied(kernels, scheme, given, weight), expected) < WITHIN


def test_two_tiles_that_change_places_are_noticed() -> None:
    given, weight = random(36, 9, 64), random(64, 64, 3, 3, seed=1)
    expected = torch.bmm(given.double(), CONV3X3.kernel_transform(weight.double()))
    assert error(multiplied(numba_kernels()[0], CONV3X3, given.flip(1), weight), expected) > 0.1


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_same_bits_on_any_number_of_threads(threads: int) -> None:
    given, weight = random(36, 50, 64), random(64, 64, 3, 3, seed=1)
    once = multiplied(numba_kernels()[0], CONV3X3, given, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(multiplied(numba_kernels()[0], CONV3X3, given, weight), once)
    finally:
        torch.set_num_threads(before)


def test_a_convolution_keeps_no_weight_and_sees_each_change() -> None:
    x, weight = random(2, 640, 8, 8), random(640, 640, 3, 3, seed=1) / 76
    bias, before = random(640, seed=2), weight_cache.memory
    assert plan_for("conv3x3", x, weight, False).method == "winograd_uncached"
    assert plan_for("upsample_conv", x, weight, False).method == "winograd_uncached"
    larger = functional.interpolate(x.double(), scale_factor=2.0)
    with torch.inference_mode():
        for change in (1, -2):
            weight.data.mul_(change)
            found = conv3x3(x, weight, None, Epilogue(bias), groups=32)[0]
            exact = functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
            assert error(found, exact) < 5e-6
            found = upsample_conv(x, weight, bias, groups=32)[0]
            exact = functional.conv2d(larger, weight.double(), bias.double(), padding=1)
            assert error(found, exact) < 5e-6
    assert weight_cache.memory == before


def test_infinity_stays_where_the_sum_has_it() -> None:
    x, weight = random(1, 640, 8, 8), random(640, 640, 3, 3, seed=1)
    x[0, 3, 2, 2] = torch.inf
    with torch.inference_mode():
        out = conv3x3(x, weight, None, Epilogue(), groups=1)[0]
    assert torch.equal(out.isfinite(), functional.conv2d(x, weight, padding=1).isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiles", [1, 64])
def test_it_takes_no_more_memory_than_is_said(tiles: int, dtype: torch.dtype) -> None:
    given, weight = random(36, tiles, 128), random(256, 128, 3, 3, seed=1).to(dtype)
    numba_kernels()
    scratch.release()
    try:
        kernels = numba_kernels()[0]
        kernels.multiply_tiles(CONV3X3, in_blocks(given), weight, torch.empty(36, tiles, 256))
        taken = sum(one.nbytes for one in vars(scratch)["_buffers"].values())
    finally:
        scratch.release()
    said = uncached_bytes(tiles, weight)
    assert said / 4 < taken <= said
