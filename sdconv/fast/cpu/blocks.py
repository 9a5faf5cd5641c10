"""The blocks on a CPU: convolutions with GroupNorm and SiLU in their prologue, and with bias, time
embedding, residual and the next layer's statistics in their epilogue.

Feature maps are ``(B, C, H, W)``. Statistics are those of :mod:`sdconv.fast.cpu.group_stats`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdconv.fast.cpu import conv as cpu_conv
from sdconv.fast.cpu import custom_ops
from sdconv.fast.cpu.conv import Epilogue, NotFiniteError, Prologue
from sdconv.fast.cpu.group_stats import group_stats
from sdconv.fast.cpu.processor import in_float32
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
    """Runs a ResNet block with a projected time embedding, ``(B, C)``, or without one; takes the
    statistics of ``x`` where they are known, and returns those of the output in ``groups`` groups,
    None for 0 groups."""
    shortcut = block.conv_shortcut
    first = Epilogue(block.conv1.bias, projected)
    second = Epilogue(
        block.conv2.bias,
        residual=x,
        shortcut=None if shortcut is None else (shortcut.weight, shortcut.bias),
    )
    try:
        norm1 = _prologue(block.norm1, x, stats)
        hidden, inner = fused_conv3x3(x, block.conv1, norm1, first, block.norm2.num_groups)
        norm2 = _prologue(block.norm2, hidden, inner)
        # In place: nothing else reads the hidden feature map.
        out, own = fused_conv3x3(hidden, block.conv2, norm2, second, groups or 1, in_place=True)
        return out, own if groups else None
    except NotFiniteError:
        with in_float32(x.dtype):
            hidden = cpu_conv.direct_conv(x, block.conv1.weight, _prologue(block.norm1, x), first)
            norm2 = _prologue(block.norm2, hidden)
            return cpu_conv.direct_conv(hidden, block.conv2.weight, norm2, second), None


def upsample(block: Any, x: Tensor) -> Tensor:
    """Runs nearest-neighbour upsampling and its convolution."""
    return upsample_with_stats(block, x, None, 0)[0]


def upsample_with_stats(
    block: Any, x: Tensor, stats: Tensor | None, groups: int
) -> tuple[Tensor, Tensor | None]:
    """`upsample`, and the statistics of its output in ``groups`` groups, None for 0 groups; does
    not use those of ``x``."""
    conv = block.conv
    if is_eager(x, conv):
        out, own = cpu_conv.upsample_conv(x, conv.weight, conv.bias, groups=groups or 1)
    else:
        out, own = custom_ops.upsample_conv(x, conv.weight, conv.bias, groups or 1)
    return out, own if groups else None


def image_conv_with_stats(
    conv: nn.Conv2d, x: Tensor, stats: Tensor | None, groups: int
) -> tuple[Tensor, Tensor | None]:
    """Runs a convolution of an image, and returns the statistics of its output in ``groups``
    groups, None for 0 groups; does not use those of ``x``."""
    out, own = cpu_conv.image_conv(x, conv.weight, conv.bias, groups=groups or 1)
    return out, own if groups else None


def downsample(block: Any, x: Tensor) -> Tensor:
    """Runs a strided convolution that pads on the right and at the bottom."""
    return downsample_with_stats(block, x, None, 0)[0]


def downsample_with_stats(
    block: Any, x: Tensor, stats: Tensor | None, groups: int
) -> tuple[Tensor, Tensor | None]:
    """`downsample`, and the statistics of its output in ``groups`` groups, None for 0 groups and
    where they are not known; does not use those of ``x``."""
    conv = block.conv
    if not is_eager(x, conv):
        return cpu_conv.direct_downsample_conv(x, conv.weight, conv.bias), None
    out, own = cpu_conv.downsample_conv(x, conv.weight, conv.bias, groups=groups or 1)
    return out, own if groups else None


def normalised(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Applies GroupNorm, in channels-last order and from float64 statistics, as streaming does, so
    that both round alike."""
    scale, shift = (one[:, None, None] for one in _prologue(norm, x).affine())
    rows = torch.addcmul(shift, x.permute(0, 2, 3, 1).to(scale.dtype), scale)
    return rows.to(x.dtype).permute(0, 3, 1, 2)


def output(norm: Any, conv: Any, x: Tensor, stats: Tensor | None = None) -> Tensor:
    """Runs a network's last GroupNorm, SiLU and convolution; ``stats``: of ``x``, if they are
    known."""
    return fused_conv3x3(x, conv, _prologue(norm, x, stats), Epilogue(conv.bias), 1)[0]


def fused_conv3x3(
    x: Tensor,
    conv: nn.Conv2d,
    prologue: Prologue,
    epilogue: Epilogue,
    groups: int,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs a 3x3 convolution by the method of its plan; returns the output and its statistics in
    ``groups`` groups.

    Raises:
        NotFiniteError: the output is not finite, and ``x`` has been overwritten ``in_place``.
    """
    weights = (prologue.weight, prologue.bias, *(epilogue.shortcut or (None, None)))
    if is_eager(x, conv, *weights, epilogue.temb, epilogue.residual):
        in_place = in_place and x.shape[1] == len(conv.weight) and _is_channels_last(x)
        return cpu_conv.conv3x3(
            x, conv.weight, prologue, epilogue, groups=groups, in_place=in_place
        )
    out, stats = custom_ops.conv3x3(
        x,
        conv.weight,
        epilogue.bias,
        prologue.stats,
        prologue.weight,
        prologue.bias,
        prologue.eps,
        prologue.silu,
        epilogue.temb,
        epilogue.residual,
        *(epilogue.shortcut or (None, None)),
        groups,
    )
    return out, stats


def _prologue(norm: nn.GroupNorm, x: Tensor, stats: Tensor | None = None) -> Prologue:
    """GroupNorm and SiLU of ``x``, whose statistics are computed unless they are known."""
    if stats is None:
        compute = group_stats if is_eager(x) else custom_ops.group_stats
        stats = compute(x, norm.num_groups)
    return Prologue(stats, norm.weight, norm.bias, norm.eps, silu=True)


def _is_channels_last(x: Tensor) -> bool:
    return x.permute(0, 2, 3, 1).is_contiguous()
