"""The tiny autoencoder on a CPU: ReLU and the residual are part of the convolutions before them.

Registered with :mod:`sdconv.backends` as in :mod:`sdconv.fast.blocks`. Under torch.compile, with
gradients and on CUDA the plain code of :mod:`sdconv.models.tiny` runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.backends import implements, is_fast
from sdconv.fast.blocks import plain_in_float32, widened
from sdconv.fast.cpu.buffer_pool import use_pool
from sdconv.fast.cpu.conv import (
    Epilogue,
    NotFiniteError,
    conv3x3,
    image_conv,
    plan_for,
    upsample_conv,
)
from sdconv.fast.preconditions import is_bare, is_conv3x3, is_eager, is_image_conv, is_supported
from sdconv.models.tiny import DecoderTiny, EncoderTiny, TinyBlock


@implements(TinyBlock.forward)
def tiny_block(block: Any, x: Tensor) -> Tensor | None:
    if not can_run_tiny_block(block, x):
        return None
    first, _, second, _, third = block.conv
    try:
        # in place: nothing else reads the hidden feature maps
        y = _conv(x, first, Epilogue(first.bias, relu=True))
        y = _conv(y, second, Epilogue(second.bias, relu=True), in_place=True)
        return _conv(y, third, Epilogue(third.bias, residual=x, relu=True), in_place=True)
    except NotFiniteError:
        return None


def can_run_tiny_block(block: Any, x: Tensor) -> bool:
    """Whether the parts of a tiny block are plain layers, for which torch has no faster kernel."""
    convs, activations = block.conv[::2], (*block.conv[1::2], block.fuse)
    return (
        _can_run(x, convs)
        and is_bare(block.conv, nn.Sequential)
        and all(is_conv3x3(conv, x) for conv in convs)
        and all(is_bare(activation, nn.ReLU) for activation in activations)
        and all(plan_for("conv3x3", x, conv.weight, False).method != "direct" for conv in convs)
    )


def _conv(x: Tensor, conv: nn.Conv2d, epilogue: Epilogue, in_place: bool = False) -> Tensor:
    return conv3x3(x, conv.weight, None, epilogue, groups=1, in_place=in_place)[0]


@implements(EncoderTiny.forward)
def encoder(network: Any, x: Tensor) -> Tensor | None:
    if not _can_run_half(network, x):
        return plain_in_float32(EncoderTiny.forward, network, x)
    return _run(network.layers, network.enter(x))


@implements(DecoderTiny.forward)
def decoder(network: Any, z: Tensor) -> Tensor | None:
    if not _can_run_half(network, z):
        return plain_in_float32(DecoderTiny.forward, network, z)
    return _run(network.layers, network.enter(z)).mul_(2).sub_(1)


def _run(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Runs layers on a channels-last feature map, upsampling as part of the convolution after it;
    feature maps reuse memory."""
    x = x.contiguous(memory_format=torch.channels_last)
    remaining: list[Any] = list(layers)
    with use_pool(), widened(x):
        while remaining:
            layer = remaining.pop(0)
            if remaining and can_run_upsample(layer, remaining[0], x):
                conv: Any = remaining.pop(0)
                x = upsample_conv(x, conv.weight, conv.bias, groups=1)[0]
            elif is_fast(layer) and is_image_conv(layer, x):
                x = image_conv(x, layer.weight, layer.bias, groups=1)[0]
            else:
                x = layer(x)
    return x.contiguous()


def can_run_upsample(layer: Any, following: nn.Module, x: Tensor) -> bool:
    """Whether a layer is nearest upsampling by 2 before a plain 3x3 convolution."""
    return (
        is_bare(layer, nn.Upsample)
        and (layer.size, layer.scale_factor, layer.mode) == (None, 2.0, "nearest")
        and is_fast(following)
        and is_supported(x)
        and is_conv3x3(following, x)
    )


def _can_run_half(network: Any, x: Tensor) -> bool:
    return _can_run(x, network.parameters()) and is_bare(network.layers, nn.Sequential)


def _can_run(x: Tensor, operands: Iterable[Any]) -> bool:
    return x.device.type == "cpu" and is_supported(x) and is_eager(x, *operands)
