"""The blocks on CUDA: channels-last maps, GroupNorm and SiLU in one kernel, doubling as four phases
of the small map. Convolutions are torch's.

The tests run it on a CPU, the kernel in Triton's interpreter, and on stand-ins for CUDA's tensors.
None of it has run on a GPU yet.

Convolutions read weights in channels-last order too, and reorder others in each call:
``network.to(memory_format=torch.channels_last)`` does so once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdconv.fast.cuda import group_norm
from sdconv.fast.cuda import upsample as phases
from sdconv.fast.eager import is_eager


def resnet(block: Any, x: Tensor, temb: Tensor | None) -> Tensor:
    """A ResNet block's output."""
    x = x.to(memory_format=torch.channels_last)
    added = None
    if block.time_emb_proj is not None:
        added = block.time_emb_proj(block.nonlinearity(temb))
    hidden = block.conv1(_norm_silu(block.norm1, x))
    out: Tensor = block.conv2(_norm_silu(block.norm2, hidden, added))
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x)
    # no gradient needs what the convolution gave
    return out.add_(x)


def doubling(block: Any, x: Tensor) -> Tensor:
    """A doubled map after its convolution."""
    return phases.doubled_convolution(x, block.conv.weight, block.conv.bias)


def last(norm: Any, conv: Any, x: Tensor) -> Tensor:
    """A network's last normalisation, SiLU and convolution."""
    return conv(_norm_silu(norm, x))  # type: ignore[no-any-return]


def _norm_silu(norm: nn.GroupNorm, x: Tensor, added: Tensor | None = None) -> Tensor:
    eager = is_eager(x, norm.weight, norm.bias, added)
    function = group_norm.norm_silu if eager else group_norm.operator
    return function(x, added, norm.weight, norm.bias, norm.num_groups, norm.eps)
