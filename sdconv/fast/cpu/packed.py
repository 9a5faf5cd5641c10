"""Convolutions of small maps: one matrix product with a weight that was put in order beforehand.

torch's kernel puts a weight in order anew in each call, which for 1280 channels at 8x8 takes longer
than the convolution itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu import kernels as engines
from sdconv.fast.cpu.conv import After, computes_in, gathered
from sdconv.fast.cpu.group_stats import Norm
from sdconv.fast.cpu.weight_cache import prepared


def convolution(x: Tensor, weight: Tensor, norm: Norm | None, after: After) -> Tensor:
    """A 3x3 convolution, stride 1, one row of zeros on every side.

    Args:
        x: ``(B, C, H, W)``. weight: ``(O, C, 3, 3)``.
        norm: applied to ``x``. after: added to the output.

    Returns:
        ``(B, O, H, W)``, in channels-last order.
    """
    batch, channels, height, width = x.shape
    out_channels = len(weight)
    dtype = computes_in(x.dtype)
    engine = engines.of(dtype)
    rows = (x if norm is None else norm.apply(x)).permute(0, 2, 3, 1).to(dtype)
    rows = functional.pad(rows, (0, 0, 1, 1, 1, 1))
    # what each output reads, beside one another
    patches = rows.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)
    patches = patches.reshape(1, batch * height * width, 9 * channels).contiguous()
    packed = prepared.get(weight, gathered(dtype))
    out = torch.empty(1, patches.shape[1], engine.width(out_channels), dtype=dtype)
    engine.product(patches, packed, out)
    out = out[0, :, :out_channels].view(batch, height, width, out_channels)
    if after.bias is not None:
        out = out + after.bias
    return after.apply(out.permute(0, 3, 1, 2).to(x.dtype)).contiguous(
        memory_format=torch.channels_last
    )
