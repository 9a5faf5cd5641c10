"""What a convolution on a CPU computes along with its sums: the normalisation of its input and what
is added to its output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu.group_stats import affine, normalise

# the dtype of the arithmetic, in which strips, scratch memory and packed weights are
COMPUTE_DTYPE = torch.float32


@dataclass(frozen=True)
class Prologue:
    """GroupNorm, and SiLU if ``silu``, that a convolution applies to its input.

    ``stats``: of the input, ``(B, G, 2)``, see `group_stats`. ``weight``, ``bias``: ``(C,)``.
    """

    stats: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    silu: bool

    def affine(self) -> tuple[Tensor, Tensor]:
        """``scale`` and ``shift``, each ``(B, C)``: GroupNorm is ``x * scale + shift``."""
        return affine(self.stats, self.weight, self.bias, self.eps, COMPUTE_DTYPE)

    def apply(self, x: Tensor) -> Tensor:
        """Normalises by these statistics; no gradient flows through them.

        torch's GroupNorm is not used: of a channels-last feature map it takes the variance as
        ``E[x^2] - E[x]^2`` in float32, which loses it where the mean is large.
        """
        x = normalise(x, self.stats, self.weight, self.bias, self.eps)
        return functional.silu(x) if self.silu else x

    def differentiable(self, x: Tensor) -> Tensor:
        """Normalises by torch's own operations, through which gradients flow.

        In channels-first order, whose kernel takes the variance by Welford's method.
        """
        groups = self.stats.shape[1]
        x = functional.group_norm(x.contiguous(), groups, self.weight, self.bias, self.eps)
        return functional.silu(x) if self.silu else x


@dataclass(frozen=True)
class Epilogue:
    """What a convolution adds to its output, and ReLU of the sum if ``relu``.

    ``bias``: ``(O,)``. ``temb``: the projected time embedding of each image, ``(B, O)``.
    ``residual``: a feature map of the output's shape; with ``shortcut``, the input of that 1x1
    convolution ``(weight (O, R, 1, 1), bias (O,))``, whose output is added.
    """

    bias: Tensor | None = None
    temb: Tensor | None = None
    residual: Tensor | None = None
    shortcut: tuple[Tensor, Tensor | None] | None = None
    relu: bool = False

    def offsets(self, batch: int, channels: int) -> Tensor:
        """The terms that all pixels of an image share, ``(B, O)``: both biases and ``temb``."""
        offsets = torch.zeros(batch, channels, dtype=COMPUTE_DTYPE)
        if self.bias is not None:
            offsets += self.bias
        if self.temb is not None:
            offsets += self.temb
        if self.shortcut is not None and self.shortcut[1] is not None:
            offsets += self.shortcut[1]
        return offsets

    def apply(self, y: Tensor) -> Tensor:
        """Applies all but the bias by torch's own operations."""
        if self.temb is not None:
            y = y + self.temb[:, :, None, None]
        if self.residual is not None:
            residual = self.residual
            if self.shortcut is not None:
                residual = functional.conv2d(residual, *self.shortcut)
            y = residual + y
        return y.relu() if self.relu else y
