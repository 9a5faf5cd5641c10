"""The CPU's operators by torch's own checks of an operator: schema, gradients, shapes, tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdconv.fast.cpu import conv as fused
from sdconv.fast.cpu import custom_ops as library

GROUPS = 4


def drawn(*shape: int) -> Tensor:
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=random).requires_grad_()


def around(x: Tensor, out_channels: int, shortcut: bool) -> tuple[Any, ...]:
    """All that an operator's convolution may have round it."""
    batch, channels, height, width = x.shape
    residual = drawn(batch, channels if shortcut else out_channels, height, width)
    beside = (drawn(out_channels, channels, 1, 1), drawn(out_channels)) if shortcut else (None,) * 2
    norm = fused.moments(x.detach(), GROUPS), drawn(channels), drawn(channels), 1e-5, True
    return drawn(out_channels), *norm, drawn(batch, out_channels), residual, *beside


BARE = (None, None, None, None, 1e-5, False, None, None, None, None)


def test_moments() -> None:
    torch.library.opcheck(library.moments, (drawn(2, 8, 5, 7), GROUPS))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shortcut", [None, False, True])
def test_convolution(shortcut: bool | None, layout: torch.memory_format) -> None:
    x = drawn(2, 8, 6, 7).detach().contiguous(memory_format=layout).requires_grad_()
    beside = BARE if shortcut is None else around(x, 12, shortcut)
    torch.library.opcheck(library.convolution, (x, drawn(12, 8, 3, 3), *beside, GROUPS))


@pytest.mark.parametrize("bias", [True, False])
def test_doubled_convolution(bias: bool) -> None:
    arguments = (drawn(2, 8, 5, 7), drawn(12, 8, 3, 3), drawn(12) if bias else None, GROUPS)
    torch.library.opcheck(library.doubled_convolution, arguments)


def test_a_wrong_shape_is_noticed() -> None:
    """By the check of what comes out, on an operator that says too little of it."""

    @torch.library.custom_op("sdconv_test::moments", mutates_args=())
    def moments(x: Tensor, groups: int) -> Tensor:
        return fused.moments(x, groups)

    moments.register_fake(lambda x, groups: x.new_empty(len(x), groups, 1, dtype=torch.float64))
    with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
        torch.library.opcheck(moments, (torch.randn(2, 8, 5, 7), GROUPS))
