"""GroupNorm and SiLU in one operation on channels-last feature maps, for CUDA.

Importing this module registers the operator ``sdconv::group_norm_nhwc``, which has a gradient and
which torch.compile and torch.export see as one node.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast import gradients
from sdconv.fast.cuda.choices import choose, tiling


def group_norm(
    x: Tensor,
    offset: Tensor | None,
    added: Tensor | None,
    stats: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """Normalises ``x + offset + added``, a sum that is not written to memory; on CUDA by Triton
    kernels, if Triton is installed.

    Args:
        x: ``(B, C, H, W)``, such as a convolution's output without its bias.
        offset: ``(C,)``, such as that bias; or None.
        added: ``(B, C)``, such as a time embedding; or None.
        stats: the sum's mean and variance, ``(B, groups, 2)`` in float32, if they are known.
        weight, bias: ``(C,)``, of the normalisation.
        groups: number of groups.
        eps: added to each group's variance.
        silu: applies SiLU to the result.

    Returns:
        ``(B, C, H, W)`` in the dtype of ``x`` and channels-last order.
    """
    if x.device.type != "cuda" or not has_triton():
        return by_torch(x, offset, added, stats, weight, bias, groups, eps, silu)
    from sdconv.fast.cuda import triton_kernels as kernels

    x = x.contiguous(memory_format=torch.channels_last)
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    tiles = tiling(channels, pixels)
    if stats is None:
        if choose("norm", channels, pixels) == "by group":
            return kernels.run_normalise_group(x, offset, added, weight, bias, groups, eps, silu)
        stats = kernels.run_sum_and_stats(x, offset, added, None, None, None, groups, tiles)
    return kernels.run_normalise(x, offset, added, stats, weight, bias, groups, eps, silu, tiles)


def by_torch(
    x: Tensor,
    offset: Tensor | None,
    added: Tensor | None,
    stats: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """`group_norm` by torch's own operations, in float32 or wider."""
    wide = total(x, offset, added)
    scale, shift = weight.to(wide.dtype), bias.to(wide.dtype)
    if stats is None:
        out = functional.group_norm(wide, groups, scale, shift, eps)
    else:
        size = x.shape[1] // groups
        mean, variance = stats.to(wide.dtype).repeat_interleave(size, 1)[..., None, None].unbind(2)
        scale = scale[:, None, None] / (variance + eps).sqrt()
        out = (wide - mean) * scale + shift[:, None, None]
    out = functional.silu(out) if silu else out
    # On CUDA, torch's GroupNorm returns the contiguous layout.
    return out.to(x.dtype).contiguous(memory_format=torch.channels_last)


def total(x: Tensor, *per_channel: Tensor | None) -> Tensor:
    """``x`` with all of ``per_channel``, ``(C,)`` or ``(B, C)``, added; in float32 or wider."""
    wide = x if x.dtype is torch.float64 else x.float()
    for one in per_channel:
        if one is not None:
            wide = wide + one.to(wide.dtype)[..., None, None]
    return wide


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@torch.library.custom_op("sdconv::group_norm_nhwc", mutates_args=())
def operator(
    x: Tensor,
    offset: Tensor | None,
    added: Tensor | None,
    stats: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """`group_norm` as a torch operator."""
    return group_norm(x, offset, added, stats, weight, bias, groups, eps, silu)


@operator.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _without_stats(
    x: Tensor, offset: Tensor | None, added: Tensor | None, stats: Tensor | None, *others: Any
) -> Tensor:
    """The computation whose gradient is taken: that of the feature map accounts for what its
    statistics depend on."""
    return by_torch(x, offset, added, None, *others)


operator.register_autograd(
    gradients.gradient_of(_without_stats), setup_context=gradients.save_inputs
)
