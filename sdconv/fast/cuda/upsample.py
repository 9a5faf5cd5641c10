"""Nearest-neighbour upsampling and a 3x3 convolution by sub-pixel decomposition, for GPUs.

The 3x3 window of an output pixel covers 2x2 input pixels; which ones depends on whether its row and
its column are even or odd. For each of these four cases, the kernel's taps that fall on the same
input pixel are added beforehand: 16 products instead of 36, and no upsampled feature map. One call
of torch's convolution computes all four.

On CPUs, Winograd's convolution of the upsampled feature map takes 25 products for 16 outputs, and
this would take 64: see :mod:`sdconv.fast.cpu.winograd`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def sub_pixel_weights(weight: Tensor) -> Tensor:
    """Adds taps that fall on the same pixel: ``(O, C, 3, 3)`` to ``(2, 2, O, C, 2, 2)``, for even
    and odd rows and columns. Sums are rounded once, from float32 or wider."""
    wide = weight if weight.dtype is torch.float64 else weight.float()
    return _along(_along(wide, 2), 4).to(weight.dtype).movedim(0, 1)


def _along(weight: Tensor, axis: int) -> Tensor:
    """Splits an axis of three taps into even and odd outputs, on a new first axis."""
    first, middle, last = weight.unbind(axis)
    even = torch.stack([first, middle + last], axis)
    odd = torch.stack([first + middle, last], axis)
    return torch.stack([even, odd])


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Upsamples and convolves: ``(B, C, H, W)`` to ``(B, O, 2H, 2W)`` in channels-last order.

    Args:
        x: the feature map.
        weight: ``(O, C, 3, 3)``.
        bias: ``(O,)``, or None.
    """
    batch, _, height, width = x.shape
    out_channels = len(weight)
    parts = functional.conv2d(
        x.to(memory_format=torch.channels_last),
        sub_pixel_weights(weight).flatten(0, 2),
        None if bias is None else bias.repeat(4),
        padding=1,
    )
    out = x.new_empty(batch, height, 2, width, 2, out_channels)
    for number, part in enumerate(torch.chunk(parts, 4, dim=1)):
        i, j = divmod(number, 2)
        part = part.narrow(2, i, height).narrow(3, j, width)
        out.select(4, j).select(2, i).copy_(part.movedim(1, -1))
    return out.flatten(3, 4).flatten(1, 2).movedim(-1, 1)
