"""Winograd's convolution F(4x4,3x3): 36 products for 16 outputs, where the sum itself takes 144.

Source: Lavin and Gray 2016, https://arxiv.org/abs/1509.09308. With 4x4 outputs ``Y``, a 6x6 tile
``d`` of the input and a 3x3 kernel ``g``, ``Y = A^T [(G g G^T) * (B^T d B)] A``. The product in the
middle is one matrix product over channels for each of the 36 places of a tile. The matrices come
from five points and infinity, at which polynomials are multiplied; other points than the paper's
0, 1, -1, 2 and -2 lose less to rounding (Barabasz et al. 2018, https://arxiv.org/abs/1803.10986).

Of a map that nearest-neighbour doubling made, a tile holds ``a b b c c e`` along each axis. The row
of ``B^T`` for the point -1 makes 0 of that, whatever the values are, so its places are left out: 25
products for 16 outputs, from the 4x4 pixels of the small map that stand behind the tile.

The transforms here are plain torch operations in any floating dtype: what runs where Numba is not
installed, and what the compiled ones (:mod:`sdconv.fast.cpu.numba.transforms`) are held to.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import prod

import torch
from torch import Tensor

Matrix = tuple[tuple[float, ...], ...]

# rows and columns that one tile gives
OUTPUTS = 4
# output channels of a weight transformed at once, in float64: few, so that they stay in a cache
_SLICE = 16


@dataclass(frozen=True, eq=False)
class Scheme:
    """The three transforms of one axis.

    ``input``: ``B^T``, for each place what is made of the numbers that a tile reads. ``kernel``:
    ``G``, for each place what is made of three taps. ``output``: ``A^T``, for each of the outputs
    what is made of the places. ``step``: how far the next tile of the input is.
    """

    input: Matrix
    kernel: Matrix
    output: Matrix
    step: int

    @property
    def reads(self) -> int:
        """Rows and columns of the input that a tile reads."""
        return len(self.input[0])

    @property
    def places(self) -> int:
        """Products of a tile for each pair of channels."""
        return len(self.input) ** 2

    def kernel_transform(self, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """``G g G^T``, computed in float64: ``(O, C, 3, 3)`` to ``(places, C, O)``."""
        matrix = torch.tensor(self.kernel, dtype=torch.float64)
        both = torch.kron(matrix, matrix)  # of a kernel's nine taps in a row
        out = torch.empty(self.places, weight.shape[1], len(weight), dtype=dtype)
        for first in range(0, len(weight), _SLICE):
            made = out[..., first : first + _SLICE]
            taps = weight[first : first + _SLICE].permute(2, 3, 1, 0).to(torch.float64)
            made.copy_((both @ taps.reshape(9, -1)).view_as(made))
        return out

    def input_transform(self, rows: Tensor) -> Tensor:
        """``B^T d B`` of every tile: ``(step R + 2, step Q + 2, C)`` to ``(places, R * Q, C)``."""
        matrix = torch.tensor(self.input, dtype=rows.dtype)
        tiles = rows.unfold(0, self.reads, self.step).unfold(1, self.reads, self.step)
        made = torch.einsum("ia,rqcab,jb->ijrqc", matrix, tiles, matrix)
        return made.flatten(2, 3).flatten(0, 1)

    def output_transform(self, products: Tensor, tile_rows: int) -> Tensor:
        """``A^T m A`` of every tile: ``(places, R * Q, O)`` to ``(4R, 4Q, O)``."""
        matrix = torch.tensor(self.output, dtype=products.dtype)
        side = len(self.input)
        tiles = products.view(side, side, tile_rows, -1, products.shape[2])
        made = torch.einsum("ia,abrqo,jb->riqjo", matrix, tiles, matrix)
        return made.flatten(2, 3).flatten(0, 1)


def through(*points: Fraction) -> Scheme:
    """The scheme of these five points and infinity, by Toom and Cook's interpolation.

    ``B^T`` has each point's polynomial that is 0 at all others, whose value there divides ``G``'s
    powers of the point; ``A^T`` has powers of the points again.
    """
    others = [[q for q in points if q != p] for p in points]
    scales = [prod(p - q for q in rest) for p, rest in zip(points, others, strict=True)]
    return Scheme(
        input=tuple(
            tuple(map(float, _polynomial(roots) + [Fraction(0)] * (5 - len(roots))))
            for roots in (*others, list(points))
        ),
        kernel=(
            *(
                tuple(float(p**k / by) for k in range(3))
                for p, by in zip(points, scales, strict=True)
            ),
            (0.0, 0.0, 1.0),
        ),
        output=tuple(
            (*(float(p**i) for p in points), float(i == OUTPUTS - 1)) for i in range(OUTPUTS)
        ),
        step=OUTPUTS,
    )


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients of the polynomial with these roots, that of the lowest power first."""
    found = [Fraction(1)]
    for root in roots:
        above, below = [Fraction(0), *found], [*found, Fraction(0)]
        found = [a - root * b for a, b in zip(above, below, strict=True)]
    return found


def _of_doubled(plain: Scheme) -> Scheme:
    """The same of a doubled map, from the small one; what comes to 0 left out."""
    whole = [(a, b1 + b2, c1 + c2, e) for a, b1, b2, c1, c2, e in plain.input]
    kept = [place for place, row in enumerate(whole) if any(row)]
    return Scheme(
        input=tuple(whole[place] for place in kept),
        kernel=tuple(plain.kernel[place] for place in kept),
        output=tuple(tuple(row[place] for place in kept) for row in plain.output),
        step=plain.step // 2,
    )


# with few binary digits, and symmetric, so that sums are shared; they lose half as much to rounding
# as 1 and 2
_P, _Q = Fraction(3, 4), Fraction(3, 2)
PLAIN = through(Fraction(0), _P, -_P, _Q, -_Q)
# only with 1 and -1 among the points does a place of a doubled map come to 0
_ONE, _Q = Fraction(1), Fraction(13, 8)
DOUBLED = _of_doubled(through(Fraction(0), _ONE, -_ONE, _Q, -_Q))
