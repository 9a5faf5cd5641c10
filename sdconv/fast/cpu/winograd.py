"""Winograd's convolution F(4x4, 3x3): 36 products for 16 outputs, where direct summation takes 144.

Source: Lavin and Gray 2016, https://arxiv.org/abs/1509.09308. With a 4x4 output tile ``Y``, a 6x6
input tile ``d`` and a 3x3 kernel ``g``, ``Y = A^T [(G g G^T) * (B^T d B)] A``. The elementwise
product becomes one matrix product over channels for each of the 36 tile positions. The matrices
follow from five points and infinity, at which polynomials are multiplied. The points used here lose
less to rounding than the paper's 0, 1, -1, 2 and -2 (Barabasz et al. 2018,
https://arxiv.org/abs/1803.10986).

After nearest-neighbour upsampling, a tile's values along each axis are ``a b b c c e``. The row of
``B^T`` for the point -1 maps these to 0 for any values, so its tile positions are left out: 25
products for 16 outputs, from the 4x4 pixels of the input that the tile was upsampled from.

At stride 2, the first and the last tap of a kernel meet the even rows of a 9x9 input tile, and the
middle one meets the odd rows. Along each axis, the even rows are a convolution with two taps,
F(4, 2), and the odd rows are multiplied as they are: 81 products for 16 outputs, where direct
summation takes 144. The tile positions of odd rows share their kernels, so that there are 36.

The transforms here are plain torch operations in any floating dtype. They run where Numba is not
installed, and the Numba kernels (:mod:`sdconv.fast.cpu.numba.transforms`) are tested against them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import prod
from typing import Literal

import torch
from torch import Tensor

# A convolution with stride 1 and padding 1; the same after nearest upsampling by 2; a convolution
# with stride 2 and padding (0, 1, 0, 1).
Kind = Literal["conv3x3", "upsample_conv", "downsample_conv"]
Matrix = tuple[tuple[float, ...], ...]

# rows and columns of an output tile, the paper's m
OUTPUT_TILE = 4
# output channels whose weights are transformed at once in float64: few, so that they stay in cache
_SLICE = 16


@dataclass(frozen=True, eq=False)
class Scheme:
    """The three transforms along one axis.

    ``input``: ``B^T``, one row for each tile position, over an input tile. ``kernel``: ``G``, over
    the three taps, and ``kernel_rows``: its row for each tile position. ``output``: ``A^T``, one
    row for each output, over the tile positions. ``step``: input rows from one tile to the next.
    ``before``: rows of padding before the first.
    """

    input: Matrix
    kernel: Matrix
    kernel_rows: tuple[int, ...]
    output: Matrix
    step: int
    before: int

    @cached_property
    def input_tile(self) -> int:
        """Rows and columns of an input tile."""
        return len(self.input[0])

    @cached_property
    def positions(self) -> int:
        """Tile positions: products for each tile and pair of channels."""
        return len(self.input) ** 2

    @cached_property
    def kernels(self) -> int:
        """Transformed kernels for each pair of channels."""
        return len(self.kernel) ** 2

    @cached_property
    def order(self) -> Tensor | None:
        """The number of each tile position's kernel, ``(positions,)``; None where each has one of
        its own."""
        if self.kernels == self.positions:
            return None
        rows = torch.tensor(self.kernel_rows, device="cpu")
        return (rows[:, None] * len(self.kernel) + rows).flatten()

    def kernel_transform(self, weight: Tensor) -> Tensor:
        """``G g G^T``, computed in float64: ``(O, C, 3, 3)`` to ``(kernels, C, O)``, in float32
        (float64 for a float64 weight)."""
        matrix = torch.tensor(self.kernel, dtype=torch.float64, device=weight.device)
        both = torch.kron(matrix, matrix)  # applied to a kernel's nine taps in a row
        dtype = torch.promote_types(weight.dtype, torch.float32)
        out = weight.new_empty(self.kernels, weight.shape[1], len(weight), dtype=dtype)
        for first in range(0, len(weight), _SLICE):
            part = out[..., first : first + _SLICE]
            taps = weight[first : first + _SLICE].permute(2, 3, 1, 0).to(torch.float64)
            part.copy_((both @ taps.reshape(9, -1)).view_as(part))
        return out

    def input_transform(self, rows: Tensor) -> Tensor:
        """``B^T d B`` of every tile of ``(rows, columns, C)``, to ``(positions, R Q, C)``."""
        matrix = rows.new_tensor(self.input)
        size, step = self.input_tile, self.step
        tiles = rows.unfold(0, size, step).unfold(1, size, step)
        transformed = torch.einsum("ia,rqcab,jb->ijrqc", matrix, tiles, matrix)
        return transformed.flatten(2, 3).flatten(0, 1)

    def output_transform(self, products: Tensor, tile_rows: int) -> Tensor:
        """``A^T p A`` of every tile: ``(positions, R Q, O)`` to ``(4R, 4Q, O)``."""
        matrix = products.new_tensor(self.output)
        side = len(self.input)
        tiles = products.view(side, side, tile_rows, -1, products.shape[2])
        transformed = torch.einsum("ia,abrqo,jb->riqjo", matrix, tiles, matrix)
        return transformed.flatten(2, 3).flatten(0, 1)


def toom_cook(*points: Fraction) -> Scheme:
    """The scheme of these points and infinity, by Toom-Cook interpolation: five for three taps,
    four for two.

    A row of ``B^T`` is the polynomial that is 0 at all points but one; its value at that point
    divides the point's powers in ``G``. ``A^T`` has the points' powers.
    """
    taps = len(points) + 2 - OUTPUT_TILE
    others = [[q for q in points if q != p] for p in points]
    scales = [prod(p - q for q in rest) for p, rest in zip(points, others, strict=True)]
    return Scheme(
        input=tuple(
            tuple(map(float, _polynomial(roots) + [Fraction(0)] * (len(points) - len(roots))))
            for roots in (*others, list(points))
        ),
        kernel=(
            *(
                tuple(float(p**k / by) for k in range(taps))
                for p, by in zip(points, scales, strict=True)
            ),
            (*[0.0] * (taps - 1), 1.0),
        ),
        kernel_rows=tuple(range(len(points) + 1)),
        output=tuple(
            (*(float(p**i) for p in points), float(i == OUTPUT_TILE - 1))
            for i in range(OUTPUT_TILE)
        ),
        step=OUTPUT_TILE,
        before=1,
    )


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients of the monic polynomial with these roots, lowest power first."""
    found = [Fraction(1)]
    for root in roots:
        shifted, same = [Fraction(0), *found], [*found, Fraction(0)]
        found = [a - root * b for a, b in zip(shifted, same, strict=True)]
    return found


def _after_upsampling(scheme: Scheme) -> Scheme:
    """The scheme for an upsampled input, which reads the input before upsampling; tile positions
    that are always 0 are left out."""
    folded = [(a, b1 + b2, c1 + c2, e) for a, b1, b2, c1, c2, e in scheme.input]
    kept = [position for position, row in enumerate(folded) if any(row)]
    return Scheme(
        input=tuple(folded[position] for position in kept),
        kernel=tuple(scheme.kernel[position] for position in kept),
        kernel_rows=tuple(range(len(kept))),
        output=tuple(tuple(row[position] for position in kept) for row in scheme.output),
        step=scheme.step // 2,
        before=scheme.before,
    )


def _with_stride(even: Scheme) -> Scheme:
    """The scheme for stride 2, without padding before the first row, from one of two taps for the
    even rows."""
    odd = range(OUTPUT_TILE)
    size = 2 * even.input_tile - 1
    spread = [tuple(row[k // 2] if k % 2 == 0 else 0.0 for k in range(size)) for row in even.input]
    return Scheme(
        input=(*spread, *(tuple(float(k == 2 * i + 1) for k in range(size)) for i in odd)),
        kernel=(*((first, 0.0, last) for first, last in even.kernel), (0.0, 1.0, 0.0)),
        kernel_rows=(*even.kernel_rows, *(len(even.kernel) for _ in odd)),
        output=tuple((*row, *(float(i == k) for k in odd)) for i, row in enumerate(even.output)),
        step=2 * even.step,
        before=0,
    )


# Few binary digits, and in pairs of opposite sign, so that sums are shared. The rounding error is
# half of that with 1 and 2.
_P, _Q = Fraction(3, 4), Fraction(3, 2)
CONV3X3 = toom_cook(Fraction(0), _P, -_P, _Q, -_Q)
# A tile position is always 0 after upsampling only if 1 and -1 are among the points.
_ONE, _Q = Fraction(1), Fraction(13, 8)
UPSAMPLE_CONV = _after_upsampling(toom_cook(Fraction(0), _ONE, -_ONE, _Q, -_Q))
# Of the points with few binary digits, those that lose least.
_P, _Q = Fraction(5, 4), Fraction(1, 2)
DOWNSAMPLE_CONV = _with_stride(toom_cook(Fraction(0), _P, -_P, _Q))

SCHEMES: dict[Kind, Scheme] = {
    "conv3x3": CONV3X3,
    "upsample_conv": UPSAMPLE_CONV,
    "downsample_conv": DOWNSAMPLE_CONV,
}
