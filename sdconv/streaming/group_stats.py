"""GroupNorm's statistics over a whole feature map, accumulated strip by strip."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdconv.errors import InputError
from sdconv.fast.cpu.group_stats import affine, combine

# Values reduced at once, which torch copies to float64; a GPU computes more while it is told to.
CHUNK, GPU_CHUNK = 1 << 18, 1 << 22


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that normalisation computes in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class RunningGroupStats:
    """Accumulates the count, mean and sum of squared deviations of each channel, in float64.

    Strips are combined by Chan's formula (Chan, Golub, LeVeque 1979, "Updating formulae and a
    pairwise algorithm for computing sample variances"), so the result is that of the whole feature
    map, no matter how it was cut into strips.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.mean)

    def update(self, rows: Tensor) -> None:
        """Adds ``rows``, ``(rows, W, C)``.

        The sums are float64 from the first addition on: in float32 the rounding error would depend
        on where a strip begins, and every later layer would round differently.
        """
        strip = RunningGroupStats(len(self.mean), self.mean.device)
        pixels = rows.flatten(0, 1)
        values = GPU_CHUNK if rows.device.type == "cuda" else CHUNK
        for chunk in torch.split(pixels, max(1, values // rows.shape[2])):
            mean = chunk.sum(0, dtype=torch.float64) / len(chunk)
            squares = torch.linalg.vector_norm(chunk, dim=0, dtype=torch.float64).square()
            deviations = (squares - mean.square() * len(chunk)).clamp_min(0)
            strip.combine(len(chunk), mean, deviations)
        self.combine(strip.count, strip.mean, strip.squares)

    def update_from_sums(self, sums: Tensor, counts: Tensor) -> None:
        """Adds rows that are known by their sums only.

        Args:
            sums: sum and sum of squares of each channel in each part, ``(parts, C, 2)``, float64.
            counts: pixels in each part, ``(parts,)``, float64.
        """
        count = int(counts.sum())
        mean, variance = combine(sums, counts).unbind(-1)
        self.combine(count, mean, variance * count)

    def combine(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Adds pixels that are known by their number, and each channel's mean and sum of squared
        deviations."""
        distance = mean - self.mean
        total = self.count + count
        self.squares += squares + distance.square() * (self.count * count / total)
        self.mean += distance * (count / total)
        self.count = total

    def scale_and_shift(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """``norm`` under these statistics as ``x * scale + shift``, each ``(C,)``.

        Raises:
            InputError: a group has a single value, which has no variance.
        """
        means = self.mean.view(norm.num_groups, -1)
        size = self.count * means.shape[1]
        if size == 1:
            raise InputError(
                "too small for this network",
                where="image or latents",
                expected="more than one value in each group of every normalisation",
            )
        mean = means.mean(1, keepdim=True)
        squares = self.squares.view_as(means).sum(1, keepdim=True)
        squares = squares + (means - mean).square().sum(1, keepdim=True) * self.count
        stats = torch.cat([mean, squares / size], dim=1)
        return affine(stats, norm.weight, norm.bias, norm.eps, norm_dtype(norm.weight.dtype))
