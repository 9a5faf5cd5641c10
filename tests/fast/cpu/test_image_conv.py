"""The first convolution of an encoder, against torch's in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import seeded
from helpers.numbers import error, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import sdconv
from sdconv.analysis.explain import explain
from sdconv.fast.cpu.conv import image_conv
from sdconv.fast.cpu.group_stats import group_stats
from sdconv.fast.cpu.kernels import numba_kernels
from sdconv.fast.preconditions import is_image_conv
from sdconv.streaming.fused import ImageConv3x3

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.double()
    return functional.conv2d(x.double(), weight.double(), bias, padding=1)


def drawn(dtype: torch.dtype, *shape: int, out_channels: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    x = randn(*shape).to(dtype)
    weight = randn(out_channels, shape[1], 3, 3, seed=1).to(dtype) / 5
    return x, weight, randn(out_channels, seed=2).to(dtype)


@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 3),
    out_channels=st.sampled_from([64, 128, 192]),
    height=st.integers(1, 9),
    width=st.integers(1, 110),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    biased=st.booleans(),
)
@settings(max_examples=40)
def test_any_shape_dtype_and_layout(
    batch: int,
    channels: int,
    out_channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    layout: Any,
    biased: bool,
) -> None:
    shape = (batch, channels, height, width)
    x, weight, bias = drawn(dtype, *shape, out_channels=out_channels)
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
    added = bias if biased else None
    out, stats = image_conv(x, weight, added, groups=16)
    expected = exact(x, weight, added)
    assert out.dtype is dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, expected) < (1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps)
    assert torch.allclose(stats, group_stats(out, 16), rtol=1e-12, atol=1e-12)
    assert error(out, exact(x, weight.roll(1, 0), added)) > 0.01, "the control"


def test_a_border_that_is_no_zero_is_noticed() -> None:
    x, weight, bias = drawn(torch.float32, 1, 3, 8, 9)
    out, _ = image_conv(x, weight, bias, groups=1)
    repeated = functional.pad(x, (1, 1, 1, 1), mode="replicate")
    other = functional.conv2d(repeated, weight, bias)
    assert torch.allclose(out[:, :, 1:-1, 1:-1], other[:, :, 1:-1, 1:-1], atol=1e-5)
    assert error(out, other) > 0.01


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_where_torch_has_it(value: float) -> None:
    x, weight, bias = drawn(torch.float32, 1, 3, 8, 60)
    x[0, 1, 3, 50] = value
    out, stats = image_conv(x, weight, bias, groups=1)
    expected = functional.conv2d(x, weight, bias, padding=1)
    assert torch.equal(out.isfinite(), expected.isfinite()) and not out.isfinite().all()
    assert not stats.isfinite().all()


def test_the_same_bits_on_any_number_of_threads() -> None:
    x, weight, bias = drawn(torch.float32, 1, 3, 30, 50)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(image_conv(x, weight, bias, groups=4))
    finally:
        torch.set_num_threads(before)
    for out, stats in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(stats, found[0][1])


def test_only_plain_convolutions_of_images_are_taken() -> None:
    x = randn(1, 3, 8, 8)
    conv = nn.Conv2d(3, 64, 3, padding=1).requires_grad_(False)
    assert is_image_conv(conv, x)
    for other in (
        nn.Conv2d(3, 60, 3, padding=1),
        nn.Conv2d(3, 64, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 64, 3, padding=1, stride=2),
        nn.Conv2d(3, 64, 3),
    ):
        assert not is_image_conv(other.requires_grad_(False), x)
    wider = nn.Conv2d(4, 64, 3, padding=1).requires_grad_(False)
    assert not is_image_conv(wider, randn(1, 4, 8, 8))
    conv.register_forward_hook(lambda *given: None)
    assert not is_image_conv(conv, x)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_encoders_call_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = seeded.kl((64, 128), 4, True, layers_per_block=1) if kind == "kl" else seeded.tiny()
    network, x = seeded.network(config), randn(1, 3, 32, 40).clamp(-1, 1)
    calls, compiled = [], numba_kernels()[0]
    plain = compiled.image_conv
    monkeypatch.setattr(compiled, "image_conv", lambda *given: calls.append(1) or plain(*given))
    expected = network.encoder(x)
    assert not calls
    with sdconv.backend("fast"):
        assert error(network.encoder(x), expected) < 2e-5
    assert calls == [1]


def test_streaming_and_explain_say_so() -> None:
    config = seeded.kl((64, 128), 4, True, layers_per_block=1)
    network = seeded.network(config)
    with sdconv.backend("fast"):
        steps = sdconv.streaming.steps_of(network, "encode", 32, 40)
    assert isinstance(steps[0].layer, ImageConv3x3)
    first = explain(config, (32, 40)).layers[0]
    assert (first.name, first.method) == ("encoder.conv_in", "image_conv")


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_strip_has_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    x, weight, bias = drawn(dtype, 1, 3, 12, 30)
    conv = nn.Conv2d(3, 64, 3, padding=1).to(dtype)
    conv.weight.copy_(weight)
    conv.bias.copy_(bias)
    whole, _ = image_conv(x, weight, bias, groups=1)
    rows = functional.pad(x[0].permute(1, 2, 0), (0, 0, 0, 0, 1, 1))
    strips = [ImageConv3x3(conv).apply(rows[first : first + 5]) for first in range(0, 12, 3)]
    assert torch.equal(torch.cat(strips), whole[0].permute(1, 2, 0))
