"""Nearest doubling and a 3x3 convolution as four convolutions of the small map, for GPUs.

A pixel of the doubled map and its neighbours stand over 2x2 pixels of the small one, which ones
depends on whether its row and its column are even or odd. For each of these four phases the 3x3
kernel's taps that meet on the same pixel are added up beforehand: 16 products where 36 were, and no
doubled map before the convolution. All phases are one convolution of torch's.

On CPUs Winograd's convolution of the doubled map takes 25 products for 16 outputs where this takes
64, see :mod:`sdconv.fast.cpu.winograd`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def kernels(weight: Tensor) -> Tensor:
    """``(O, C, 3, 3)`` to ``(2, 2, O, C, 2, 2)``: for even and odd rows, even and odd columns;
    added up in float32 at least, and rounded once."""
    wide = weight if weight.dtype is torch.float64 else weight.float()
    return _along(_along(wide, 2), 4).to(weight.dtype).movedim(0, 1)


def _along(weight: Tensor, axis: int) -> Tensor:
    """The two phases of one axis of three taps, in front."""
    first, middle, last = weight.unbind(axis)
    even = torch.stack([first, middle + last], axis)
    odd = torch.stack([first + middle, last], axis)
    return torch.stack([even, odd])


def doubled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(B, C, H, W)`` to ``(B, O, 2H, 2W)``, in channels-last order.

    Args:
        weight: ``(O, C, 3, 3)``. bias: ``(O,)``.
    """
    batch, _, height, width = x.shape
    out_channels = len(weight)
    found = functional.conv2d(
        x.to(memory_format=torch.channels_last),
        kernels(weight).flatten(0, 2),
        None if bias is None else bias.repeat(4),
        padding=1,
    )
    out = x.new_empty(batch, height, 2, width, 2, out_channels)
    for phase, one in enumerate(torch.chunk(found, 4, dim=1)):
        i, j = divmod(phase, 2)
        one = one.narrow(2, i, height).narrow(3, j, width)
        out.select(4, j).select(2, i).copy_(one.movedim(1, -1))
    return out.flatten(3, 4).flatten(1, 2).movedim(-1, 1)
