"""Which arithmetic a 3x3 convolution gets, and why.

A model of the methods' times, in the time of one multiplication and addition of a matrix product.
Its numbers were fitted to measurements of the VAE's and the U-Nets' shapes (`scripts/bench/cpu.py
layers` measures them again).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sdconv.fast.cpu.winograd import OUTPUTS, PLAIN

# of a weight's value: torch's kernel reorders it in each call; a prepared one is only read
_REORDER, _READ = 160, 25
# of a value of a transformed tile, there and back; of a call
_TRANSFORM, _CALL = 100, 10_000_000
# of a value of a map that is normalised in ways through memory of its own
_NORMALISE = 250


@dataclass(frozen=True)
class Choice:
    """``method``: "winograd", "packed" or "direct". ``costs``: what the model says of each, in
    multiplications. ``reason``: in words."""

    method: str
    costs: tuple[tuple[str, float], ...]
    reason: str


@lru_cache(maxsize=1024)
def choose(
    batch: int,
    channels: int,
    out_channels: int,
    height: int,
    width: int,
    prepared: tuple[str, ...] = ("winograd", "packed"),
    normalised: bool = False,
) -> Choice:
    """The method for a 3x3 convolution, stride 1, of maps of this shape.

    Args:
        prepared: the methods whose prepared weights may be kept in memory.
        normalised: whether a normalisation and SiLU stand before it, which Winograd's has for
            nothing.
    """
    pairs = channels * out_channels
    tiles = batch * -(-height // OUTPUTS) * -(-width // OUTPUTS)
    pixels = batch * height * width
    products = 9 * pairs * pixels + normalised * channels * pixels * _NORMALISE
    costs = {
        "winograd": PLAIN.places * pairs * (tiles + _READ)
        + PLAIN.places * (channels + out_channels) * tiles * _TRANSFORM
        + _CALL,
        "packed": products + 9 * pairs * _READ + 9 * channels * pixels * _TRANSFORM + _CALL,
        "direct": products + 9 * pairs * _REORDER,
    }
    best, second, *_ = sorted(costs, key=lambda method: costs[method])
    allowed = [method for method in costs if method in prepared or method == "direct"]
    method = min(allowed, key=lambda method: costs[method])
    if method == best:
        reason = f"{second} would take {costs[second] / costs[best]:.2f} times as long"
    else:
        reason = f"no room for what {best} prepares: see the limit of prepared weights"
    return Choice(method, tuple((name, float(cost)) for name, cost in costs.items()), reason)
