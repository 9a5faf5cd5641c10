"""Mean and variance of a whole map, gathered strip by strip."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdconv.errors import InputError
from sdconv.fast.cpu.group_stats import affine, combine

# numbers of a map that its moments are taken of in one go
AT_ONCE = 1 << 18


def computing(dtype: torch.dtype) -> torch.dtype:
    """What normalisation computes in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class Moments:
    """Count, mean and sum of squared deviations of each channel, in float64.

    Strips are combined by Chan's formula (Chan, Golub, LeVeque 1979, "Updating formulae and a
    pairwise algorithm for computing sample variances"): the result is that of the whole map, in
    whatever strips it came.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.mean)

    def add(self, rows: Tensor) -> None:
        """Takes in ``rows``, ``(rows, W, C)``.

        In float64 from the first addition on: what float32 would lose differs from strip to strip,
        and all layers after it would round otherwise.
        """
        # few at a time: torch makes a copy of them in float64
        for some in torch.split(rows.flatten(0, 1), max(1, AT_ONCE // rows.shape[2])):
            mean = some.sum(0, dtype=torch.float64) / len(some)
            squares = torch.linalg.vector_norm(some, dim=0, dtype=torch.float64).square()
            self._combine(len(some), mean, squares - mean.square() * len(some))

    def take(self, sums: Tensor, counts: Tensor) -> None:
        """Takes in rows of which only sums are known.

        Args:
            sums: and sums of squares of each channel in each part, ``(parts, C, 2)`` in float64.
            counts: of pixels in each part, ``(parts,)`` in float64.
        """
        count = int(counts.sum())
        mean, variance = combine(sums, counts).unbind(-1)
        self._combine(count, mean, variance * count)

    def _combine(self, count: int, mean: Tensor, squares: Tensor) -> None:
        distance = mean - self.mean
        total = self.count + count
        self.squares += squares + distance.square() * (self.count * count / total)
        self.mean += distance * (count / total)
        self.count = total

    def scale_and_shift(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """What ``norm`` does to a map with these moments: ``x * scale + shift``, each ``(C,)``.

        Raises:
            InputError: a group has a single value, whose variance says nothing.
        """
        means = self.mean.view(norm.num_groups, -1)
        size = self.count * means.shape[1]
        if size == 1:
            raise InputError(
                "too small for this network",
                where="picture or latents",
                expected="a map on which its normalisation has more than one value",
            )
        mean = means.mean(1, keepdim=True)
        squares = self.squares.view_as(means).sum(1, keepdim=True)
        squares = squares + (means - mean).square().sum(1, keepdim=True) * self.count
        stats = torch.cat([mean, squares / size], dim=1)
        return affine(stats, norm.weight, norm.bias, norm.eps, computing(norm.weight.dtype))
