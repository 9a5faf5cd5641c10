"""Each shape gets its method, or the next best one if its packed weight exceeds the limit."""

from __future__ import annotations

import pytest

from sdconv.fast.cpu.cost_model import plan_conv
from sdconv.fast.cpu.winograd import Kind


@pytest.mark.parametrize(
    "shape, method",
    [
        ((1, 1280, 1280, 8, 8), "winograd_uncached"),
        ((1, 2560, 1280, 16, 16), "winograd_uncached"),
        ((1, 320, 320, 64, 64), "winograd"),
        ((1, 128, 128, 512, 512), "winograd"),
        ((1, 4, 320, 64, 64), "direct"),
        ((1, 128, 3, 512, 512), "direct"),
    ],
)
def test_each_shape_has_its_method(shape: tuple[int, int, int, int, int], method: str) -> None:
    plan = plan_conv("conv3x3", *shape)
    assert plan.method == method
    assert min(plan.costs, key=lambda cost: cost[1])[0] == method
    assert "times as long" in plan.reason


def test_without_room_the_next_best_is_taken_and_said() -> None:
    shape = 1, 512, 512, 64, 64
    for available in (("winograd_uncached",), ()):
        plan = plan_conv("conv3x3", *shape, False, available)
        assert plan.method == (available or ("direct",))[0] and plan.packed_bytes == 0
        assert "no room for the packed weight of winograd" in plan.reason
    small = plan_conv("conv3x3", 1, 1280, 1280, 8, 8, False, ("winograd",))
    assert small.method == "winograd" and "needs Numba" in small.reason


def test_a_weight_that_panels_do_not_divide_is_cached() -> None:
    for channels, out_channels in ((1280, 1272), (1272, 1280)):
        plan = plan_conv("conv3x3", 1, channels, out_channels, 8, 8)
        assert plan.method == "winograd"
        assert "winograd_uncached" not in dict(plan.costs)


def test_upsampling_and_downsampling_have_plans_too() -> None:
    upsample = plan_conv("upsample_conv", 1, 512, 512, 64, 64)
    assert (upsample.method, upsample.packed_bytes) == ("winograd", 25 * 4 * 512 * 512)
    assert plan_conv("upsample_conv", 1, 512, 512, 64, 64, False, ()).method == "direct"
    downsample = plan_conv("downsample_conv", 1, 128, 128, 64, 64)
    # the tile positions of odd rows and columns share their kernels
    assert (downsample.method, downsample.packed_bytes) == ("winograd", 36 * 4 * 128 * 128)
    odd = plan_conv("downsample_conv", 1, 128, 128, 65, 64)
    assert odd.method == "direct" and "odd sizes" in odd.reason


@pytest.mark.parametrize("kind", ["conv3x3", "upsample_conv"])
def test_a_processor_with_matrix_units_computes_directly(kind: Kind) -> None:
    shape = (1, 512, 512, 64, 64)
    with_amx = plan_conv(kind, *shape, True, direct_rate=8.0)
    assert with_amx.method == "direct" and with_amx.packed_bytes == 0
    assert "natively" in with_amx.reason
    # twice the rate of float32 is less than what Winograd saves
    for rate in (1.0, 2.0):
        plan = plan_conv(kind, *shape, True, direct_rate=rate)
        assert plan.method == "winograd" and "natively" not in plan.reason
