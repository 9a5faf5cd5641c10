"""The blocks on CUDA: channels-last feature maps, GroupNorm and SiLU in one kernel, upsampling by
sub-pixel decomposition. The convolutions are torch's.

The tests run this module on a CPU, the kernel in Triton's interpreter, and on CUDA tensors without
values. It has not run on a GPU yet.

Convolutions want channels-last weights, and convert other weights in each call:
``network.to(memory_format=torch.channels_last)`` does so once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from sdconv.fast.cuda import group_norm
from sdconv.fast.cuda.upsample import upsample_conv
from sdconv.fast.preconditions import is_eager


def resnet(block: Any, x: Tensor, temb: Tensor | None) -> Tensor:
    """A ResNet block."""
    x = x.to(memory_format=torch.channels_last)
    projected = None
    if block.time_emb_proj is not None:
        projected = block.time_emb_proj(block.nonlinearity(temb))
    hidden = block.conv1(_norm_silu(block.norm1, x))
    out: Tensor = block.conv2(_norm_silu(block.norm2, hidden, projected))
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x)
    # In place: no gradient needs the convolution's output.
    return out.add_(x)


def upsample(block: Any, x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling and its convolution."""
    return upsample_conv(x, block.conv.weight, block.conv.bias)


def output(norm: Any, conv: Any, x: Tensor) -> Tensor:
    """A network's last GroupNorm, SiLU and convolution."""
    return cast(Tensor, conv(_norm_silu(norm, x)))


def _norm_silu(norm: nn.GroupNorm, x: Tensor, added: Tensor | None = None) -> Tensor:
    eager = is_eager(x, norm.weight, norm.bias, added)
    function = group_norm.norm_silu if eager else group_norm.operator
    return function(x, added, norm.weight, norm.bias, norm.num_groups, norm.eps)
