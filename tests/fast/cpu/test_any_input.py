"""The fast backend on any input of a block: shapes, layouts, dtypes, other convolutions, and values
that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.conv_cases import lying
from helpers.numbers import error
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import sdconv
from sdconv.fast import blocks
from sdconv.fast.preconditions import is_conv3x3
from sdconv.models.blocks import (
    AsymmetricDownsample2D,
    Downsample2D,
    ResnetBlock2D,
    Upsample2D,
)
from sdconv.models.unet import UNet2DConditionModel

# relative to the largest value, against float64; in float32 twice the usual error of upsampling,
# since single pixels round worse
WITHIN = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

layouts = st.sampled_from(
    ["contiguous", "channels last", "every other", "transposed", "one image repeated"]
)


def fast_and_reference(module: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        with sdconv.backend("fast"):
            out = module(*given)
        return out, module(*given)


# shapes from those for torch's kernel to those for Winograd's
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    channels=st.sampled_from([8, 64, 136]),
    out_channels=st.sampled_from([8, 64, 136]),
    size=st.tuples(st.integers(1, 34), st.integers(1, 34)),
    layout=layouts,
    time=st.booleans(),
    dtype=st.sampled_from(list(WITHIN)),
)
# the largest rounding found yet, 1.3e-5
@example(6697, 1, 136, 64, (31, 10), "contiguous", False, torch.float32)
@settings(max_examples=20)
def test_blocks(
    seed: int,
    batch: int,
    channels: int,
    out_channels: int,
    size: tuple[int, int],
    layout: str,
    time: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    temb = (torch.randn(batch, 6, dtype=dtype),) if time else ()
    resnet = ResnetBlock2D(
        channels, out_channels, temb_channels=6 if time else None, groups=4, eps=1e-5
    ).to(dtype)
    upsample = Upsample2D(channels).to(dtype)
    x = lying(torch.randn(batch, channels, *size, dtype=dtype), layout)
    before = x.clone()
    for module, more in ((resnet, temb), (upsample, ())):
        out, _ = fast_and_reference(module, x, *more)
        # the input is unchanged
        assert torch.equal(x, before)
        with torch.no_grad():
            exact = module.double()(x.double(), *(t.double() for t in more))
        assert (out.dtype, out.shape) == (dtype, exact.shape)
        assert error(out, exact) < WITHIN[dtype]


@given(
    kind=st.sampled_from([AsymmetricDownsample2D, Downsample2D]),
    batch=st.integers(1, 3),
    channels=st.sampled_from([8, 64]),
    size=st.tuples(st.integers(2, 34), st.integers(2, 34)),
    layout=layouts,
    dtype=st.sampled_from(list(WITHIN)),
)
@settings(max_examples=40)
def test_downsampling(
    kind: Any, batch: int, channels: int, size: tuple[int, int], layout: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module = kind(channels).to(dtype)
    x = lying(torch.randn(batch, channels, *size, dtype=dtype), layout)
    out, _ = fast_and_reference(module, x)
    with torch.no_grad():
        exact = module.double()(x.double())
    assert (out.dtype, out.shape) == (dtype, exact.shape)
    assert error(out, exact) < WITHIN[dtype]


def test_downsampling_with_padding_on_all_sides_is_another_function() -> None:
    """The control: as if a row and a column too many were cut off."""
    torch.manual_seed(0)
    module, x = AsymmetricDownsample2D(8), torch.randn(1, 8, 12, 12)
    out, _ = fast_and_reference(module, x)
    with torch.no_grad():
        around = F.conv2d(x, module.conv.weight, module.conv.bias, stride=2, padding=1)
    assert around.shape == out.shape and error(around, out) > 0.1


@pytest.mark.parametrize(
    ("batch", "size", "calls"), [(1, (15, 16), 1), (1, (16, 16), 0), (2, (15, 16), 0)]
)
def test_few_outputs_of_a_strided_convolution_are_one_product(
    batch: int, size: tuple[int, int], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaces the function that computes the product by one that counts."""
    module, x, right, seen = Downsample2D(64), torch.randn(batch, 64, *size), blocks.im2col_conv, 0

    def counted(*given: Any) -> Tensor:
        nonlocal seen
        seen += 1
        return right(*given)

    monkeypatch.setattr(blocks, "im2col_conv", counted)
    fast_and_reference(module, x)
    assert seen == calls


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Conv2d:
    groups = draw(st.sampled_from([1, 1, 2]))
    return nn.Conv2d(
        in_channels=8,
        out_channels=4,
        kernel_size=draw(st.sampled_from([1, 3, (3, 3), (3, 1), 5])),
        stride=draw(st.sampled_from([1, 2, (1, 2)])),
        padding=draw(st.sampled_from([0, 1, (1, 1), (0, 1), 2, "same"])),
        dilation=draw(st.sampled_from([1, 1, 2])),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "reflect", "circular"])),
    )


class LastLayers(nn.Module):
    """The last layers of a U-Net, around any convolution."""

    def __init__(self, norm: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.conv_norm_out, self.conv_act, self.conv_out = norm, nn.SiLU(), conv

    forward = UNet2DConditionModel.project_out


@given(data=st.data(), layout=layouts, height=st.integers(9, 20), width=st.integers(9, 20))
@settings(max_examples=30)
def test_other_convolutions_stay_torchs(
    data: st.DataObject, layout: str, height: int, width: int
) -> None:
    torch.manual_seed(0)
    try:
        conv = data.draw(convolutions())
    except ValueError:  # "same" with a stride
        assume(False)
        raise
    norm, x = nn.GroupNorm(2, 8), lying(torch.randn(2, 8, height, width), layout)
    out, expected = fast_and_reference(LastLayers(norm, conv), x)
    plain = ((3, 3), (1, 1), (1, 1), 1, "zeros")
    same = (conv.kernel_size, conv.stride, conv.dilation, conv.groups, conv.padding_mode) == plain
    ours = same and conv.padding in (1, (1, 1))
    assert is_conv3x3(conv, x) == ours
    if ours:
        assert error(out, expected) < 1e-5
    else:
        # the reference's layers, on a channels-first feature map, which torch normalises exactly
        _, expected = fast_and_reference(LastLayers(norm, conv), x.contiguous())
        assert torch.equal(out, expected)


SPOILT = ["x", "norm1", "conv1", "bias1", "norm2", "conv2", "temb", "shortcut"]


def spoilt(
    value: float, where: str, seed: int, size: tuple[int, int], batch: int
) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Blocks and their inputs, with this value in one tensor."""
    torch.manual_seed(seed)
    block = ResnetBlock2D(128, 136, temb_channels=6, groups=4, eps=1e-5).requires_grad_(False)
    assert block.conv_shortcut is not None
    x, temb = torch.randn(batch, 128, *size), torch.randn(batch, 6)
    tensors = (
        x,
        block.norm1.weight,
        block.conv1.weight,
        block.conv1.bias,
        block.norm2.bias,
        block.conv2.weight,
        temb,
        block.conv_shortcut.weight,
    )
    values = dict(zip(SPOILT, tensors, strict=True))[where].view(-1)
    values[seed % len(values)] = value
    return [(block, (x, temb)), (Upsample2D(128).requires_grad_(False), (x,))]


sizes = st.tuples(st.integers(3, 24), st.integers(3, 24))


@given(
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    where=st.sampled_from(SPOILT),
    seed=st.integers(0, 2**16),
    size=sizes,
    batch=st.integers(1, 2),
)
# a weight's tap over the padding, in each method
@example(value=float("nan"), where="conv2", seed=0, size=(3, 3), batch=2)
@example(value=float("nan"), where="conv2", seed=0, size=(24, 24), batch=1)
@settings(max_examples=25)
def test_values_that_are_not_finite_come_out_where_the_reference_has_them(
    value: float, where: str, seed: int, size: tuple[int, int], batch: int
) -> None:
    for module, given_ in spoilt(value, where, seed, size, batch):
        out, expected = fast_and_reference(module, *given_)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        assert torch.equal(out[out.isinf()], expected[out.isinf()])
        finite = expected.isfinite()
        if finite.any():
            assert error(out[finite], expected[finite]) < 2e-5
