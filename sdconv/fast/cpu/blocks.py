"""The blocks on a CPU: each convolution is fused with the normalisation before it and the sums for
the next one.

Feature maps are ``(B, C, H, W)``; statistics are those of :mod:`sdconv.fast.cpu.group_stats`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdconv.fast.cpu import conv as cpu_conv
from sdconv.fast.cpu import custom_ops
from sdconv.fast.cpu.conv import Epilogue, NotFiniteError, Prologue
from sdconv.fast.cpu.group_stats import group_stats
from sdconv.fast.preconditions import is_eager


def resnet(block: Any, x: Tensor, temb: Tensor | None) -> Tensor:
    """A ResNet block."""
    projected = None
    if block.time_emb_proj is not None:
        projected = block.time_emb_proj(block.nonlinearity(temb))
    shortcut = block.conv_shortcut
    epilogue1 = Epilogue(block.conv1.bias, projected)
    epilogue2 = Epilogue(
        block.conv2.bias,
        residual=x,
        shortcut=None if shortcut is None else (shortcut.weight, shortcut.bias),
    )
    try:
        prologue = _prologue(block.norm1, x)
        hidden, stats = fused_conv3x3(x, block.conv1, prologue, epilogue1, block.norm2.num_groups)
        prologue = _prologue(block.norm2, hidden, stats)
        # nothing else reads `hidden`
        return fused_conv3x3(hidden, block.conv2, prologue, epilogue2, 1, in_place=True)[0]
    except NotFiniteError:
        prologue = _prologue(block.norm1, x)
        hidden = cpu_conv.direct_conv(x, block.conv1.weight, prologue, epilogue1)
        prologue = _prologue(block.norm2, hidden)
        return cpu_conv.direct_conv(hidden, block.conv2.weight, prologue, epilogue2)


def upsample(block: Any, x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling and its convolution."""
    conv = block.conv
    if is_eager(x, conv):
        return cpu_conv.upsample_conv(x, conv.weight, conv.bias, groups=1)[0]
    out: Tensor = custom_ops.upsample_conv(x, conv.weight, conv.bias, 1)[0]
    return out


def normalised(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """GroupNorm in channels-last order, from float64 statistics: it rounds as in streaming."""
    scale, shift = (one[:, None, None] for one in _prologue(norm, x).affine())
    rows = torch.addcmul(shift, x.permute(0, 2, 3, 1).to(scale.dtype), scale)
    return rows.to(x.dtype).permute(0, 3, 1, 2)


def output(norm: Any, conv: Any, x: Tensor) -> Tensor:
    """A network's last GroupNorm, SiLU and convolution."""
    return fused_conv3x3(x, conv, _prologue(norm, x), Epilogue(conv.bias), 1)[0]


def fused_conv3x3(
    x: Tensor,
    conv: nn.Conv2d,
    prologue: Prologue,
    epilogue: Epilogue,
    groups: int,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """A 3x3 convolution by the fastest method for its shape, and the statistics of its output.

    Raises:
        NotFiniteError: the output is not finite, and ``x`` was overwritten.
    """
    norm = (prologue.weight, prologue.bias)
    shortcut = epilogue.shortcut or (None, None)
    if is_eager(x, conv, *norm, epilogue.temb, epilogue.residual, *shortcut):
        in_place = in_place and x.shape[1] == len(conv.weight) and _is_channels_last(x)
        return cpu_conv.conv3x3(
            x, conv.weight, prologue, epilogue, groups=groups, in_place=in_place
        )
    out, stats = custom_ops.conv3x3(
        x,
        conv.weight,
        epilogue.bias,
        prologue.stats,
        *norm,
        prologue.eps,
        prologue.silu,
        epilogue.temb,
        epilogue.residual,
        *shortcut,
        groups,
    )
    return out, stats


def _prologue(norm: nn.GroupNorm, x: Tensor, stats: Tensor | None = None) -> Prologue:
    """GroupNorm and SiLU of ``x``; its statistics are computed if they are not given."""
    if stats is None:
        stats = _group_stats(x, norm.num_groups)
    return Prologue(stats, norm.weight, norm.bias, norm.eps, silu=True)


def _group_stats(x: Tensor, groups: int) -> Tensor:
    return group_stats(x, groups) if is_eager(x) else custom_ops.group_stats(x, groups)


def _is_channels_last(x: Tensor) -> bool:
    return x.permute(0, 2, 3, 1).is_contiguous()
