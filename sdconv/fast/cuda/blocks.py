"""The blocks on CUDA: channels-last feature maps, convolutions of torch's without their biases, and
Triton kernels for what stands between them.

Each function takes the statistics of its input for its first GroupNorm, if they are known, and
returns its output with the statistics for the next one, see :mod:`sdconv.fast.cuda.epilogue`.
Statistics are ``(B, groups, 2)``.

The tests run this module on a CPU, the kernels in Triton's interpreter, and on CUDA tensors without
values; ``docs/gpu.md`` has a run on a GPU.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdconv.fast.cuda import epilogue, group_norm
from sdconv.fast.cuda.attention import attend
from sdconv.fast.cuda.choices import choose
from sdconv.fast.cuda.upsample import upsample_conv
from sdconv.fast.preconditions import is_eager


def resnet(block: Any, x: Tensor, temb: Tensor | None) -> Tensor:
    """Runs a ResNet block."""
    projected = None
    if block.time_emb_proj is not None:
        projected = block.time_emb_proj(block.nonlinearity(temb))
    return resnet_with_stats(block, x, None, 0, projected)[0]


def resnet_with_stats(
    block: Any, x: Tensor, stats: Tensor | None, groups: int, projected: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Runs a ResNet block with a projected time embedding, ``(B, C)``, or without one."""
    x = x.to(memory_format=torch.channels_last)
    hidden, bias = _conv(block.conv1, _norm(block.norm1, x, stats=stats))
    # Nothing else reads the sum with bias and time embedding, so it is not written.
    hidden = _norm(block.norm2, hidden, bias, projected)
    hidden, bias = _conv(block.conv2, hidden)
    shortcut_bias = None
    if block.conv_shortcut is not None:
        x, shortcut_bias = _conv(block.conv_shortcut, x)
    return _finish(hidden, bias, groups, residual=x, residual_bias=shortcut_bias)


def upsample(block: Any, x: Tensor) -> Tensor:
    """Runs nearest-neighbour upsampling and its convolution."""
    return upsample_with_stats(block, x, None, 0)[0]


def upsample_with_stats(
    block: Any, x: Tensor, stats: Tensor | None, groups: int
) -> tuple[Tensor, Tensor | None]:
    """Runs nearest-neighbour upsampling and its convolution."""
    out, subpixel = upsample_conv(x, block.conv.weight)
    return _finish(out, block.conv.bias, groups, subpixel=subpixel)


def attention(block: Any, x: Tensor) -> Tensor:
    """Runs the VAE's attention."""
    return attention_with_stats(block, x, None, 0)[0]


def attention_with_stats(
    block: Any, x: Tensor, stats: Tensor | None, groups: int
) -> tuple[Tensor, Tensor | None]:
    """Runs the VAE's attention."""
    x = x.to(memory_format=torch.channels_last)
    rows = _norm(block.group_norm, x, stats=stats, silu=False).permute(0, 2, 3, 1)
    out, bias = attend(block, rows.flatten(1, 2))
    return _finish(out.view(rows.shape).permute(0, 3, 1, 2), bias, groups, residual=x)


def conv_with_stats(
    conv: nn.Conv2d, x: Tensor, stats: Tensor | None, groups: int
) -> tuple[Tensor, Tensor | None]:
    """Runs a convolution."""
    out, bias = _conv(conv, x.to(memory_format=torch.channels_last))
    return _finish(out, bias, groups)


def output(norm: Any, conv: Any, x: Tensor, stats: Tensor | None = None) -> Tensor:
    """Runs a network's last GroupNorm, SiLU and convolution."""
    x = x.to(memory_format=torch.channels_last)
    return cast(Tensor, conv(_norm(norm, x, stats=stats)))


def _conv(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A convolution's output and the bias that is missing from it."""
    if choose("bias", len(conv.weight), x.shape[2] * x.shape[3]) == "convolution":
        return conv(x), None
    padding, stride = cast(Any, conv.padding), cast(Any, conv.stride)
    return functional.conv2d(x, conv.weight, None, stride, padding), conv.bias


def _norm(
    norm: nn.GroupNorm,
    x: Tensor,
    offset: Tensor | None = None,
    added: Tensor | None = None,
    *,
    stats: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """GroupNorm of ``x + offset + added``, and SiLU."""
    given = (x, offset, added, norm.weight, norm.bias)
    function = group_norm.group_norm if is_eager(*given) else group_norm.operator
    return function(
        x, offset, added, stats, norm.weight, norm.bias, norm.num_groups, norm.eps, silu
    )


def _finish(
    x: Tensor,
    bias: Tensor | None,
    groups: int,
    *,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    subpixel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What follows a convolution, whose output may be overwritten; and the statistics of the
    result, unless ``groups`` is 0."""
    if bias is None and residual is None and not (groups or subpixel):
        return x, None
    given = (x, bias, None, residual, residual_bias, groups, subpixel)
    if is_eager(x, bias, residual, residual_bias):
        out, stats = epilogue.epilogue(*given, in_place=True)
    else:
        out, stats = epilogue.operator(*given)
    return out, stats if groups else None
