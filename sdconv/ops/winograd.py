"""Winograd's convolution F(4x4,3x3): 36 products for 16 outputs, where the sum itself takes 144.

Source: Lavin and Gray 2016, https://arxiv.org/abs/1509.09308, with their points 0, 1, -1, 2, -2 and
infinity. ``Y = A^T [(G g G^T) * (B^T d B)] A``: 4x4 outputs ``Y`` from a 6x6 tile ``d`` of the
input and a 3x3 kernel ``g``. The product in the middle is one matrix product over channels for each
of the 36 places of a tile.

Of a map that nearest-neighbour doubling made, a tile holds ``a b b c c e`` along each axis. The row
of ``B^T`` for the point -1 makes 0 of that, whatever the values are, so its places are left out: 25
products for 16 outputs, from the 4x4 pixels of the small map that stand behind the tile.

The transforms here are plain torch operations in any floating dtype: what runs where Numba is not
installed, and what the compiled ones (:mod:`sdconv.ops.kernels`) are held to.
"""

from __future__ import annotations

from dataclasses import dataclass

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


PLAIN = Scheme(
    input=(
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    kernel=(
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    output=(
        (1, 1, 1, 1, 1, 0),
        (0, 1, -1, 2, -2, 0),
        (0, 1, 1, 4, 4, 0),
        (0, 1, -1, 8, -8, 1),
    ),
    step=OUTPUTS,
)


def _of_doubled(plain: Scheme) -> Scheme:
    """The same of a doubled map, from the small one; what comes to nothing left out."""
    whole = [(a, b1 + b2, c1 + c2, e) for a, b1, b2, c1, c2, e in plain.input]
    kept = [place for place, row in enumerate(whole) if any(row)]
    return Scheme(
        input=tuple(whole[place] for place in kept),
        kernel=tuple(plain.kernel[place] for place in kept),
        output=tuple(tuple(row[place] for place in kept) for row in plain.output),
        step=plain.step // 2,
    )


DOUBLED = _of_doubled(PLAIN)
