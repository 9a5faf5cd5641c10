"""Sizes, counts and receptive fields, compared with torch's layers, counters and gradients."""

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
    ReceptiveField,
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
    """From 3 to 64 channels at 100x100, with 3x3 kernels or with a dense layer."""
    inputs, outputs = 3 * 100 * 100, 64 * 100 * 100
    assert conv_parameters(3, 64, 3) == 1_792
    assert dense_parameters(inputs, outputs) == 19_200_640_000
    assert conv_multiplies(3, 64, 3, 100) == 17_280_000
    assert dense_multiplies(inputs, outputs) == 19_200_000_000
    # An image twice as wide needs twice the multiplies, and not one weight more.
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


def field_of(chain: list[Layer]) -> ReceptiveField:
    field = ReceptiveField()
    for layer in chain:
        field = field.upsampled(layer) if isinstance(layer, int) else field.through(*layer)
    return field


def run(chain: list[Layer], x: torch.Tensor) -> torch.Tensor:
    """The chain in torch on (rows, columns); kernels of ones, so that no paths cancel out."""
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
    """A function from an output's (row, column) to the input rows and columns of its gradient."""
    x = torch.ones(size, size, dtype=torch.float64, requires_grad=True)
    out = run(chain, x)

    def at(row: int, column: int) -> tuple[list[int], list[int]]:
        (gradient,) = torch.autograd.grad(out[row, column], x, retain_graph=True)
        support = gradient != 0
        assert support.sum() == support.any(1).sum() * support.any(0).sum()  # a rectangle
        rows, columns = support.any(1).nonzero(), support.any(0).nonzero()
        return rows.flatten().tolist(), columns.flatten().tolist()

    return at


def assert_field_is_what_the_gradient_reaches(chain: list[Layer], size: int) -> None:
    """At outputs on the diagonal, and one column further, whose spans are inside the image."""
    field, at = field_of(chain), seen(chain, size)
    count = run(chain, torch.zeros(size, size)).shape[0]
    spans = [field.span(index) for index in range(count)]
    inside = [i for i, (first, last) in enumerate(spans) if first >= 0 and last < size]
    positions = [(i, j) for i in inside for j in (i, i + 1) if j in inside]
    assert len(positions) > 2 * len(field.firsts)  # every output of a period is covered
    sizes = set()
    for row, column in positions:
        for index, pixels in zip((row, column), at(row, column), strict=True):
            first, last = spans[index]
            assert pixels == list(range(first, last + 1))
            sizes.add(len(pixels))
    assert field.size == max(sizes)


@pytest.mark.parametrize(
    ("chain", "size", "downscale", "offset"),
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
def test_known_receptive_fields(
    chain: list[Layer], size: int, downscale: Fraction | int, offset: int
) -> None:
    field = field_of(chain)
    assert (field.size, field.downscale, field.offset) == (size, downscale, offset)
    assert_field_is_what_the_gradient_reaches(chain, 40)


def test_after_upsampling_neighbours_have_unequal_fields() -> None:
    """Four and five pixels in turn; 4.5, the mean, is what the closed form would give."""
    chain: list[Layer] = [CONV3, 2, CONV3, 2, CONV3]
    field = field_of(chain)
    sizes = [last - first + 1 for first, last in map(field.span, range(4))]
    assert set(sizes) == {4, 5}
    assert Fraction(sum(sizes), 4) == 1 + 2 + 2 * Fraction(1, 2) + 2 * Fraction(1, 4)
    assert_field_is_what_the_gradient_reaches(chain, 20)


convs = st.builds(
    lambda stride, more, padding: (stride + more, stride, padding),
    st.integers(1, 3),
    st.integers(0, 3),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(convs, st.integers(1, 3)), min_size=1, max_size=5))
def test_any_chain_reaches_what_its_gradient_reaches(chain: list[Layer]) -> None:
    field = field_of(chain)
    factor = math.prod(layer for layer in chain if isinstance(layer, int))
    assume(field.size + 6 * field.period <= 160 and factor <= 9)
    size = field.size + 6 * field.period + max(0, -field.offset)
    at = seen(chain, size)
    period = len(field.firsts)
    start = next(i for i in range(10**6) if field.span(i)[0] >= 0)
    for index in range(start, start + 2 * period):
        first, last = field.span(index)
        assert at(index, start) == (
            list(range(first, last + 1)),
            list(range(field.span(start)[0], field.span(start)[1] + 1)),
        )


@quick
@given(st.lists(convs, max_size=6))
def test_without_upsampling_it_is_the_closed_form(chain: list[Conv]) -> None:
    """The sums to which Araujo et al. solve the recurrence, written from the paper."""
    strides = [stride for _, stride, _ in chain]
    steps = [math.prod(strides[:layer]) for layer in range(len(chain))]
    field = field_of(list(chain))
    assert field.size == 1 + sum((k - 1) * s for (k, _, _), s in zip(chain, steps, strict=True))
    assert field.downscale == math.prod(strides)
    assert field.offset == -sum(p[0] * s for (_, _, p), s in zip(chain, steps, strict=True))


def test_the_papers_networks() -> None:
    """AlexNet v2 and VGG-16 up to their last pooling; numbers from the paper's table."""
    pool3: Conv = (3, 2, (0, 0))
    alexnet: list[Layer] = [(11, 4, (0, 0)), pool3, (5, 1, (2, 2)), pool3, *[CONV3] * 3, pool3]
    pool2: Conv = (2, 2, (0, 0))
    vgg: list[Layer] = []
    for count in (2, 2, 3, 3, 3):
        vgg += [*[CONV3] * count, pool2]
    for chain, expected in ((alexnet, (195, 32, -64)), (vgg, (212, 32, -90))):
        field = field_of(chain)
        assert (field.size, field.downscale, field.offset) == expected


# --- errors


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: output_size(0, 3), "size: not a valid number"),
        (lambda: output_size(8, 0), "kernel: not a valid number"),
        (lambda: output_size(8, 3, 0), "stride: not a valid number"),
        (lambda: output_size(8, 3, 1, (0, -1)), "padding: not a valid number"),
        (lambda: output_size(8, 3, 1, (0, 1, 2)), "padding: not a valid number or pair"),
        (lambda: output_size(8, "3"), "kernel: not a valid number"),
        (lambda: ReceptiveField().through(0), "kernel: not a valid number"),
        (lambda: ReceptiveField().through(3, 0), "stride: not a valid number"),
        (lambda: ReceptiveField().through(3, 1, (-1, 0)), "padding: not a valid number"),
        (lambda: ReceptiveField().upsampled(0), "factor: not a valid number"),
        (lambda: ReceptiveField().upsampled(0.5), "factor: not a valid number"),
        (lambda: conv_parameters(0, 1, 1), "in_channels: not a valid number"),
        (lambda: conv_parameters(1, 0, 1), "out_channels: not a valid number"),
        (lambda: conv_parameters(1, 1, (1, 0)), "kernel: not a valid number"),
        (lambda: conv_multiplies(1, 1, 1, (0, 1)), "output: not a valid number"),
        (lambda: dense_parameters(0, 1), "inputs: not a valid number"),
        (lambda: dense_multiplies(1, 0), "outputs: not a valid number"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value).startswith(text)


def test_errors_say_what_was_expected_and_what_was_given() -> None:
    with pytest.raises(InputError) as error:
        output_size(8, 3, -2)
    assert str(error.value) == (
        "stride: not a valid number\n  expected: a whole number, 1 or more\n  got: -2"
    )
    with pytest.raises(InputError) as error:
        conv_parameters(1, 1, (3, 3, 3))
    assert str(error.value) == (
        "kernel: not a valid number or pair\n"
        "  expected: one whole number, or two for (rows, columns)\n"
        "  got: (3, 3, 3)"
    )
    with pytest.raises(InputError) as error:
        output_size(4, 7, 1, (1, 1))
    assert str(error.value) == (
        "kernel: the kernel is larger than the padded input\n"
        "  expected: at most 6 (4 of the input, 1 before, 1 after)\n"
        "  got: 7\n"
        "  hint: pad more, or use a larger input"
    )
    assert output_size(4, 6, 1, (1, 1)) == 1


def test_it_needs_no_torch() -> None:
    code = "import sys, sdconv.convolution.geometry; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
