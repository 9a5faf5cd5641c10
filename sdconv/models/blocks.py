"""The convolutional blocks of the VAE and the U-Net.

Shapes: ``B`` batch, ``C`` channels, ``H W`` rows and columns, ``T`` width of the time embedding.
Parameters are in diffusers' order, which optimizer states depend on. Original code:
``ldm/modules/diffusionmodules/model.py`` (VAE) and ``openaimodel.py`` (U-Net) of
CompVis/latent-diffusion. A method marked ``@dispatched`` may also run on the fast backend, see
:mod:`sdconv.backends`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdconv.backends import dispatched
from sdconv.models.padding import ZEROS, modes_for, pad


class ResnetBlock2D(nn.Module):
    """A ResNet block: ``x + conv2(silu(norm2(conv1(silu(norm1(x))) + time)))``.

    Source: He et al. 2016 in its pre-activation form, with GroupNorm and SiLU. Where the number of
    channels changes, the shortcut is a 1x1 convolution.

    Args:
        in_channels, out_channels: multiples of ``groups``.
        temb_channels: ``T``, or None for a block without a time embedding (the VAE's).
        groups: number of groups of GroupNorm.
        eps: added to each group's variance.

    Shape: ``(B, in_channels, H, W)``, and ``(B, T)`` with a time embedding, to ``(B, out_channels,
    H, W)``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None,
        groups: int,
        eps: float,
    ) -> None:
        super().__init__()
        # diffusers' ControlNet-XS reads these
        self.in_channels, self.out_channels = in_channels, out_channels
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = (
            None if temb_channels is None else nn.Linear(temb_channels, out_channels)
        )
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = nn.SiLU()
        self.conv_shortcut = (
            None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )

    @dispatched
    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.conv1(self.nonlinearity(self.norm1(x)))
        if self.time_emb_proj is not None:
            time = self.time_emb_proj(self.nonlinearity(temb))
            hidden = hidden + time.unsqueeze(-1).unsqueeze(-1)
        hidden = self.conv2(self.nonlinearity(self.norm2(hidden)))
        if self.conv_shortcut is not None:
            # The memory layout that diffusers uses in training; rounding depends on it.
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return x + hidden


class Downsample2D(nn.Module):
    """The U-Net's downsampling: a 3x3 convolution with stride 2 and one row of zeros on every side.

    Shape: ``(B, C, H, W)`` to ``(B, C, ceil(H/2), ceil(W/2))``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    @dispatched
    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(x))


class AsymmetricDownsample2D(nn.Module):
    """The VAE's downsampling: a 3x3 convolution with stride 2 and zeros on the right and at the
    bottom only.

    On even sizes this is TensorFlow's ``SAME`` padding at stride 2.

    Shape: ``(B, C, H, W)`` to ``(B, C, floor(H/2), floor(W/2))``.
    """

    # Set by sdconv.seamless: axes along which padding is circular.
    seamless_axes: str = ""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0)

    @dispatched
    def forward(self, x: Tensor) -> Tensor:
        padded = pad(x, (0, 1, 0, 1), modes_for(self.seamless_axes, ZEROS))
        return cast(Tensor, self.conv(padded))


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution.

    Shape: ``(B, C, H, W)`` to ``(B, C, 2H, 2W)``, or to ``(B, C, *output_size)`` in a U-Net whose
    skip connection has an odd size.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    @dispatched
    def forward(self, x: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        # diffusers leaves the channels-last layout here, whose kernels failed on large inputs in
        # older versions of torch. A graph that is traced is one for any size.
        if not torch.compiler.is_compiling() and (x.shape[0] >= 64 or x.numel() > 2**30):
            x = x.contiguous()
        if output_size is None:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = F.interpolate(x, size=output_size, mode="nearest")
        return cast(Tensor, self.conv(x))


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by diffusers' ``AttnProcessor``, whose memory grows with ``(H*W)^2``.

    It is the function of ``F.scaled_dot_product_attention``, and rounds differently.

    Shape: three times ``(B, 1, H*W, C)`` to the same.
    """
    query, key, value = (x.squeeze(1) for x in (query, key, value))
    unused = query.new_empty(query.shape[0], query.shape[1], key.shape[1])
    scores = torch.baddbmm(
        unused, query, key.transpose(-1, -2), beta=0, alpha=query.shape[-1] ** -0.5
    )
    shares = scores.float().softmax(dim=-1).to(query.dtype)
    return torch.bmm(shares, value).unsqueeze(1)


class Attention(nn.Module):
    """The VAE's self-attention: one head, as wide as the feature map has channels.

    Source: ``AttnBlock`` in the original code, where the four projections are 1x1 convolutions;
    here they are linear layers.

    Shape: ``(B, C, H, W)`` to the same. Memory grows with ``H*W``, time with ``(H*W)^2``.
    """

    # What `set_attn_processor` has chosen. (diffusers' processor itself is then `processor`.)
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(
        F.scaled_dot_product_attention
    )

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        # A list with one element, for diffusers' names of the weights: `to_out.0.weight`.
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    @dispatched
    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.normalised(x).transpose(1, 2)
        query, key, value = (
            # (B, 1 head, HW, C)
            project(tokens).view(batch, -1, 1, channels).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        out = self.attend(query, key, value)
        out = self.to_out[0](out.transpose(1, 2).reshape(batch, -1, channels))
        result: Tensor = out.transpose(-1, -2).reshape(batch, channels, height, width) + x
        return result

    @dispatched
    def normalised(self, x: Tensor) -> Tensor:
        """Applies GroupNorm: ``(B, C, H, W)`` to ``(B, C, H*W)``."""
        # Flattened first: rounding in the projections depends on this memory layout of diffusers'.
        return cast(Tensor, self.group_norm(x.flatten(2)))


class Checkpointed(nn.Module):
    """A module that can recompute its blocks' activations in the backward pass instead of storing
    them (gradient checkpointing)."""

    gradient_checkpointing: bool = False

    def checkpoint_call(self, block: Callable[..., Any], *args: Any) -> Any:
        """Returns ``block(*args)``, through ``torch.utils.checkpoint`` while gradient checkpointing
        is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


class MidBlock2D(nn.Module):
    """The VAE's mid block, at the lowest resolution: ResNet block, attention, ResNet block.

    Shape: ``(B, C, H, W)`` to the same.
    """

    def __init__(self, channels: int, *, attention: bool, groups: int, eps: float) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            [Attention(channels, groups=groups, eps=eps)] if attention else []
        )
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels, channels, temb_channels=None, groups=groups, eps=eps)
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return cast(Tensor, self.resnets[1](x))


class DownEncoderBlock2D(nn.Module):
    """One resolution of the VAE's encoder: ResNet blocks, then downsampling everywhere but in the
    last block.

    Shape: ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``, or to ``(B, out_channels, H/2,
    W/2)`` if it downsamples.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        layers: int,
        downsample: bool,
        groups: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.resnets = vae_resnets(in_channels, out_channels, layers, groups, eps)
        self.downsamplers = (
            nn.ModuleList([AsymmetricDownsample2D(out_channels)]) if downsample else None
        )

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for downsampler in self.downsamplers or ():
            x = downsampler(x)
        return x


class UpDecoderBlock2D(nn.Module):
    """One resolution of the VAE's decoder: ResNet blocks, then upsampling everywhere but in the
    last block.

    Shape: ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``, or to ``(B, out_channels, 2H,
    2W)`` if it upsamples.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        layers: int,
        upsample: bool,
        groups: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.resnets = vae_resnets(in_channels, out_channels, layers, groups, eps)
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)]) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for upsampler in self.upsamplers or ():
            x = upsampler(x)
        return x


def vae_resnets(
    in_channels: int, out_channels: int, layers: int, groups: int, eps: float
) -> nn.ModuleList:
    """``layers`` ResNet blocks without a time embedding; the first changes the number of
    channels."""
    inputs: Iterable[int] = (in_channels, *(out_channels,) * (layers - 1))
    return nn.ModuleList(
        ResnetBlock2D(channels, out_channels, temb_channels=None, groups=groups, eps=eps)
        for channels in inputs
    )
