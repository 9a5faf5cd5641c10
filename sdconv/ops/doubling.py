"""Nearest doubling and a 3x3 convolution as one operation on the small map, with a quarter of the
products.

Along one axis, with ``x`` the small map and kernel ``(u, v, w)``, the doubled map's convolution is

    y[2k]     = u x[k-1] + (v + w) x[k]  =  s x[k] - u (x[k] - x[k-1])
    y[2k + 1] = (u + v) x[k] + w x[k+1]  =  s x[k] + w (x[k+1] - x[k])        s = u + v + w

so each pixel's product with ``s`` serves both outputs, and with the differences' two products there
are 3 for what takes 6. Along both axes there are 9 for 36: one of the pixels, two of their
differences along each axis, four of the differences along both. Zeros stand round the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

# what a kernel's three taps come to: for the pixels, for the even and for the odd outputs'
# differences
_TAPS = ((1, 1, 1), (-1, 0, 0), (0, 0, 1))
_SLICE = 64
# how many differences of each kind a pixel has
SEVERAL = (1, 2, 2, 4)


def kernel_transform(weight: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """``(O, C, 3, 3)`` to what pixels ``(1, C, 1, O)``, differences along a row ``(1, C, 2, O)``,
    along a column ``(1, C, 2, O)`` and along both ``(1, C, 4, O)`` are multiplied by; computed in
    float64."""
    out_channels, in_channels = weight.shape[:2]
    taps = torch.tensor(_TAPS, dtype=torch.float64)
    made = torch.empty(3, 3, in_channels, out_channels, dtype=dtype)
    for first in range(0, out_channels, _SLICE):
        part = weight[first : first + _SLICE].double()
        made[..., first : first + _SLICE] = torch.einsum("ia,ocab,jb->ijco", taps, part, taps)
    parts = made[:1, 0], made[0, 1:], made[1:, 0], made[1:, 1:].flatten(0, 1)
    return tuple(several.transpose(0, 1).unsqueeze(0) for several in parts)
