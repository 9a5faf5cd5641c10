"""The CPU's operators by torch's own checks of an operator: schema, gradients, shapes, tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.slow import first_of
from helpers.versions import fails_on_torch_2_6
from torch import Tensor
from torch.testing._internal.optests.generate_tests import OpCheckError

from sdconv.fast.cpu import custom_ops
from sdconv.fast.cpu.group_stats import group_stats

GROUPS = 4


def drawn(*shape: int) -> Tensor:
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=random).requires_grad_()


def around(x: Tensor, out_channels: int, shortcut: bool) -> tuple[Any, ...]:
    """The arguments of a convolution's prologue and epilogue."""
    batch, channels, height, width = x.shape
    residual = drawn(batch, channels if shortcut else out_channels, height, width)
    fused = (drawn(out_channels, channels, 1, 1), drawn(out_channels)) if shortcut else (None,) * 2
    norm = group_stats(x.detach(), GROUPS), drawn(channels), drawn(channels), 1e-5, True
    return drawn(out_channels), *norm, drawn(batch, out_channels), residual, *fused


BARE = (None, None, None, None, 1e-5, False, None, None, None, None)


def test_group_stats() -> None:
    torch.library.opcheck(custom_ops.group_stats, (drawn(2, 8, 5, 7), GROUPS))


@fails_on_torch_2_6("its GroupNorm has no gradient for sizes that are symbols")
@pytest.mark.parametrize("layout", first_of([torch.contiguous_format, torch.channels_last]))
@pytest.mark.parametrize("shortcut", [None, False, True])
def test_conv3x3(shortcut: bool | None, layout: torch.memory_format) -> None:
    x = drawn(2, 8, 6, 7).detach().contiguous(memory_format=layout).requires_grad_()
    fused = BARE if shortcut is None else around(x, 12, shortcut)
    torch.library.opcheck(custom_ops.conv3x3, (x, drawn(12, 8, 3, 3), *fused, GROUPS))


@pytest.mark.parametrize("bias", [True, False])
def test_upsample_conv(bias: bool) -> None:
    arguments = (drawn(2, 8, 5, 7), drawn(12, 8, 3, 3), drawn(12) if bias else None, GROUPS)
    torch.library.opcheck(custom_ops.upsample_conv, arguments)


def test_a_wrong_shape_is_noticed() -> None:
    """Registers an operator whose stated output shape is wrong."""

    @torch.library.custom_op("sdconv_test::group_stats", mutates_args=())
    def wrong(x: Tensor, groups: int) -> Tensor:
        return group_stats(x, groups)

    wrong.register_fake(lambda x, groups: x.new_empty(len(x), groups, 1, dtype=torch.float64))
    with pytest.raises(OpCheckError):
        torch.library.opcheck(wrong, (torch.randn(2, 8, 5, 7), GROUPS))
