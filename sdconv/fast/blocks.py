"""The fast implementations of the networks' blocks, registered with :mod:`sdconv.backends`.

Each function implements a ``@dispatched`` method of :mod:`sdconv.models`, under the same arguments,
and returns None where a precondition does not hold. The arithmetic is that of the device that the
feature map is on: :mod:`sdconv.fast.cpu.blocks` or :mod:`sdconv.fast.cuda.blocks`. Feature maps are
``(B, C, H, W)``, in channels-last order between the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from sdconv.backends import begins, implements, is_fast
from sdconv.fast.cpu import blocks as cpu
from sdconv.fast.cpu.buffer_pool import use_pool
from sdconv.fast.cpu.conv import direct_downsample_conv, im2col_conv
from sdconv.fast.cpu.processor import in_float32, is_slow
from sdconv.fast.cuda import blocks as cuda
from sdconv.fast.preconditions import (
    is_bare,
    is_conv1x1,
    is_conv3x3,
    is_eager,
    is_image_conv,
    is_linear,
    is_norm,
    is_supported,
)
from sdconv.models.blocks import (
    AsymmetricDownsample2D,
    Attention,
    DownEncoderBlock2D,
    Downsample2D,
    MidBlock2D,
    ResnetBlock2D,
    UpDecoderBlock2D,
    Upsample2D,
)
from sdconv.models.unet import UNet2DConditionModel
from sdconv.models.vae import Decoder, Encoder


class Arithmetic(Protocol):
    """The functions that a device's module of blocks provides."""

    def resnet(self, block: Any, x: Tensor, temb: Tensor | None) -> Tensor: ...
    def upsample(self, block: Any, x: Tensor) -> Tensor: ...
    def output(self, norm: Any, conv: Any, x: Tensor, stats: Tensor | None = None) -> Tensor: ...

    # with the statistics of the input, if they are known, and the groups of those to return
    def resnet_with_stats(
        self, block: Any, x: Tensor, stats: Tensor | None, groups: int
    ) -> tuple[Tensor, Tensor | None]: ...
    def upsample_with_stats(
        self, block: Any, x: Tensor, stats: Tensor | None, groups: int
    ) -> tuple[Tensor, Tensor | None]: ...


ARITHMETIC: dict[str, Arithmetic] = {"cpu": cpu, "cuda": cuda}


@implements(ResnetBlock2D.forward)
def resnet(block: Any, x: Tensor, temb: Tensor | None = None) -> Tensor | None:
    if not can_run_resnet(block, x):
        return _plain(ResnetBlock2D.forward, block, x, temb)
    return ARITHMETIC[x.device.type].resnet(block, x, temb)


def _plain(function: Any, module: Any, x: Tensor, *args: Any) -> Tensor | None:
    """A dispatched function's plain body, for a feature map on a CPU that this backend has put into
    channels-last order, or whose dtype is slow; None for others.

    In that order, torch's GroupNorm for CPUs takes the variance as ``E[x^2] - E[x]^2`` in float32.
    """
    if x.device.type != "cpu" or x.ndim != 4:
        return None
    dense = x.contiguous()
    out = plain_in_float32(function, module, dense, *args)
    if out is None and dense is not x:
        out = function.__wrapped__(module, dense, *args)
    return out


def plain_in_float32(function: Any, module: Any, x: Tensor, *args: Any) -> Tensor | None:
    """A dispatched function's plain body, where torch is slow in the dtype of ``x`` and its layers
    may compute in float32; None elsewhere."""
    if not is_widened(x):
        return None
    with widened(x):
        return cast(Tensor, function.__wrapped__(module, x, *args))


def widened(x: Tensor) -> AbstractContextManager[Any]:
    """`in_float32` for a feature map that `is_widened`; nothing for others."""
    return in_float32(x.dtype) if is_widened(x) else nullcontext()


def is_widened(x: Tensor) -> bool:
    """Whether a feature map's layers compute in float32: it is on a CPU that is slow in its dtype.
    torch.compile traces its own operations."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and is_slow(x.dtype)


def can_run_resnet(block: Any, x: Tensor) -> bool:
    """Whether the parts of a ResNet block are plain layers that the fast arithmetic can replace."""
    return (
        _can_run(x)
        and is_norm(block.norm1, x)
        and is_conv3x3(block.conv1, x)
        and is_norm(block.norm2, x)
        and is_conv3x3(block.conv2, x)
        and is_bare(block.nonlinearity, nn.SiLU)
        and (block.conv_shortcut is None or is_conv1x1(block.conv_shortcut, x))
    )


@implements(Upsample2D.forward)
def upsample(block: Any, x: Tensor, output_size: tuple[int, int] | None = None) -> Tensor | None:
    if not can_run_upsample(block, x, output_size):
        return plain_in_float32(Upsample2D.forward, block, x, output_size)
    return ARITHMETIC[x.device.type].upsample(block, x)


def can_run_upsample(block: Any, x: Tensor, output_size: tuple[int, int] | None) -> bool:
    """Whether an upsampling block has a plain 3x3 convolution and upsamples by exactly 2."""
    by_two = output_size is None or tuple(output_size) == (2 * x.shape[2], 2 * x.shape[3])
    return by_two and _can_run(x) and is_conv3x3(block.conv, x)


@implements(AsymmetricDownsample2D.forward)
def downsample(block: Any, x: Tensor) -> Tensor | None:
    if not can_run_downsample(block, x):
        return plain_in_float32(AsymmetricDownsample2D.forward, block, x)
    if _is_cuda(x):
        return direct_downsample_conv(x, block.conv.weight, block.conv.bias)
    return cpu.downsample(block, x)


def can_run_downsample(block: Any, x: Tensor) -> bool:
    """Whether a downsampling block has a plain convolution, and several rows and columns to
    process."""
    plain = not block.seamless_axes and is_conv3x3(block.conv, x, stride=2, padding=0)
    return plain and _can_run(x) and min(x.shape[2:]) > 1


@implements(Downsample2D.forward)
def padded_downsample(block: Any, x: Tensor) -> Tensor | None:
    if not can_run_padded_downsample(block, x):
        return plain_in_float32(Downsample2D.forward, block, x)
    with widened(x):
        return im2col_conv(x, block.conv.weight, block.conv.bias)


def can_run_padded_downsample(block: Any, x: Tensor) -> bool:
    """Whether a U-Net's downsampling block has a plain convolution, and so few outputs that torch's
    kernel mostly copies its weight."""
    return (
        x.device.type == "cpu"
        and is_supported(x)
        and is_conv3x3(block.conv, x, stride=2, padding=1)
        and is_eager(x, block.conv)
        and block.conv.weight.is_contiguous()
        and len(x) * x.shape[2] * x.shape[3] < 4 * x.shape[1]
    )


@implements(Attention.forward)
def attention(block: Any, x: Tensor) -> Tensor | None:
    if not _is_cuda(x) or not can_run_attention(block, x):
        return plain_in_float32(Attention.forward, block, x)
    return cuda.attention(block, x)


def can_run_attention(block: Any, x: Tensor) -> bool:
    """Whether the parts of an attention block are plain layers that CUDA's arithmetic can
    replace."""
    projections = (block.to_q, block.to_k, block.to_v, block.to_out[0])
    plain = is_norm(block.group_norm, x) and all(is_linear(one, x) for one in projections)
    return plain and _can_run(x)


@implements(Attention.normalised)
def attention_norm(block: Any, x: Tensor) -> Tensor | None:
    norm = block.group_norm
    if not (ARITHMETIC.get(x.device.type) is cpu and is_supported(x) and is_norm(norm, x)):
        return None
    if not is_eager(x, *norm.parameters()):
        return None
    return cpu.normalised(norm, x).flatten(2)


@implements(Encoder.forward)
def encoder(network: Any, x: Tensor) -> Tensor | None:
    return _half(network, x, (*network.down_blocks, network.mid_block))


@implements(Decoder.forward)
def decoder(network: Any, z: Tensor) -> Tensor | None:
    return _half(network, z, (network.mid_block, *network.up_blocks))


def _half(network: Any, x: Tensor, blocks: Iterable[nn.Module]) -> Tensor | None:
    """Runs an encoder or decoder; its feature maps reuse memory if no gradient needs them."""
    if not _can_run(x):
        return None
    stats = None
    with widened(x):
        if torch.is_grad_enabled() or (torch.compiler.is_compiling() and not _is_cuda(x)):
            x = network.conv_in(_in_channels_last(x))
            for block in blocks:
                x = network.checkpoint_call(block, x)
        elif _is_cuda(x):
            x, stats = _layer_by_layer(network, x, blocks)
        else:
            with use_pool():
                return _output(network, *_layer_by_layer(network, _in_channels_last(x), blocks))
        return _output(network, x, stats)


def _layer_by_layer(
    network: Any, x: Tensor, blocks: Iterable[nn.Module]
) -> tuple[Tensor, Tensor | None]:
    """Half of a VAE up to its last GroupNorm, whose statistics are returned too if they are known:
    each layer passes on the statistics that the next one needs."""
    layers = [network.conv_in]
    for layer in flatten_stages(blocks):
        if is_bare(layer, MidBlock2D):
            mid = cast(MidBlock2D, layer)
            layers += (mid.resnets[0], *mid.attentions, mid.resnets[1])
        else:
            layers.append(layer)
    stats = None
    for layer, following in pairwise([*layers, network.conv_norm_out]):
        with_stats = _with_stats(layer, x)
        if with_stats is None:
            x, stats = layer(x), None
        else:
            begins(layer)
            x, stats = with_stats(layer, x, stats, _groups(following, _out_channels(layer, x)))
    return x, stats


def _with_stats(layer: Any, x: Tensor) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """The device's function for a layer that is computed without being called, or None."""
    if not is_fast(layer):
        return None
    arithmetic = ARITHMETIC[x.device.type]
    if is_bare(layer, ResnetBlock2D) and can_run_resnet(layer, x) and layer.time_emb_proj is None:
        return arithmetic.resnet_with_stats
    if is_bare(layer, Upsample2D) and can_run_upsample(layer, x, None):
        return arithmetic.upsample_with_stats
    if arithmetic is cpu:
        if is_bare(layer, AsymmetricDownsample2D) and can_run_downsample(layer, x):
            return cpu.downsample_with_stats
        return cpu.image_conv_with_stats if is_image_conv(layer, x) else None
    if is_bare(layer, Attention) and can_run_attention(layer, x):
        return cuda.attention_with_stats
    if is_conv3x3(layer, x):
        return cuda.conv_with_stats
    return None


def _out_channels(layer: Any, x: Tensor) -> int:
    """The channels that a layer makes of ``x``."""
    conv = layer.conv2 if isinstance(layer, ResnetBlock2D) else getattr(layer, "conv", layer)
    return conv.out_channels if isinstance(conv, nn.Conv2d) else x.shape[1]


def _groups(layer: nn.Module, channels: int) -> int:
    """The number of groups of a layer's first GroupNorm; 0 if it does not begin with one of so many
    channels."""
    if isinstance(layer, ResnetBlock2D):
        layer = layer.norm1
    elif isinstance(layer, Attention):
        layer = layer.group_norm
    if isinstance(layer, nn.GroupNorm) and layer.num_channels == channels:
        return layer.num_groups
    return 0


def flatten_stages(blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yields the layers of down and up blocks in place of the blocks; a block with hooks is kept.

    A call of a whole block keeps the block's input alive until its last layer is done: a quarter of
    the VAE's memory at its highest resolution.
    """
    for block in blocks:
        if is_bare(block, DownEncoderBlock2D):
            down = cast(DownEncoderBlock2D, block)
            yield from (*down.resnets, *(down.downsamplers or ()))
        elif is_bare(block, UpDecoderBlock2D):
            up = cast(UpDecoderBlock2D, block)
            yield from (*up.resnets, *(up.upsamplers or ()))
        else:
            yield block


@implements(UNet2DConditionModel.project_in)
def unet_input(network: Any, sample: Tensor) -> Tensor | None:
    if not _can_run(sample):
        return None
    with widened(sample):
        return cast(Tensor, network.conv_in(_in_channels_last(sample)))


@implements(UNet2DConditionModel.project_out)
def unet_output(network: Any, x: Tensor) -> Tensor:
    with widened(x):
        return _output(network, x)


def _output(network: Any, x: Tensor, stats: Tensor | None = None) -> Tensor:
    """A network's last GroupNorm, SiLU and convolution; ``stats``: of ``x``, if they are known."""
    norm, activation, conv = network.conv_norm_out, network.conv_act, network.conv_out
    if can_run_output(norm, activation, conv, x):
        return ARITHMETIC[x.device.type].output(norm, conv, x, stats)
    if x.device.type == "cpu":  # see _plain
        x = x.contiguous()
    return cast(Tensor, conv(activation(norm(x))))


def can_run_output(norm: nn.Module, activation: nn.Module, conv: nn.Module, x: Tensor) -> bool:
    """Whether a network's last layers are plain ones that the fast arithmetic can replace."""
    return _can_run(x) and is_norm(norm, x) and is_bare(activation, nn.SiLU) and is_conv3x3(conv, x)


def _in_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _can_run(x: Tensor) -> bool:
    return x.device.type in ARITHMETIC and is_supported(x)


def _is_cuda(x: Tensor) -> bool:
    return ARITHMETIC.get(x.device.type) is cuda
