"""Convolutions by Winograd's method against torch's own in float64."""

from __future__ import annotations

import threading
from fractions import Fraction

import pytest
import torch
from helpers import halos
from helpers.conv_cases import GROUPS, WITHIN, Case, expected_stats, in_place
from helpers.numbers import error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdconv.fast.cpu import group_stats
from sdconv.fast.cpu.buffer_pool import scratch
from sdconv.fast.cpu.conv import (
    Epilogue,
    NotFiniteError,
    direct_upsample_conv,
    downsample_conv,
    plan_for,
    winograd_conv,
)
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.fast.cpu.winograd import CONV3X3, DOWNSAMPLE_CONV, UPSAMPLE_CONV, Scheme, toom_cook

cases = st.builds(
    Case,
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 2),
    channels=st.sampled_from([4, 12, 68]),
    out_channels=st.sampled_from([4, 8, 132]),
    height=st.integers(1, 19),
    width=st.sampled_from([2, 3, 4, 5, 17, 40]),
    layout=st.sampled_from(["channels first", "channels last", "every other"]),
    dtype=st.sampled_from(list(WITHIN)),
    normed=st.booleans(),
    shortcut=st.booleans(),
)


@given(case=cases, tile_rows=st.sampled_from([None, 1, 2]))
@settings(max_examples=60)
def test_winograd_agrees_with_torch_in_float64(case: Case, tile_rows: int | None) -> None:
    with halos.strips_of(tile_rows):
        out, found = case.run()
    expected = case.expected()
    within = WITHIN[case.x.dtype]
    assert out.dtype == case.x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, expected) < within
    assert error(found, expected_stats(expected, GROUPS)) < 4 * within


@given(case=cases, tile_rows=st.sampled_from([None, 1, 2]))
@settings(max_examples=40)
def test_winograd_after_upsampling_agrees_with_torch_in_float64(
    case: Case, tile_rows: int | None
) -> None:
    bias = case.epilogue.bias
    with halos.strips_of(tile_rows):
        out, found = winograd_conv(case.x, case.weight, UPSAMPLE_CONV, None, Epilogue(bias), GROUPS)
    expected = direct_upsample_conv(case.x.double(), case.weight.double(), bias.double())
    within = WITHIN[case.x.dtype]
    assert out.dtype == case.x.dtype
    assert error(out, expected) < within
    assert error(found, expected_stats(expected, GROUPS)) < 4 * within


@given(
    case=cases,
    rows=st.integers(1, 12),
    columns=st.sampled_from([1, 2, 7, 20]),
    tile_rows=st.sampled_from([None, 1, 2]),
)
@settings(max_examples=40)
def test_winograd_at_stride_2_agrees_with_torch_in_float64(
    case: Case, rows: int, columns: int, tile_rows: int | None
) -> None:
    size, bias = (2 * rows, 2 * columns), case.epilogue.bias
    x = torch.randn(*case.x.shape[:2], *size, generator=torch.Generator().manual_seed(0))
    x = x.to(case.x.dtype)
    with halos.strips_of(tile_rows):
        out, found = winograd_conv(x, case.weight, DOWNSAMPLE_CONV, None, Epilogue(bias), GROUPS)
    padded = torch.nn.functional.pad(x.double(), (0, 1, 0, 1))
    expected = torch.nn.functional.conv2d(padded, case.weight.double(), bias.double(), stride=2)
    within = WITHIN[x.dtype]
    assert out.dtype == x.dtype
    assert error(out, expected) < within
    assert error(found, expected_stats(expected, GROUPS)) < 4 * within


@pytest.mark.parametrize("size", [(12, 14), (13, 14), (12, 15), (2, 2), (3, 3)])
def test_a_strided_convolution_is_exact_for_odd_sizes_too(size: tuple[int, int]) -> None:
    case = Case(height=size[0], width=size[1], channels=128, out_channels=128)
    out, _ = downsample_conv(case.x, case.weight, case.epilogue.bias, groups=GROUPS)
    padded = torch.nn.functional.pad(case.x.double(), (0, 1, 0, 1))
    expected = torch.nn.functional.conv2d(
        padded, case.weight.double(), case.epilogue.bias.double(), stride=2
    )
    assert error(out, expected) < WITHIN[torch.float32]
    method = plan_for("downsample_conv", case.x, case.weight, False).method
    if size[0] % 2 or size[1] % 2:
        assert method == "direct"


def test_statistics_of_values_far_from_zero() -> None:
    x = torch.randn(2, 8, 33, 21, generator=torch.Generator().manual_seed(0)) + 1000
    assert error(group_stats.group_stats(x, 4), expected_stats(x, 4)) < 1e-9


def test_in_place_the_input_is_overwritten_with_the_output() -> None:
    case = Case(channels=8, height=30)
    expected, stats = case.run()
    x = case.x.clone(memory_format=torch.channels_last)
    around = CONV3X3, case.prologue, case.epilogue, GROUPS
    with halos.strips_of(2):
        out, found = winograd_conv(x, case.weight, *around, in_place=True)
    assert out is x
    assert error(out, expected) < 1e-6
    assert error(found, stats) < 1e-6


def test_same_bits_each_time_and_nearly_so_for_other_strips() -> None:
    case = Case(height=40, width=33, channels=68)
    with halos.strips_of(2):
        once, found = case.run()
        again, found_again = case.run()
    assert torch.equal(once, again)
    assert torch.equal(found, found_again)
    for tile_rows in (1, 3, 10):
        with halos.strips_of(tile_rows):
            assert error(case.run()[0], once) < 1e-6


@given(
    case=st.builds(
        Case,
        seed=st.integers(0, 2**16),
        batch=st.integers(1, 2),
        channels=st.sampled_from([8, 68]),
        out_channels=st.sampled_from([4, 8, 132]),
        height=st.integers(1, 90),
        width=st.sampled_from([2, 5, 17, 70]),
        normed=st.booleans(),
        shortcut=st.booleans(),
        dtype=st.sampled_from(list(WITHIN)),
    ),
    count=st.integers(1, 9),
    tile_rows=st.integers(1, 3),
    scheme=st.sampled_from([CONV3X3, UPSAMPLE_CONV, DOWNSAMPLE_CONV]),
)
@settings(max_examples=60)
def test_bands_have_the_bits_of_strips(
    case: Case, count: int, tile_rows: int, scheme: Scheme
) -> None:
    if scheme is not CONV3X3:
        case.prologue, case.epilogue = None, Epilogue(case.epilogue.bias)
    if scheme is DOWNSAMPLE_CONV:
        case.x = case.x.repeat(1, 1, 2, 2).contiguous(memory_format=torch.channels_last)
    with halos.strips_of(1):
        expected, stats = case.run(scheme)
    with halos.bands_of(count, tile_rows):
        out, found = case.run(scheme)
    assert torch.equal(out, expected) and torch.equal(found, stats)


@pytest.mark.parametrize("height", [9, 130])
def test_the_default_dtype_and_device_make_no_difference(height: int) -> None:
    case = Case(height=height, shortcut=True)
    expected, stats = case.run()
    weight_cache.clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            out, found = case.run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, expected) and torch.equal(found, stats)


@pytest.mark.parametrize(("count", "tile_rows"), [(1, 1), (2, 3), (8, 2), (40, 1)])
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("height", [1, 4, 30, 32, 33, 131])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bands_in_place_have_the_bits_of_strips(
    dtype: torch.dtype, height: int, shortcut: bool, count: int, tile_rows: int
) -> None:
    case = Case(channels=8, height=height, shortcut=shortcut, dtype=dtype)
    with halos.strips_of(1):
        expected, stats = case.run()
    with halos.bands_of(count, tile_rows):
        out, found = in_place(case)
    assert torch.equal(out, expected) and torch.equal(found, stats)


def test_several_threads_at_once() -> None:
    case = Case(height=40, width=33, channels=68)
    found: list[Tensor] = []

    def work() -> None:
        for _ in range(10):
            found.append(case.run()[0])
        scratch.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    with halos.strips_of(2):
        expected = case.run()[0]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 40
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_an_output_that_is_not_finite_is_an_error(value: float) -> None:
    case = Case(normed=False)
    case.x[0, 3, 5, 6] = value
    with pytest.raises(NotFiniteError):
        case.run()
    with pytest.raises(NotFiniteError):
        winograd_conv(case.x, 4 * case.weight, UPSAMPLE_CONV, None, Epilogue(), GROUPS)
    with pytest.raises(NotFiniteError):
        even = case.x[:, :, :10].clone()
        even[0, 3, 6, 6] = value
        winograd_conv(even, 4 * case.weight, DOWNSAMPLE_CONV, None, Epilogue(), GROUPS)


def test_an_output_beyond_float16_is_an_error() -> None:
    """Whose sums are finite in float32."""
    for dtype in (torch.float16, torch.bfloat16):
        case = Case(normed=False, dtype=dtype)
        assert case.epilogue.bias is not None and case.epilogue.residual is not None
        case.run()
        case.epilogue.bias[3] = case.epilogue.residual[0, 3, 5, 6] = 65_000
        if dtype is torch.float16:
            with pytest.raises(NotFiniteError):
                case.run()
        else:
            assert case.run()[0].isfinite().all()


def test_the_points_lose_half_as_much_to_rounding_as_the_usual_ones() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 32, 32, generator=random)
    weight = torch.randn(32, 256, 3, 3, generator=random)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    # by the transforms in torch operations, which take any scheme
    lost = []
    for scheme in (CONV3X3, toom_cook(*map(Fraction, (0, 1, -1, 2, -2)))):
        rows = torch.nn.functional.pad(x[0].permute(1, 2, 0), (0, 0, 1, 1, 1, 1))
        kernel = scheme.kernel_transform(weight)
        out = scheme.output_transform(scheme.input_transform(rows) @ kernel, 8)
        lost.append((out.permute(2, 0, 1) - exact[0]).square().mean().sqrt())
    assert 0.3 < float(lost[0] / lost[1]) < 0.6
