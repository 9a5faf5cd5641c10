"""Mean and variance of GroupNorm's groups, and what normalising with them comes to.

Maps are ``(B, C, H, W)``, moments ``(B, G, 2)`` in float64: mean and variance (of the whole group,
divided by its count). Parts of a map are put together exactly, by Chan, Golub and LeVeque's formula
(1979): the parts' own squares about their means, and the means' about the whole's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Norm:
    """GroupNorm, and SiLU if asked for, that a convolution is to apply to its input.

    ``moments``: of the input, ``(B, G, 2)``. ``weight``, ``bias``: ``(C,)``.
    """

    moments: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    silu: bool

    def affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``scale`` and ``shift``, each ``(B, C)``: GroupNorm is ``x * scale + shift``."""
        weight, bias = self.weight.double(), self.bias.double()
        size = len(weight) // self.moments.shape[1]
        mean, variance = self.moments.repeat_interleave(size, dim=1).unbind(-1)
        scale = weight * (variance + self.eps).rsqrt()
        return scale.to(dtype), (bias - mean * scale).to(dtype)

    def apply(self, x: Tensor) -> Tensor:
        """The same by torch's own operations."""
        groups = self.moments.shape[1]
        x = functional.group_norm(x, groups, self.weight, self.bias, self.eps)
        return functional.silu(x) if self.silu else x


def combined(sums: Tensor, counts: Tensor) -> Tensor:
    """Moments ``(G, 2)`` of a map from each part's sums and sums of squares, ``(parts, G, 2)``, and
    how many values each has, ``(parts,)``; all float64."""
    counts = counts.unsqueeze(1)
    total, squares = sums.unbind(-1)
    means = total / counts
    within = squares - total * means
    mean = total.sum(0) / counts.sum()
    between = counts * (means - mean) ** 2
    return torch.stack([mean, (within + between).sum(0) / counts.sum()], dim=-1)
