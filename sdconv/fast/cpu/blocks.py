"""The blocks on a CPU: Winograd's convolutions, with normalisation and sums in the same pass.

Maps are ``(B, C, H, W)``; moments are those of :mod:`sdconv.fast.cpu.group_stats`.
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
    added = None
    if block.time_emb_proj is not None:
        added = block.time_emb_proj(block.nonlinearity(temb))
    shortcut = block.conv_shortcut
    after = Epilogue(
        block.conv2.bias,
        residual=x,
        shortcut=None if shortcut is None else (shortcut.weight, shortcut.bias),
    )
    try:
        norm = _norm(block.norm1, x)
        before = Epilogue(block.conv1.bias, added)
        hidden, found = convolution(x, block.conv1, norm, before, block.norm2.num_groups)
        norm = _norm(block.norm2, hidden, found)
        # what is hidden has no other reader
        return convolution(hidden, block.conv2, norm, after, 1, in_place=True)[0]
    except NotFiniteError:
        hidden = cpu_conv.direct_conv(x, block.conv1.weight, _norm(block.norm1, x), before)
        return cpu_conv.direct_conv(hidden, block.conv2.weight, _norm(block.norm2, hidden), after)


def upsample(block: Any, x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling and its convolution."""
    conv = block.conv
    if is_eager(x, conv):
        return cpu_conv.upsample_conv(x, conv.weight, conv.bias, groups=1)[0]
    out: Tensor = custom_ops.upsample_conv(x, conv.weight, conv.bias, 1)[0]
    return out


def normalised(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """GroupNorm in channels-last order, from float64 statistics, so that streaming rounds alike."""
    scale, shift = (one[:, None, None] for one in _norm(norm, x).affine())
    rows = torch.addcmul(shift, x.permute(0, 2, 3, 1).to(scale.dtype), scale)
    return rows.to(x.dtype).permute(0, 3, 1, 2)


def output(norm: Any, conv: Any, x: Tensor) -> Tensor:
    """A network's last GroupNorm, SiLU and convolution."""
    return convolution(x, conv, _norm(norm, x), Epilogue(conv.bias), 1)[0]


def convolution(
    x: Tensor,
    conv: nn.Conv2d,
    norm: Prologue,
    after: Epilogue,
    groups: int,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """A 3x3 convolution by the method that its shape is best served by, and its moments.

    Raises:
        NotFiniteError: the output is not finite and ``x`` was spoilt by writing ``in_place``.
    """
    shortcut = after.shortcut or (None, None)
    if is_eager(x, conv, norm.weight, norm.bias, after.temb, after.residual, *shortcut):
        in_place = in_place and x.shape[1] == len(conv.weight) and _is_channels_last(x)
        return cpu_conv.conv3x3(x, conv.weight, norm, after, groups=groups, in_place=in_place)
    out, found = custom_ops.conv3x3(
        x,
        conv.weight,
        after.bias,
        norm.stats,
        norm.weight,
        norm.bias,
        norm.eps,
        norm.silu,
        after.temb,
        after.residual,
        *shortcut,
        groups,
    )
    return out, found


def _norm(norm: nn.GroupNorm, x: Tensor, moments: Tensor | None = None) -> Prologue:
    """A normalisation and SiLU of ``x``, whose moments are given if they are known."""
    if moments is None:
        moments = _moments(x, norm.num_groups)
    return Prologue(moments, norm.weight, norm.bias, norm.eps, silu=True)


def _moments(x: Tensor, groups: int) -> Tensor:
    return group_stats(x, groups) if is_eager(x) else custom_ops.group_stats(x, groups)


def _is_channels_last(x: Tensor) -> bool:
    return x.permute(0, 2, 3, 1).is_contiguous()
