"""GroupNorm's statistics on a CPU, and the scale and shift that follow from them.

Statistics are ``(..., G, 2)`` in float64: mean and biased variance of each group. Parts of a
feature map are combined by the formula of Chan, Golub and LeVeque (1979): the squared deviations
within the parts, plus those of the parts' means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdconv.fast.cpu.buffer_pool import dense_rows, rows_of
from sdconv.fast.cpu.kernels import kernels_for
from sdconv.fast.cpu.tiling import LEAST_BYTES


def group_stats(x: Tensor, groups: int) -> Tensor:
    """Statistics ``(B, groups, 2)`` of ``(B, C, H, W)``."""
    kernels, found = kernels_for(torch.float32), []
    for image in x:
        channels, height, width = image.shape
        # all rows at once, unless they must be copied to scratch memory
        dense = dense_rows(image) is not None
        step = height if dense else max(1, LEAST_BYTES // (4 * channels * width))
        parts = [
            kernels.sums(rows_of(image, first, first + step, "input"), groups)
            for first in range(0, height, step)
        ]
        found.append(combine(*(torch.cat(several) for several in zip(*parts, strict=True))))
    return torch.stack(found)


def combine(sums: Tensor, counts: Tensor) -> Tensor:
    """Statistics ``(G, 2)`` from the sums and sums of squares of each part ``(parts, G, 2)`` and
    each part's number of values ``(parts,)``, all in float64."""
    counts = counts.unsqueeze(1)
    total, squares = sums.unbind(-1)
    means = total / counts
    within = (squares - total * means).clamp_min(0)  # of constant values, rounding may be all
    mean = total.sum(0) / counts.sum()
    between = counts * (means - mean) ** 2
    return torch.stack([mean, (within + between).sum(0) / counts.sum()], dim=-1)


def affine(
    stats: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """GroupNorm as ``x * scale + shift``: computed in float64, returned in ``dtype``.

    The shift is that of the scale as rounded, so that this rounding does not grow with the mean.

    Args:
        stats: of the input, ``(..., G, 2)``. weight, bias: GroupNorm's, ``(C,)``.

    Returns:
        ``scale`` and ``shift``, each ``(..., C)``.
    """
    weight, bias = weight.double(), bias.double()
    size = len(weight) // stats.shape[-2]
    mean, variance = stats.repeat_interleave(size, dim=-2).unbind(-1)
    scale = (weight * (variance + eps).rsqrt()).to(dtype)
    return scale, (bias - mean * scale.double()).to(dtype)


def normalise(x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm of ``(B, C, H, W)`` in float32 and in its own dtype and memory layout.

    The mean is subtracted first, which is exact where it is large.
    """
    rounded = stats[..., :1].float().double()
    rest = torch.cat([stats[..., :1] - rounded, stats[..., 1:]], dim=-1)
    scale, shift = affine(rest, weight, bias, eps, torch.float32)
    mean = rounded[..., 0].repeat_interleave(len(weight) // stats.shape[-2], dim=-1)
    mean, scale, shift = (one.float()[:, :, None, None] for one in (mean, scale, shift))
    return torch.addcmul(shift, x.float() - mean, scale).to(x.dtype)
