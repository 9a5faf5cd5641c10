"""Which arithmetic a 3x3 convolution gets, and why.

A model of the two times, in the time of one multiplication and addition of a matrix product. Its
four numbers were fitted to measurements of the VAE's and the U-Nets' shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sdconv.ops.winograd import OUTPUTS, PLACES

# of a weight's value: torch's kernel reorders it in each call; a transformed one is only read
_REORDER, _READ = 150, 32
# of a value of a transformed tile, there and back; of a call
_TRANSFORM, _CALL = 85, 10_000_000


@dataclass(frozen=True)
class Choice:
    """``method``: "winograd" or "direct". ``costs``: what the model says of each, in
    multiplications. ``reason``: in words."""

    method: str
    costs: tuple[tuple[str, float], ...]
    reason: str


@lru_cache(maxsize=1024)
def choose(
    batch: int, channels: int, out_channels: int, height: int, width: int, room: bool
) -> Choice:
    """The method for a 3x3 convolution, stride 1, of maps of this shape.

    Args:
        room: whether the transformed weight may be kept in memory.
    """
    pairs = channels * out_channels
    tiles = batch * -(-height // OUTPUTS) * -(-width // OUTPUTS)
    direct = 9 * pairs * batch * height * width + 9 * pairs * _REORDER
    winograd = (
        PLACES * pairs * tiles
        + PLACES * pairs * _READ
        + PLACES * (channels + out_channels) * tiles * _TRANSFORM
        + _CALL
    )
    costs = (("winograd", float(winograd)), ("direct", float(direct)))
    if not room:
        return Choice("direct", costs, "no room for the transformed weight: see the cache's limit")
    ratio = direct / winograd
    if ratio < 1:
        return Choice("direct", costs, f"Winograd would take {1 / ratio:.2f} times as long")
    return Choice("winograd", costs, f"the direct kernel would take {ratio:.2f} times as long")
