"""Winograd's convolution F(4x4,3x3): 36 products for 16 outputs, where the sum itself takes 144.

Source: Lavin and Gray 2016, https://arxiv.org/abs/1509.09308, with their points 0, 1, -1, 2, -2 and
infinity. ``Y = A^T [(G g G^T) * (B^T d B)] A``: 4x4 outputs ``Y`` from a 6x6 tile ``d`` of the
input and a 3x3 kernel ``g``. The product in the middle is one matrix product over channels for each
of the 36 places of a tile.

The transforms here are plain torch operations in any floating dtype: what runs where Numba is not
installed, and what the compiled ones (:mod:`sdconv.ops.kernels`) are held to.
"""

from __future__ import annotations

import torch
from torch import Tensor

# rows and columns that one tile gives, and that it reads
OUTPUTS, INPUTS = 4, 6
PLACES = INPUTS * INPUTS

INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUT = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)
# output channels of a weight transformed at once, in float64: few, so that they stay in a cache
_SLICE = 16


def kernel_transform(weight: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor]:
    """``G g G^T``, computed in float64: ``(O, C, 3, 3)`` to ``(36, C, 1, O)``."""
    matrix = torch.tensor(KERNEL, dtype=torch.float64)
    both = torch.kron(matrix, matrix)  # of a kernel's nine taps in a row
    out = torch.empty(PLACES, weight.shape[1], 1, len(weight), dtype=dtype)
    for first in range(0, len(weight), _SLICE):
        made = out[:, :, 0, first : first + _SLICE]
        taps = weight[first : first + _SLICE].permute(2, 3, 1, 0).to(torch.float64)
        made.copy_((both @ taps.reshape(9, -1)).view_as(made))
    return (out,)


def input_transform(rows: Tensor) -> Tensor:
    """``B^T d B`` of every tile: ``(4R + 2, 4Q + 2, C)`` to ``(36, R * Q, C)``."""
    matrix = torch.tensor(INPUT, dtype=rows.dtype)
    tiles = rows.unfold(0, INPUTS, OUTPUTS).unfold(1, INPUTS, OUTPUTS)
    return torch.einsum("ia,rqcab,jb->ijrqc", matrix, tiles, matrix).flatten(2, 3).flatten(0, 1)


def output_transform(products: Tensor, tile_rows: int) -> Tensor:
    """``A^T m A`` of every tile: ``(36, R * Q, O)`` to ``(4R, 4Q, O)``."""
    matrix = torch.tensor(OUTPUT, dtype=products.dtype)
    tiles = products.view(INPUTS, INPUTS, tile_rows, -1, products.shape[2])
    return torch.einsum("ia,abrqo,jb->riqjo", matrix, tiles, matrix).flatten(2, 3).flatten(0, 1)
