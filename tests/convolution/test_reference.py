"""The reference agrees with torch, and shows what a convolution is and is not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from sdconv.convolution.geometry import output_size
from sdconv.convolution.reference import conv2d_reference, convolve, same_padding
from sdconv.errors import InputError

small = st.integers(1, 4)
quick = settings(max_examples=60, deadline=None)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(seed: int, *shape: int) -> torch.Tensor:
    """Whole numbers in float64, whose sums are exact, so results can be compared for equality."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).double()


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """Images, weight, bias, stride and four-sided padding that fit together."""
    batch, inputs, outputs = draw(small), draw(small), draw(small)
    kernel = draw(st.tuples(small, small))
    stride = draw(st.tuples(small, small))
    top, bottom, left, right = draw(st.tuples(*[st.integers(0, 3)] * 4))
    rows = draw(st.integers(max(1, kernel[0] - top - bottom), 12))
    columns = draw(st.integers(max(1, kernel[1] - left - right), 12))
    seed = draw(st.integers(0, 2**31))
    return {
        "x": randn(seed, batch, inputs, rows, columns),
        "weight": randn(seed + 1, outputs, inputs, *kernel),
        "bias": draw(st.sampled_from([None, randn(seed + 2, outputs)])),
        "stride": stride,
        "padding": (top, bottom, left, right),
    }


def torch_conv2d(layer: dict[str, Any]) -> torch.Tensor:
    top, bottom, left, right = layer["padding"]
    x = functional.pad(layer["x"], (left, right, top, bottom))
    return functional.conv2d(x, layer["weight"], layer["bias"], stride=layer["stride"])


def rounding_bound(layer: dict[str, Any]) -> torch.Tensor:
    """The most by which two float64 sums of the same products can differ, in any order.

    Adding n products and a bias in any order errs by at most gamma = (n+1)u / (1 - (n+1)u) times
    the sum of the absolute values, u = 2^-53 (Higham, Accuracy and Stability, section 3.1). Both
    sides may err by that, hence the factor 2; the last factor covers the bound's own rounding.
    """
    absolute = {name: layer[name] for name in ("stride", "padding")}
    for name in ("x", "weight", "bias"):
        absolute[name] = None if layer[name] is None else layer[name].abs()
    terms = (layer["weight"][0].numel() + 1) * 2.0**-53
    return 2 * terms / (1 - terms) * torch_conv2d(absolute) * (1 + 1e-9)


# --- the sum itself


@quick
@given(
    st.lists(st.integers(-999, 999), min_size=1, max_size=9),
    st.lists(st.integers(-999, 999), min_size=1, max_size=9),
)
def test_convolve_is_numpys_and_symmetric(a: list[int], b: list[int]) -> None:
    result = convolve(a, b)
    assert result == np.convolve(a, b).tolist() == convolve(b, a)
    assert all(isinstance(number, int) for number in result)


def test_convolve_multiplies_polynomials() -> None:
    # (1 + 2t + 3t^2)(t + 10t^2), as in the docstring.
    assert convolve([1, 2, 3], [0, 1, 10]) == [0, 1, 12, 23, 30]
    assert convolve([0.5], [4.0, 2.0]) == [2.0, 1.0]


def test_a_layer_is_the_convolution_with_its_kernel_flipped() -> None:
    a, b = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1]
    row = torch.tensor(a).double().reshape(1, 1, 1, 8)
    kernel = torch.tensor(b).double().reshape(1, 1, 1, 3)
    overlap = convolve(a, b)[len(b) - 1 : len(a)]
    assert conv2d_reference(row, kernel.flip(-1)).flatten().tolist() == overlap
    assert conv2d_reference(row, kernel).flatten().tolist() != overlap


@pytest.mark.parametrize("bad", [[], ["1"], [None], [1, 2j], 5, None])
def test_convolve_rejects_anything_but_numbers(bad: Any) -> None:
    for arguments, name in (((bad, [1]), "a"), (([1], bad), "b")):
        with pytest.raises(InputError) as error:
            convolve(*arguments)
        assert str(error.value) == (
            f"{name}: not a sequence of numbers\n"
            "  expected: one real number or more\n"
            f"  got: {bad!r}"
        )


# --- the layer


def test_the_equation_by_hand() -> None:
    """One output, summed in plain Python with the equation's indices."""
    x, w, b = integers(1, 1, 7, 9, 2), integers(2, 3, 2, 2, 4), integers(3, 4)
    z = conv2d_reference(x, w, b, stride=(2, 3), channels_last=True)
    assert z.shape == (1, 3, 3, 4)
    i, j, k = 2, 1, 3
    by_hand = b[k].item()
    for u in range(3):
        for v in range(2):
            for k_in in range(2):
                by_hand += x[0, i * 2 + u, j * 3 + v, k_in].item() * w[u, v, k_in, k].item()
    assert z[0, i, j, k].item() == by_hand


@settings(max_examples=200, deadline=None)
@given(layers())
def test_reference_is_torchs_conv2d(layer: dict[str, Any]) -> None:
    ours, theirs = conv2d_reference(**layer), torch_conv2d(layer)
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs() <= rounding_bound(layer)).all()


def test_the_rounding_bound_can_be_exceeded() -> None:
    """Negative control: an error of 1e-12 in the weight exceeds the bound."""
    layer = {"x": randn(1, 1, 3, 8, 8), "weight": randn(2, 4, 3, 3, 3), "bias": randn(3, 4)}
    layer |= {"stride": (1, 1), "padding": (1, 1, 1, 1)}
    off = conv2d_reference(**(layer | {"weight": layer["weight"] * (1 + 1e-12)}))
    assert ((off - torch_conv2d(layer)).abs() > rounding_bound(layer)).any()


@quick
@given(layers())
def test_channels_last_is_the_same_layer_in_tensorflows_order(layer: dict[str, Any]) -> None:
    last = layer | {
        "x": rearrange(layer["x"], "b c h w -> b h w c"),
        "weight": rearrange(layer["weight"], "o i u v -> u v i o"),
    }
    ours = conv2d_reference(**last, channels_last=True)
    assert torch.equal(rearrange(ours, "b h w c -> b c h w"), conv2d_reference(**layer))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@quick
@given(layers())
def test_same_at_stride_1_is_torchs(layer: dict[str, Any]) -> None:
    x, weight = layer["x"].mul(8).round(), layer["weight"].mul(8).round()
    theirs = functional.conv2d(x, weight, padding="same")
    assert torch.equal(conv2d_reference(x, weight, padding="same"), theirs)


def tensorflow_same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """SAME as TensorFlow's own guide defines it, by the remainder instead of the output size."""
    if size % stride == 0:
        total = max(kernel - stride, 0)
    else:
        total = max(kernel - size % stride, 0)
    return total // 2, total - total // 2


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 9))
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int) -> None:
    padding = same_padding(size, kernel, stride)
    assert padding == tensorflow_same(size, kernel, stride)
    if kernel >= stride:
        assert output_size(size, kernel, stride, padding) == math.ceil(size / stride)


@quick
@given(layers())
def test_same_at_any_stride_pads_as_tensorflow_does(layer: dict[str, Any]) -> None:
    x, weight, stride = layer["x"], layer["weight"], layer["stride"]
    sides = [tensorflow_same(x.shape[2 + a], weight.shape[2 + a], stride[a]) for a in (0, 1)]
    explicit = conv2d_reference(x, weight, stride=stride, padding=(*sides[0], *sides[1]))
    same = conv2d_reference(x, weight, stride=stride, padding="same")
    assert torch.equal(same, explicit)
    assert same.shape[2:] == tuple(math.ceil(x.shape[2 + a] / stride[a]) for a in (0, 1))


@pytest.mark.parametrize("rows", [6, 7, 16])
@pytest.mark.parametrize("columns", [8, 9])
def test_the_vaes_padding_is_same_on_even_sizes_only(rows: int, columns: int) -> None:
    """The VAE downsamples with F.pad(x, (0, 1, 0, 1)) and a 3x3 convolution at stride 2."""
    x, weight = integers(4, 1, 2, rows, columns), integers(5, 3, 2, 3, 3)
    vae = functional.conv2d(functional.pad(x, (0, 1, 0, 1)), weight, stride=2)
    ours = conv2d_reference(x, weight, stride=2, padding=(0, 1, 0, 1))
    same = conv2d_reference(x, weight, stride=2, padding="same")
    assert torch.equal(ours, vae)
    assert torch.equal(same, vae) == (rows % 2 == 0 and columns % 2 == 0)


# --- what sharing weights gives


@quick
@given(st.integers(-3, 3), st.integers(-3, 3), st.integers(0, 2**31))
def test_translation_equivariance(down: int, right: int, seed: int) -> None:
    """Shift, then convolve = convolve, then shift, except near the padded border."""
    x, weight = integers(seed, 1, 2, 14, 15), integers(seed + 1, 3, 2, 3, 3)
    shift = {"shifts": (down, right), "dims": (2, 3)}
    first = conv2d_reference(x.roll(**shift), weight, padding="same")
    then = conv2d_reference(x, weight, padding="same").roll(**shift)
    inside = (..., slice(4, -4), slice(4, -4))  # 3 for the shift, 1 for the kernel
    assert torch.equal(first[inside], then[inside])


def test_equivariance_ends_at_the_border_and_with_a_dense_layer() -> None:
    """Negative controls: without the crop, and with a layer that does not share its weights."""
    x, weight = integers(8, 1, 1, 10, 10), integers(9, 1, 1, 3, 3)
    shift = {"shifts": (2, 1), "dims": (2, 3)}
    first = conv2d_reference(x.roll(**shift), weight, padding="same")
    then = conv2d_reference(x, weight, padding="same").roll(**shift)
    assert not torch.equal(first, then)

    matrix = integers(10, 100, 100)

    def dense(image: torch.Tensor) -> torch.Tensor:
        return (image.flatten() @ matrix).reshape(1, 1, 10, 10)

    inside = (..., slice(4, -4), slice(4, -4))
    assert torch.equal(first[inside], then[inside])
    assert not torch.equal(dense(x.roll(**shift))[inside], dense(x).roll(**shift)[inside])


def test_at_stride_2_only_even_shifts_commute() -> None:
    x, weight = integers(11, 1, 1, 16, 16), integers(12, 1, 1, 3, 3)

    def half(image: torch.Tensor) -> torch.Tensor:
        return conv2d_reference(image, weight, stride=2, padding="same")

    inside = (..., slice(2, -2), slice(2, -2))
    by_two = half(x.roll((2, 2), (2, 3)))[inside]
    assert torch.equal(by_two, half(x).roll((1, 1), (2, 3))[inside])
    by_one = half(x.roll((1, 1), (2, 3)))[inside]
    for shift in (0, 1):
        assert not torch.equal(by_one, half(x).roll((shift, shift), (2, 3))[inside])


# --- errors

IMAGE, WEIGHT = torch.zeros(1, 2, 5, 6), torch.zeros(4, 2, 3, 3)
BCHW = "batch channels rows columns"
OIHW = "out_channels in_channels kernel_rows kernel_columns"
FLOATS = "one of torch.float16, torch.bfloat16, torch.float32, torch.float64"
WORDS = '"valid", "same" or four whole numbers (top, bottom, left, right)'


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"x": [[1.0]]}, ["x: not a tensor", "got: list"]),
        (
            {"x": IMAGE[0]},
            ["x: wrong number of dimensions", f"expected: 4: {BCHW}", "got: 3: shape (2, 5, 6)"],
        ),
        (
            {"x": IMAGE.int()},
            ["x: unsupported dtype", f"expected: {FLOATS}", "got: torch.int32"],
        ),
        (
            {"weight": WEIGHT[0, 0]},
            ["weight: wrong number", f"expected: 4: {OIHW}", "got: 2: shape (3, 3)"],
        ),
        (
            {"weight": WEIGHT.double()},
            ["weight: differs", "expected: torch.float32 on cpu", "got: torch.float64 on cpu"],
        ),
        ({"weight": WEIGHT.to("meta")}, ["weight: differs", "got: torch.float32 on meta"]),
        (
            {"weight": torch.zeros(4, 7, 3, 3)},
            ["x: the image and the weight differ", "expected: 7 channels", "got: 2 channels"],
        ),
        (
            {"channels_last": True},
            ["x: the image and the weight", "expected: 3 channels", "got: 6", "channels_last=True"],
        ),
        (
            {"bias": torch.zeros(3)},
            ["bias: a bias needs one number", "expected: 4", "got: 3"],
        ),
        ({"bias": torch.zeros(1, 4)}, ["bias: wrong number", "expected: 1: out_channels"]),
        ({"bias": torch.zeros(4).half()}, ["bias: differs", "got: torch.float16 on cpu"]),
        (
            {"weight": torch.zeros(4, 2, 3, 9)},
            [
                "kernel: the kernel is larger than the padded input",
                "expected: at most 6 (6 of the input, 0 before, 0 after)",
                "got: 9",
                "hint: pad more",
            ],
        ),
        (
            {"weight": torch.zeros(4, 2, 0, 3)},
            ["kernel: not a valid number", "expected: a whole number, 1 or more", "got: 0"],
        ),
        ({"x": torch.zeros(1, 2, 0, 6), "padding": "same"}, ["size: not a valid number", "got: 0"]),
        (
            {"stride": 0},
            ["stride: not a valid number", "a whole number, 1 or more", "got: 0"],
        ),
        ({"stride": 1.5}, ["stride: not a valid number", "got: 1.5"]),
        ({"stride": (1, 2, 3)}, ["stride: not a valid number or pair", "got: (1, 2, 3)"]),
        (
            {"padding": (0, -1, 0, 0)},
            ["padding: not a valid number", "expected: a whole number, 0 or more", "got: -1"],
        ),
        ({"padding": "reflect"}, ["padding: unknown padding", f"expected: {WORDS}", "'reflect'"]),
        ({"padding": (1, 1)}, ["padding: unknown padding", f"expected: {WORDS}", "got: (1, 1)"]),
        ({"padding": 1}, ["padding: unknown padding", "got: 1"]),
    ],
)
def test_errors_say_what_was_expected_and_what_was_given(
    change: dict[str, Any], lines: list[str]
) -> None:
    arguments: dict[str, Any] = {"x": IMAGE, "weight": WEIGHT} | change
    with pytest.raises(InputError) as error:
        conv2d_reference(**arguments)
    for line in lines:
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "name"), [((0, 3, 1), "size"), ((8, 0, 1), "kernel"), ((8, 3, 0), "stride")]
)
def test_same_padding_rejects_numbers_below_1(arguments: tuple[int, int, int], name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: not a valid number"):
        same_padding(*arguments)


def test_the_unchanged_arguments_are_accepted() -> None:
    """Control for the errors above: every supported dtype, an empty batch, the meta device."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        z = conv2d_reference(IMAGE.to(dtype), WEIGHT.to(dtype), torch.ones(4, dtype=dtype))
        assert z.dtype == dtype
        assert torch.equal(z, torch.ones(1, 4, 3, 4, dtype=dtype))
    assert conv2d_reference(IMAGE[:0], WEIGHT).shape == (0, 4, 3, 4)
    assert conv2d_reference(IMAGE.to("meta"), WEIGHT.to("meta")).shape == (1, 4, 3, 4)
