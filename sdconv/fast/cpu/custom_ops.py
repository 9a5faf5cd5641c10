"""The fused convolutions as custom operators: one node each for torch.compile and torch.export,
with gradients.

Importing this module registers ``sdconv::group_stats``, ``sdconv::conv3x3`` and
``sdconv::upsample_conv``. Gradients are those of the direct computation. Statistics carry none: the
gradient of a feature map already accounts for what its statistics depend on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdconv.fast import gradients
from sdconv.fast.cpu import conv
from sdconv.fast.cpu import group_stats as cpu_group_stats
from sdconv.fast.cpu.conv import Epilogue, Prologue


@torch.library.custom_op("sdconv::group_stats", mutates_args=(), device_types="cpu")
def group_stats(x: Tensor, groups: int) -> Tensor:
    """The operator of `sdconv.fast.cpu.group_stats.group_stats`."""
    return cpu_group_stats.group_stats(x, groups)


@group_stats.register_fake
def _(x: Tensor, groups: int) -> Tensor:
    return x.new_empty(len(x), groups, 2, dtype=torch.float64)


@torch.library.custom_op("sdconv::conv3x3", mutates_args=(), device_types="cpu")
def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stats: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    silu: bool,
    temb: Tensor | None,
    residual: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """The operator of `sdconv.fast.cpu.conv.conv3x3`."""
    norm = (stats, norm_weight, norm_bias, eps, silu)
    shortcut = (shortcut_weight, shortcut_bias)
    prologue, epilogue = _fused(bias, *norm, temb, residual, *shortcut)
    return conv.conv3x3(x, weight, prologue, epilogue, groups=groups)


@conv3x3.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    shape = (len(x), len(weight), *x.shape[2:])
    return _empty(x, shape), x.new_empty(len(x), args[-1], 2, dtype=torch.float64)


@torch.library.custom_op("sdconv::upsample_conv", mutates_args=(), device_types="cpu")
def upsample_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int
) -> tuple[Tensor, Tensor]:
    """The operator of `sdconv.fast.cpu.conv.upsample_conv`."""
    return conv.upsample_conv(x, weight, bias, groups=groups)


@upsample_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    shape = (len(x), len(weight), 2 * x.shape[2], 2 * x.shape[3])
    return _empty(x, shape), x.new_empty(len(x), groups, 2, dtype=torch.float64)


def _empty(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fused(*args: Any) -> tuple[Prologue | None, Epilogue]:
    """A convolution's prologue and epilogue from the operator's arguments, ``bias`` to
    ``shortcut_bias``."""
    bias, stats, norm_weight, norm_bias, eps, silu, temb, residual, *shortcut = args
    prologue = None if stats is None else Prologue(stats, norm_weight, norm_bias, eps, silu)
    conv1x1 = None if shortcut[0] is None else (shortcut[0], shortcut[1])
    return prologue, Epilogue(bias, temb, residual, conv1x1)


def _direct(x: Tensor, weight: Tensor, *fused_and_groups: Any) -> Tensor:
    return conv.differentiable_conv(x, weight, *_fused(*fused_and_groups[:-1]))


def _direct_upsample(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    return conv.direct_upsample_conv(x, weight, bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gradients.save_inputs(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _no_gradient(ctx: Any, grad: Tensor) -> tuple[None, None]:
    return None, None


group_stats.register_autograd(_no_gradient, setup_context=lambda ctx, inputs, output: None)
conv3x3.register_autograd(gradients.gradient_of(_direct), setup_context=_setup)
upsample_conv.register_autograd(gradients.gradient_of(_direct_upsample), setup_context=_setup)
