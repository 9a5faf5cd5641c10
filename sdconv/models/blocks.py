"""The convolutional blocks that the VAE and the U-Net are made of.

Shapes: ``B`` batch, ``C`` channels, ``H W`` rows and columns, ``T`` width of the time embedding.
Parameters stand in diffusers' order, which optimizer states depend on. Original code:
``ldm/modules/diffusionmodules/model.py`` (VAE) and ``openaimodel.py`` (U-Net) of
CompVis/latent-diffusion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdconv.fast import blocks as fast
from sdconv.fast.cpu.buffer_pool import use_pool
from sdconv.fast.modules import is_bare


class ResnetBlock2D(nn.Module):
    """Two 3x3 convolutions with a bypass: ``x + conv2(silu(norm2(conv1(silu(norm1(x))) + time)))``.

    Source: He et al. 2016 in its pre-activation form, with GroupNorm and SiLU. Where the channels
    differ the bypass is a 1x1 convolution.

    Args:
        in_channels, out_channels: multiples of ``groups``.
        temb_channels: ``T``, or None for a block that knows no time (the VAE's).
        groups: normalisation groups. eps: added to each group's variance.

    Shape: ``(B, in_channels, H, W)``, and ``(B, T)`` if it takes a time embedding, to ``(B,
    out_channels, H, W)``.
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

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        if fast.runs_resnet(self, x):
            return fast.resnet(self, x, temb)
        hidden = self.conv1(self.nonlinearity(self.norm1(x)))
        if self.time_emb_proj is not None:
            time = self.time_emb_proj(self.nonlinearity(temb))
            hidden = hidden + time.unsqueeze(-1).unsqueeze(-1)
        hidden = self.conv2(self.nonlinearity(self.norm2(hidden)))
        if self.conv_shortcut is not None:
            # the memory layout that diffusers gives it in training, which rounding depends on
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        out: Tensor = x + hidden
        return out


class Downsample2D(nn.Module):
    """The U-Net's halving of rows and columns: a 3x3 convolution at stride 2, one row of zeros on
    every side.

    Shape: ``(B, C, H, W)`` to ``(B, C, ceil(H/2), ceil(W/2))``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class AsymmetricDownsample2D(nn.Module):
    """The VAE's halving: a 3x3 convolution at stride 2, zeros at the right and at the bottom only.

    On even sizes this is what TensorFlow calls ``SAME`` at stride 2.

    Shape: ``(B, C, H, W)`` to ``(B, C, floor(H/2), floor(W/2))``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        if fast.runs_halving(self, x):
            return fast.halving(self, x)
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample2D(nn.Module):
    """Each pixel repeated as a 2x2 square, then a 3x3 convolution.

    Shape: ``(B, C, H, W)`` to ``(B, C, 2H, 2W)``, or to ``(B, C, *output_size)`` where a skip of
    odd size waits.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        if fast.runs_doubling(self, x, output_size):
            return fast.doubling(self, x)
        # where diffusers leaves channels-last, whose kernels failed on so much in older torch
        if len(x) >= 64 or x.numel() > 2**30:
            x = x.contiguous()
        if output_size is None:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = F.interpolate(x, size=output_size, mode="nearest")
        return self.conv(x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """The VAE's self-attention: every position looks at every other, one head as wide as the map
    has channels.

    Source: ``AttnBlock`` in the original; there the four projections are 1x1 convolutions, here
    they are linear.

    Shape: ``(B, C, H, W)`` to the same; memory of the fused kernel grows with ``H*W``, time with
    ``(H*W)^2``.
    """

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        # a list of one, for the name that diffusers gives its weights
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        if fast.runs_norm(self.group_norm, x):
            normal = fast.normalised(self.group_norm, x).flatten(2)
        else:
            # as (B, C, HW) and only then turned: the memory layout that diffusers gives to the
            # projections
            normal = self.group_norm(x.flatten(2))
        tokens = normal.transpose(1, 2)
        query, key, value = (
            # (B, 1 head, HW, C)
            project(tokens).view(batch, -1, 1, channels).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = self.to_out[0](mixed.transpose(1, 2).reshape(batch, -1, channels))
        out: Tensor = mixed.transpose(-1, -2).reshape(batch, channels, height, width) + x
        return out


def last_convolution(norm: nn.Module, activation: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
    """What every network ends with: normalisation, SiLU and a 3x3 convolution, ``(B, C, H, W)`` to
    ``(B, out, H, W)``."""
    if fast.runs_last(norm, activation, conv, x):
        return fast.last(norm, conv, x)
    return conv(activation(norm(x)))  # type: ignore[no-any-return]


class MidBlock2D(nn.Module):
    """The VAE's middle, at its lowest resolution: ResNet block, attention, ResNet block.

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
        return self.resnets[1](x)  # type: ignore[no-any-return]


class Level(nn.Module):
    """Parts that are called one after another, each with what the one before gave."""

    def parts(self) -> Iterable[nn.Module]:
        """They, in order."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts():
            x = part(x)
        return x


def apart(blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Blocks to call one after another: levels in their parts, unless something hangs on the whole
    level that has to see it called. Who calls a whole level holds its input until its last part is
    done, a quarter of the VAE's memory at its largest level. Maps that are gone leave their memory
    to the next ones."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # gradients hold every map anyway
        yield from blocks
        return
    with use_pool():
        for block in blocks:
            if isinstance(block, Level) and _is_bare_level(block):
                yield from block.parts()
            else:
                yield block


def _is_bare_level(level: Level) -> bool:
    return type(level).forward is Level.forward and is_bare(level, type(level))


class DownEncoderBlock2D(Level):
    """One level of the VAE's encoder: ResNet blocks, then a halving on every level but the last.

    Shape: ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``, halved if it downsamples.
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
        inputs = (in_channels, *(out_channels,) * (layers - 1))
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels, out_channels, temb_channels=None, groups=groups, eps=eps)
            for channels in inputs
        )
        self.downsamplers = (
            nn.ModuleList([AsymmetricDownsample2D(out_channels)]) if downsample else None
        )

    def parts(self) -> Iterable[nn.Module]:
        return (*self.resnets, *(self.downsamplers or ()))


class UpDecoderBlock2D(Level):
    """One level of the VAE's decoder: ResNet blocks, then a doubling on every level but the last.

    Shape: ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``, doubled if it upsamples.
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
        inputs = (in_channels, *(out_channels,) * (layers - 1))
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels, out_channels, temb_channels=None, groups=groups, eps=eps)
            for channels in inputs
        )
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)]) if upsample else None

    def parts(self) -> Iterable[nn.Module]:
        return (*self.resnets, *(self.upsamplers or ()))
