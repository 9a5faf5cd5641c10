"""Nearest-neighbour upsampling and a 3x3 convolution without an upsampled feature map, for GPUs.

The 3x3 window of an output pixel covers 2x2 input pixels; which ones depends on whether its row and
its column are even or odd. For each of these four cases, the kernel's taps that fall on the same
input pixel are added beforehand: 16 products instead of 36. There are two ways to have them from
cuDNN: one convolution with 2x2 kernels whose output channels are those of all four cases, to be
interleaved afterwards; or one transposed convolution with a 4x4 kernel and stride 2.

Taps are added in each call: it is one pass over a weight, and nothing is kept that could be stale.

On CPUs, Winograd's convolution of the upsampled feature map takes 25 products for 16 outputs, and
this would take 64: see :mod:`sdconv.fast.cpu.winograd`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cuda.choices import choose
from sdconv.fast.cuda.group_norm import has_triton
from sdconv.fast.preconditions import is_eager


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


def subpixel_kernel(weight: Tensor) -> Tensor:
    """The kernel of one convolution with four times the output channels, ``(O, C, 3, 3)`` to
    ``(4O, C, 2, 2)``."""
    return sub_pixel_weights(weight).flatten(0, 2)


def transposed_kernel(weight: Tensor) -> Tensor:
    """The kernel of a transposed convolution, ``(O, C, 3, 3)`` to ``(C, O, 4, 4)``.

    An input pixel adds to the four output pixels that upsampling makes of it, and to their
    neighbours. In each direction, taps are those of `sub_pixel_weights` in this order: odd outputs'
    second, even ones' second, odd outputs' first, even ones' first.
    """
    by_case = sub_pixel_weights(weight)
    out_channels, channels = weight.shape[:2]
    # Output row 2h + i reads row h - 1 + i with its first tap and row h + i with its second; and a
    # transposed convolution adds input row h times kernel row k to output row 2h - 1 + k.
    rows = torch.stack([by_case[1, :, :, :, 1], by_case[0, :, :, :, 1],
                        by_case[1, :, :, :, 0], by_case[0, :, :, :, 0]])  # fmt: skip
    taps = torch.stack([rows[:, 1, ..., 1], rows[:, 0, ..., 1],
                        rows[:, 1, ..., 0], rows[:, 0, ..., 0]], 1)  # fmt: skip
    assert taps.shape == (4, 4, out_channels, channels)
    return taps.permute(3, 2, 0, 1)


def upsample_conv(x: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
    """Upsamples and convolves ``(B, C, H, W)``, without a bias.

    Args:
        x: the feature map.
        weight: ``(O, C, 3, 3)``.

    Returns:
        ``(B, O, 2H, 2W)`` and False, or ``(B, 4O, H + 1, W + 1)`` and True for the epilogue to
        interleave.
    """
    x = x.to(memory_format=torch.channels_last)
    variant = choose("upsample", x.shape[1], x.shape[2] * x.shape[3])
    return VARIANTS[variant](x, weight)


def _subpixel(x: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
    return functional.conv2d(x, summed(weight, transposed=False), padding=1), True


def _transposed(x: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
    kernel = summed(weight, transposed=True)
    return functional.conv_transpose2d(x, kernel, stride=2, padding=1), False


def _direct(x: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
    x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
    return functional.conv2d(x, weight, padding=1), False


VARIANTS = {"subpixel": _subpixel, "transposed": _transposed, "direct": _direct}


def summed(weight: Tensor, *, transposed: bool) -> Tensor:
    """The kernel of a convolution or a transposed one, in channels-last order."""
    eager = weight.device.type == "cuda" and is_eager(weight)
    if eager and has_triton() and weight.dtype is not torch.float64:
        from sdconv.fast.cuda.triton_kernels import run_add_taps

        return run_add_taps(weight, transposed)
    kernel = transposed_kernel(weight) if transposed else subpixel_kernel(weight)
    return kernel.to(memory_format=torch.channels_last)
