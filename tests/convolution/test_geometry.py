"""Sizes, counts and receptive fields, against torch's own layers, counters and gradients."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from sdconv.convolution.geometry import (
    Window,
    conv_multiplies,
    conv_parameters,
    dense_multiplies,
    dense_parameters,
    output_size,
)
from sdconv.errors import InputError

quick = settings(max_examples=80, deadline=None)
small = st.integers(1, 5)


@quick
@given(st.integers(1, 40), small, small, st.integers(0, 4), st.integers(0, 4))
def test_output_size_is_torchs(
    size: int, kernel: int, stride: int, before: int, after: int
) -> None:
    assume(kernel <= size + before + after)
    x = functional.pad(torch.zeros(1, 1, size, device="meta"), (before, after))
    theirs = functional.conv1d(x, torch.zeros(1, 1, kernel, device="meta"), stride=stride)
    assert output_size(size, kernel, stride, (before, after)) == theirs.shape[2]


# --- counts


def test_a_convolution_against_a_dense_layer_on_a_100x100_image() -> None:
    """From 3 to 64 channels at 100x100, either by 3x3 kernels or by joining all to all."""
    inputs, outputs = 3 * 100 * 100, 64 * 100 * 100
    assert conv_parameters(3, 64, 3) == 1_792
    assert dense_parameters(inputs, outputs) == 19_200_640_000
    assert conv_multiplies(3, 64, 3, 100) == 17_280_000
    assert dense_multiplies(inputs, outputs) == 19_200_000_000
    # An image twice as wide takes twice the work, and not one weight more.
    assert conv_multiplies(3, 64, 3, (100, 200)) == 34_560_000


def parameters(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def multiplies(layer: nn.Module, x: torch.Tensor) -> int:
    """What torch counts: two operations, one multiply and one add, for each."""
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return counter.get_total_flops() // 2


@settings(max_examples=40, deadline=None)
@given(st.tuples(small, small), st.tuples(small, small), st.booleans(), st.integers(8, 20))
def test_counts_are_torchs(
    channels: tuple[int, int], kernel: tuple[int, int], bias: bool, size: int
) -> None:
    conv = nn.Conv2d(*channels, kernel, padding=2, stride=2, bias=bias, device="meta")
    x = torch.zeros(1, channels[0], size, size + 3, device="meta")
    assert conv_parameters(*channels, kernel, bias=bias) == parameters(conv)
    assert conv_multiplies(*channels, kernel, tuple(conv(x).shape[2:])) == multiplies(conv, x)

    dense = nn.Linear(channels[0] * size, channels[1], bias=bias, device="meta")
    assert dense_parameters(dense.in_features, dense.out_features, bias=bias) == parameters(dense)
    row = torch.zeros(1, dense.in_features, device="meta")
    assert dense_multiplies(dense.in_features, dense.out_features) == multiplies(dense, row)


# --- receptive fields

Conv = tuple[int, int, tuple[int, int]]  # kernel, stride, padding (before, after)
Layer = Conv | int  # or the factor of a nearest upsampling

CONV3: Conv = (3, 1, (1, 1))
VAE_DOWN: Conv = (3, 2, (0, 1))
UNET_DOWN: Conv = (3, 2, (1, 1))


def window_of(chain: list[Layer]) -> Window:
    window = Window()
    for layer in chain:
        window = window.upsampled(layer) if isinstance(layer, int) else window.through(*layer)
    return window


def run(chain: list[Layer], x: torch.Tensor) -> torch.Tensor:
    """The chain in torch on (rows, columns); kernels of ones, so that no path cancels another."""
    x = x[None, None]
    for layer in chain:
        if isinstance(layer, int):
            x = functional.interpolate(x, scale_factor=layer, mode="nearest")
        else:
            kernel, stride, (before, after) = layer
            x = functional.pad(x, (before, after, before, after))
            x = functional.conv2d(x, x.new_ones(1, 1, kernel, kernel), stride=stride)
    return x[0, 0]


def seen(chain: list[Layer], size: int) -> Callable[[int, int], tuple[list[int], list[int]]]:
    """For an output (row, column), the input rows and columns that its gradient reaches."""
    x = torch.ones(size, size, dtype=torch.float64, requires_grad=True)
    out = run(chain, x)

    def at(row: int, column: int) -> tuple[list[int], list[int]]:
        (gradient,) = torch.autograd.grad(out[row, column], x, retain_graph=True)
        support = gradient != 0
        assert support.sum() == support.any(1).sum() * support.any(0).sum()  # a rectangle
        rows, columns = support.any(1).nonzero(), support.any(0).nonzero()
        return rows.flatten().tolist(), columns.flatten().tolist()

    return at


def assert_window_is_what_the_gradient_sees(chain: list[Layer], size: int) -> None:
    """At every output on the diagonal, and one column further, whose window is inside the image."""
    window, at = window_of(chain), seen(chain, size)
    count = run(chain, torch.zeros(size, size)).shape[0]
    spans = [window.span(index) for index in range(count)]
    inside = [i for i, (first, last) in enumerate(spans) if first >= 0 and last < size]
    places = [(i, j) for i in inside for j in (i, i + 1) if j in inside]
    assert len(places) > 2 * len(window.firsts)  # each place of a period is met
    sizes = set()
    for row, column in places:
        for index, pixels in zip((row, column), at(row, column), strict=True):
            first, last = spans[index]
            assert pixels == list(range(first, last + 1))
            sizes.add(len(pixels))
    assert window.size == max(sizes)


@pytest.mark.parametrize(
    ("chain", "size", "stride", "offset"),
    [
        ([CONV3], 3, 1, -1),
        ([CONV3, CONV3, CONV3], 7, 1, -3),
        ([(4, 4, (0, 0))], 4, 4, 0),
        ([CONV3, VAE_DOWN, CONV3], 9, 2, -3),
        ([CONV3, UNET_DOWN, CONV3], 9, 2, -4),
        ([VAE_DOWN, VAE_DOWN, VAE_DOWN], 15, 8, 0),
        ([2], 1, Fraction(1, 2), 0),
        ([2, CONV3], 2, Fraction(1, 2), -1),
        ([CONV3, 2, CONV3], 4, Fraction(1, 2), -2),
        ([UNET_DOWN, CONV3, 2, CONV3], 9, 1, -5),
        ([2, CONV3, CONV3, CONV3, 2, CONV3], 5, Fraction(1, 4), -2),
        ([3, CONV3, UNET_DOWN, CONV3], 4, Fraction(2, 3), -2),
    ],
)
def test_known_windows_and_the_gradient(
    chain: list[Layer], size: int, stride: Fraction | int, offset: int
) -> None:
    window = window_of(chain)
    assert (window.size, window.stride, window.offset) == (size, stride, offset)
    assert_window_is_what_the_gradient_sees(chain, 40)


def test_after_upsampling_neighbours_see_unequal_windows() -> None:
    """Four or five pixels by turns; 4.5, the mean, is what the closed form's sum would say."""
    chain: list[Layer] = [CONV3, 2, CONV3, 2, CONV3]
    window = window_of(chain)
    sizes = [last - first + 1 for first, last in map(window.span, range(4))]
    assert set(sizes) == {4, 5}
    assert Fraction(sum(sizes), 4) == 1 + 2 + 2 * Fraction(1, 2) + 2 * Fraction(1, 4)
    assert_window_is_what_the_gradient_sees(chain, 20)


convs = st.builds(
    lambda stride, more, padding: (stride + more, stride, padding),
    st.integers(1, 3),
    st.integers(0, 3),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(convs, st.integers(1, 3)), min_size=1, max_size=5))
def test_any_chain_sees_what_its_gradient_reaches(chain: list[Layer]) -> None:
    window = window_of(chain)
    factor = math.prod(layer for layer in chain if isinstance(layer, int))
    assume(window.size + 6 * window.step <= 160 and factor <= 9)
    size = window.size + 6 * window.step + max(0, -window.offset)
    at = seen(chain, size)
    period = len(window.firsts)
    start = next(i for i in range(10**6) if window.span(i)[0] >= 0)
    for index in range(start, start + 2 * period):
        first, last = window.span(index)
        assert at(index, start) == (
            list(range(first, last + 1)),
            list(range(window.span(start)[0], window.span(start)[1] + 1)),
        )


@quick
@given(st.lists(convs, max_size=6))
def test_without_upsampling_it_is_the_closed_form(chain: list[Conv]) -> None:
    """The sums that Araujo et al. solve the recurrence to, written from the paper."""
    strides = [stride for _, stride, _ in chain]
    steps = [math.prod(strides[:layer]) for layer in range(len(chain))]
    window = window_of(list(chain))
    assert window.size == 1 + sum((k - 1) * s for (k, _, _), s in zip(chain, steps, strict=True))
    assert window.stride == math.prod(strides)
    assert window.offset == -sum(p[0] * s for (_, _, p), s in zip(chain, steps, strict=True))


def test_the_papers_networks() -> None:
    """AlexNet v2 and VGG-16 up to their last pooling: size, stride and padding of its table."""
    pool3: Conv = (3, 2, (0, 0))
    alexnet: list[Layer] = [(11, 4, (0, 0)), pool3, (5, 1, (2, 2)), pool3, *[CONV3] * 3, pool3]
    pool2: Conv = (2, 2, (0, 0))
    vgg: list[Layer] = []
    for count in (2, 2, 3, 3, 3):
        vgg += [*[CONV3] * count, pool2]
    for chain, expected in ((alexnet, (195, 32, -64)), (vgg, (212, 32, -90))):
        window = window_of(chain)
        assert (window.size, window.stride, window.offset) == expected


# --- what they refuse


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: output_size(0, 3), "size: not a number that can be used here"),
        (lambda: output_size(8, 0), "kernel: not a number that can be used here"),
        (lambda: output_size(8, 3, 0), "stride: not a number that can be used here"),
        (lambda: output_size(8, 3, 1, (0, -1)), "padding: not a number that can be used here"),
        (lambda: output_size(8, 3, 1, (0, 1, 2)), "padding: not a number or pair that can"),
        (lambda: output_size(8, "3"), "kernel: not a number that can be used here"),
        (lambda: Window().through(0), "kernel: not a number that can be used here"),
        (lambda: Window().through(3, 0), "stride: not a number that can be used here"),
        (lambda: Window().through(3, 1, (-1, 0)), "padding: not a number that can be used here"),
        (lambda: Window().upsampled(0), "factor: not a number that can be used here"),
        (lambda: Window().upsampled(0.5), "factor: not a number that can be used here"),
        (lambda: conv_parameters(0, 1, 1), "in_channels: not a number that can be used here"),
        (lambda: conv_parameters(1, 0, 1), "out_channels: not a number that can be used here"),
        (lambda: conv_parameters(1, 1, (1, 0)), "kernel: not a number that can be used here"),
        (lambda: conv_multiplies(1, 1, 1, (0, 1)), "output: not a number that can be used here"),
        (lambda: dense_parameters(0, 1), "inputs: not a number that can be used here"),
        (lambda: dense_multiplies(1, 0), "outputs: not a number that can be used here"),
    ],
)
def test_refusals_name_the_argument(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value).startswith(text)


def test_refusals_say_what_was_expected_and_what_came() -> None:
    with pytest.raises(InputError) as error:
        output_size(8, 3, -2)
    assert str(error.value) == (
        "stride: not a number that can be used here\n"
        "  expected: a whole number, 1 or more\n"
        "  got: -2"
    )
    with pytest.raises(InputError) as error:
        conv_parameters(1, 1, (3, 3, 3))
    assert str(error.value) == (
        "kernel: not a number or pair that can be used here\n"
        "  expected: one whole number, or two for (rows, columns)\n"
        "  got: (3, 3, 3)"
    )
    with pytest.raises(InputError) as error:
        output_size(4, 7, 1, (1, 1))
    assert str(error.value) == (
        "kernel: the kernel is larger than the padded input\n"
        "  expected: at most 6 (4 of the input, 1 before, 1 after)\n"
        "  got: 7\n"
        "  hint: pad more, or give a larger input"
    )
    assert output_size(4, 6, 1, (1, 1)) == 1


def test_it_needs_no_torch() -> None:
    code = "import sys, sdconv.convolution.geometry; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
