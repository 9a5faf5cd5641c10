"""The fused convolutions as operators of torch's, which torch.compile and torch.export see as one
step and through which gradients go.

Importing this registers ``sdconv::moments``, ``sdconv::convolution`` and
``sdconv::doubled_convolution``. Gradients are the direct computation's. Outputs that are moments
carry none: a map's gradient already holds what its moments depend on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdconv.fast.cpu import chosen, gradients
from sdconv.fast.cpu import conv as fused
from sdconv.fast.cpu.conv import After
from sdconv.fast.cpu.group_stats import Norm


@torch.library.custom_op("sdconv::moments", mutates_args=(), device_types="cpu")
def moments(x: Tensor, groups: int) -> Tensor:
    """See `sdconv.fast.cpu.conv.moments`."""
    return fused.moments(x, groups)


@moments.register_fake
def _(x: Tensor, groups: int) -> Tensor:
    return x.new_empty(len(x), groups, 2, dtype=torch.float64)


@torch.library.custom_op("sdconv::convolution", mutates_args=(), device_types="cpu")
def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    moments: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    silu: bool,
    added: Tensor | None,
    residual: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """See `sdconv.fast.cpu.chosen.convolution`."""
    norm, after = _around(
        bias,
        moments,
        norm_weight,
        norm_bias,
        eps,
        silu,
        added,
        residual,
        shortcut_weight,
        shortcut_bias,
    )
    return chosen.convolution(x, weight, norm, after, groups=groups)


@convolution.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    shape = (len(x), len(weight), *x.shape[2:])
    return _blank(x, shape), x.new_empty(len(x), args[-1], 2, dtype=torch.float64)


@torch.library.custom_op("sdconv::doubled_convolution", mutates_args=(), device_types="cpu")
def doubled_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int
) -> tuple[Tensor, Tensor]:
    """See `sdconv.fast.cpu.chosen.doubled_convolution`."""
    return chosen.doubled_convolution(x, weight, bias, groups=groups)


@doubled_convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    shape = (len(x), len(weight), 2 * x.shape[2], 2 * x.shape[3])
    return _blank(x, shape), x.new_empty(len(x), groups, 2, dtype=torch.float64)


def _blank(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _around(
    bias: Tensor | None,
    moments: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    silu: bool,
    added: Tensor | None,
    residual: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
) -> tuple[Norm | None, After]:
    """What stands round a convolution, from an operator's arguments."""
    norm = None
    if moments is not None and norm_weight is not None and norm_bias is not None:
        norm = Norm(moments, norm_weight, norm_bias, eps, silu)
    shortcut = None if shortcut_weight is None else (shortcut_weight, shortcut_bias)
    return norm, After(bias, added, residual, shortcut)


def _direct(x: Tensor, weight: Tensor, *around_and_groups: Any) -> Tensor:
    return fused.direct(x, weight, *_around(*around_and_groups[:-1]))


def _direct_doubled(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    return fused.direct_doubled(x, weight, bias)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gradients.remember(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _no_gradient(ctx: Any, grad: Tensor) -> tuple[None, None]:
    return None, None


moments.register_autograd(_no_gradient, setup_context=lambda ctx, inputs, output: None)
convolution.register_autograd(gradients.of(_direct), setup_context=_remember)
doubled_convolution.register_autograd(gradients.of(_direct_doubled), setup_context=_remember)
