"""What follows a convolution on CUDA, in one pass over its output: bias, time embedding, residual,
and the statistics of the next GroupNorm.

cuDNN adds a bias to a channels-last feature map in a pass of its own; a residual is another pass,
and GroupNorm's statistics a third. So the convolution is called without its bias, and this does the
rest. Importing this module registers the operator ``sdconv::epilogue``, with a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdconv.fast import gradients
from sdconv.fast.cuda.choices import tiling
from sdconv.fast.cuda.group_norm import has_triton, total


def epilogue(
    x: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    groups: int,
    subpixel: bool,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Adds what a convolution was called without; on CUDA by a Triton kernel, if Triton is
    installed.

    Args:
        x: the convolution's output, ``(B, C, H, W)``; with ``subpixel``, ``(B, 4C, H/2 + 1,
            W/2 + 1)``.
        bias: ``(C,)``, or None.
        added: ``(B, C)``, such as a time embedding; or None.
        residual: ``(B, C, H, W)``, or None.
        residual_bias: ``(C,)``, the bias of the convolution that the residual came from; or None.
        groups: groups of the statistics; 0 for no statistics.
        subpixel: the channels of ``x`` are those of even and odd rows and columns, see
            :mod:`sdconv.fast.cuda.upsample`.
        in_place: may overwrite ``x``.

    Returns:
        The sum, ``(B, C, H, W)`` in the dtype of ``x`` and channels-last order, rounded once; and
        the mean and variance of its groups, ``(B, groups, 2)`` in float32.
    """
    if x.device.type != "cuda" or not has_triton():
        return by_torch(x, bias, added, residual, residual_bias, groups, subpixel)
    from sdconv.fast.cuda import triton_kernels as kernels

    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    out = x if in_place and not subpixel else blank(x, subpixel)
    stats = kernels.run_sum_and_stats(
        x,
        bias,
        added,
        residual,
        residual_bias,
        out,
        groups,
        tiling(out.shape[1], out.shape[2] * out.shape[3]),
        subpixel=subpixel,
    )
    return out, stats


def by_torch(
    x: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    groups: int,
    subpixel: bool,
) -> tuple[Tensor, Tensor]:
    """`epilogue` by torch's own operations, in float32 or wider."""
    wide = total(interleave(x) if subpixel else x, bias, added, residual_bias)
    if residual is not None:
        wide = wide + residual
    out = wide.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return out, group_stats(out.detach(), groups)


def group_stats(x: Tensor, groups: int) -> Tensor:
    """The mean and the variance of each group, ``(B, groups, 2)`` in float32, computed in
    float64."""
    if not groups:
        return x.new_empty(len(x), 0, 2, dtype=torch.float32)
    values = x.double().reshape(len(x), groups, -1)
    return torch.stack([values.mean(2), values.var(2, correction=0)], 2).float()


def interleave(parts: Tensor) -> Tensor:
    """Outputs of even and odd rows and columns, ``(B, 4C, H/2 + 1, W/2 + 1)``, in their places:
    ``(B, C, H, W)`` in channels-last order."""
    batch, channels, height, width = parts.shape
    height, width, channels = height - 1, width - 1, channels // 4
    out = parts.new_empty(batch, height, 2, width, 2, channels)
    for number, part in enumerate(torch.chunk(parts, 4, dim=1)):
        i, j = divmod(number, 2)
        part = part.narrow(2, i, height).narrow(3, j, width)
        out.select(4, j).select(2, i).copy_(part.movedim(1, -1))
    return out.flatten(3, 4).flatten(1, 2).movedim(-1, 1)


def blank(x: Tensor, subpixel: bool) -> Tensor:
    """An empty output for a convolution's output."""
    batch, channels, height, width = x.shape
    if subpixel:
        channels, height, width = channels // 4, 2 * (height - 1), 2 * (width - 1)
    shape = (batch, channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("sdconv::epilogue", mutates_args=())
def operator(
    x: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    groups: int,
    subpixel: bool,
) -> tuple[Tensor, Tensor]:
    """`epilogue` as a torch operator."""
    out, stats = epilogue(x, bias, added, residual, residual_bias, groups, subpixel)
    return out.clone() if out is x else out, stats


@operator.register_fake
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    groups, subpixel = args[-2:]
    return blank(x, subpixel), x.new_empty(len(x), groups, 2, dtype=torch.float32)


def _sum(*args: Any) -> Tensor:
    x, bias, added, residual, residual_bias, _, subpixel = args
    return by_torch(x, bias, added, residual, residual_bias, 0, subpixel)[0]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gradients.save_inputs(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


operator.register_autograd(gradients.gradient_of(_sum), setup_context=_setup)
