"""Convolutions of small maps against torch's, in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.numbers import error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu import conv as fused
from sdconv.fast.cpu import packed
from sdconv.fast.cpu.conv import After
from sdconv.fast.cpu.cost_model import choose
from sdconv.fast.cpu.group_stats import Norm


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(x: Tensor, weight: Tensor, norm: Norm | None, after: After) -> Tensor:
    def double(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.double()

    norm = norm and Norm(
        norm.moments, norm.weight.double(), norm.bias.double(), norm.eps, norm.silu
    )
    after = After(double(after.bias), double(after.added), double(after.residual))
    return fused.direct(x.double(), weight.double(), norm, after)


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
    norm, after = None, After(random(out_channels, seed=2))
    if full and height * width > 1:
        norm = Norm(
            fused.moments(x, 4), random(channels, seed=3), random(channels, seed=4), 1e-5, True
        )
        residual = random(batch, out_channels, height, width, seed=5)
        after = After(after.bias, random(batch, out_channels, seed=6), residual)
    out = packed.convolution(x, weight, norm, after)
    # groups of a few nearly equal values lose digits in the normalisation
    assert error(out, expected(x, weight, norm, after)) < (1e-4 if norm else 2e-6)
    assert out.permute(0, 2, 3, 1).is_contiguous()


def test_a_pixel_beside_is_noticed() -> None:
    x, weight = random(1, 8, 6, 6), random(16, 8, 3, 3, seed=1)
    out = packed.convolution(x, weight, None, After())
    assert error(out.roll(1, dims=3), functional.conv2d(x.double(), weight.double(), padding=1)) > 1


def test_infinity_stays_where_the_sum_has_it() -> None:
    x, weight = random(1, 8, 6, 6), random(16, 8, 3, 3, seed=1)
    x[0, 3, 2, 2] = torch.inf
    out = packed.convolution(x, weight, None, After())
    assert torch.equal(out.isfinite(), functional.conv2d(x, weight, padding=1).isfinite())


@pytest.mark.parametrize(
    "shape, method",
    [
        ((1, 1280, 1280, 8, 8), "packed"),
        ((1, 2560, 1280, 16, 16), "winograd"),
        ((1, 128, 128, 512, 512), "winograd"),
        ((1, 4, 320, 64, 64), "direct"),
        ((1, 128, 3, 512, 512), "direct"),
    ],
)
def test_each_shape_has_its_method(shape: tuple[int, int, int, int, int], method: str) -> None:
    choice = choose(*shape)
    assert choice.method == method
    assert min(choice.costs, key=lambda cost: cost[1])[0] == method
    assert "times as long" in choice.reason


def test_without_room_the_next_best_is_taken_and_said() -> None:
    assert choose(1, 1280, 1280, 8, 8, ("winograd",)).method == "winograd"
    choice = choose(1, 512, 512, 64, 64, ())
    assert choice.method == "direct"
    assert "no room for what winograd prepares" in choice.reason
