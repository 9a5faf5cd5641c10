"""The convolutional blocks with fused arithmetic.

Each function takes a block of :mod:`sdconv.models.blocks` and computes what its ``forward`` does,
by the means of the device that the map is on. Maps are ``(B, C, H, W)``.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdconv.backends import is_fast
from sdconv.fast.cpu import blocks as cpu
from sdconv.fast.cuda import blocks as cuda
from sdconv.fast.eager import is_eager
from sdconv.fast.modules import is_bare, is_conv1x1, is_conv3x3, is_norm, takes


class Arithmetic(Protocol):
    """What a device's module has."""

    def resnet(self, block: Any, x: Tensor, temb: Tensor | None) -> Tensor: ...
    def doubling(self, block: Any, x: Tensor) -> Tensor: ...
    def last(self, norm: Any, conv: Any, x: Tensor) -> Tensor: ...


_ON: dict[str, Arithmetic] = {"cpu": cpu, "cuda": cuda}


def first(conv: nn.Module, x: Tensor) -> Tensor:
    """A network's first convolution; in the memory layout that the fast blocks go on in."""
    if is_fast(conv) and _takes(x):
        x = x.contiguous(memory_format=torch.channels_last)
    out: Tensor = conv(x)
    return out


def runs_resnet(block: Any, x: Tensor) -> bool:
    """Whether a ResNet block is to compute fast, and can: nothing hangs on its parts that has to
    see what goes through them."""
    return (
        is_fast(block)
        and _takes(x)
        and is_norm(block.norm1, x)
        and is_conv3x3(block.conv1, x)
        and is_norm(block.norm2, x)
        and is_conv3x3(block.conv2, x)
        and is_bare(block.nonlinearity, nn.SiLU)
        and (block.conv_shortcut is None or is_conv1x1(block.conv_shortcut, x))
    )


def resnet(block: Any, x: Tensor, temb: Tensor | None) -> Tensor:
    """A ResNet block's output."""
    return _ON[x.device.type].resnet(block, x, temb)


def runs_doubling(block: Any, x: Tensor, output_size: tuple[int, int] | None) -> bool:
    """Whether a doubling is to compute fast, and can."""
    exact = output_size is None or tuple(output_size) == (2 * x.shape[2], 2 * x.shape[3])
    return exact and is_fast(block) and _takes(x) and is_conv3x3(block.conv, x)


def doubling(block: Any, x: Tensor) -> Tensor:
    """A doubled map after its convolution."""
    return _ON[x.device.type].doubling(block, x)


def runs_halving(block: Any, x: Tensor) -> bool:
    """Whether a halving without zeros above and at the left is to compute fast, and can."""
    return (
        is_fast(block)
        and _takes(x)
        and is_conv3x3(block.conv, x, stride=2, padding=0)
        and min(x.shape[2:]) > 1
    )


def halving(block: Any, x: Tensor) -> Tensor:
    """A halved map. With two rows of zeros on every side, which need no copy of the map, every
    output but the first row and column stands where it would without any."""
    height, width = (size // 2 for size in x.shape[2:])
    conv = block.conv
    out = functional.conv2d(x, conv.weight, conv.bias, stride=2, padding=2)
    return out.narrow(2, 1, height).narrow(3, 1, width).to(memory_format=torch.channels_last)


def runs_norm(norm: nn.Module, x: Tensor) -> bool:
    """Whether a normalisation by itself is to compute fast, and can."""
    return (
        is_fast(norm)
        and x.device.type == "cpu"
        and takes(x)
        and is_norm(norm, x)
        and is_eager(x, *norm.parameters())
    )


def normalised(norm: Any, x: Tensor) -> Tensor:
    """A map's normalisation."""
    return cpu.normalised(norm, x)


def runs_last(norm: nn.Module, activation: nn.Module, conv: nn.Module, x: Tensor) -> bool:
    """Whether a network's last normalisation, SiLU and convolution are to compute fast."""
    return (
        is_fast(conv)
        and _takes(x)
        and is_norm(norm, x)
        and is_bare(activation, nn.SiLU)
        and is_conv3x3(conv, x)
    )


def last(norm: Any, conv: Any, x: Tensor) -> Tensor:
    """A network's last normalisation, SiLU and convolution."""
    return _ON[x.device.type].last(norm, conv, x)


def _takes(x: Tensor) -> bool:
    return x.device.type in _ON and takes(x)
