"""The cost model: which method computes a 3x3 convolution on a CPU, and why.

Times are in units of one multiply-accumulate of a matrix product. The constants
were fitted to measurements of the shapes in the VAE and the U-Nets
(``python -m scripts.bench.cpu layers`` repeats them).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from sdconv.fast.cpu.winograd import CONV3X3, OUTPUT_TILE, UPSAMPLE_CONV, Scheme

# A convolution with stride 1 and padding 1; the same after nearest upsampling by 2; a convolution
# with stride 2 and padding (0, 1, 0, 1).
Kind = Literal["conv3x3", "upsample_conv", "downsample_conv"]

SCHEMES: dict[Kind, Scheme] = {"conv3x3": CONV3X3, "upsample_conv": UPSAMPLE_CONV}

# per value of a weight: torch's kernel reorders it in each call; a packed weight is only read
_REORDER, _READ = 160, 25
# per value of a transformed tile, in and out; per call
_TRANSFORM, _CALL = 70, 10_000_000
# per value of a feature map that is normalised in passes of its own
_NORMALISE = 250


@dataclass(frozen=True)
class ConvPlan:
    """How a convolution is computed.

    ``method``: "winograd", "im2col" (one matrix product with a packed weight) or "direct" (torch's
    kernel). ``packed_bytes``: bytes of the packed weight that the method keeps. ``costs``: the
    modelled time of each method, in multiply-accumulates. ``reason``: why this method, in words.
    """

    kind: Kind
    method: str
    packed_bytes: int
    costs: tuple[tuple[str, float], ...]
    reason: str


@cache
def packed_bytes(kind: Kind, channels: int, out_channels: int) -> dict[str, int]:
    """Bytes of the packed weight, for each method that packs one."""
    matrix = 4 * channels * out_channels
    matrices = {}
    if kind in SCHEMES:
        matrices["winograd"] = SCHEMES[kind].positions
    if kind == "conv3x3":
        matrices["im2col"] = 9
    return {method: count * matrix for method, count in matrices.items()}


@lru_cache(maxsize=1024)
def plan_conv(
    kind: Kind,
    batch: int,
    channels: int,
    out_channels: int,
    height: int,
    width: int,
    normalised: bool = False,
    available: tuple[str, ...] = ("winograd", "im2col"),
    direct_rate: float = 1.0,
) -> ConvPlan:
    """The fastest available method for a convolution of this kind and shape.

    Args:
        height, width: of the input.
        normalised: whether GroupNorm and SiLU come before it; they cost Winograd's method nothing.
        available: the methods for whose packed weights there is room; "direct" needs none.
        direct_rate: how many times as many products a time torch's kernel computes in the feature
            map's dtype as in float32, see :mod:`sdconv.fast.cpu.processor`.
    """
    costs = _costs(kind, batch, channels, out_channels, height, width, normalised, direct_rate)
    best, *others = sorted(costs, key=lambda method: costs[method])
    method = min(
        (method for method in costs if method in available or method == "direct"),
        key=lambda method: costs[method],
    )
    if method != best:
        reason = f"no room for the packed weight of {best}: see the limit of the weight cache"
    elif others:
        reason = f"{others[0]} would take {costs[others[0]] / costs[best]:.2f} times as long"
    else:
        reason = "the only method for stride 2"
    if method == "direct" and direct_rate > 1:
        reason += "; the processor has matrix units for this dtype"
    return ConvPlan(
        kind,
        method,
        packed_bytes(kind, channels, out_channels).get(method, 0),
        tuple((name, float(cost)) for name, cost in costs.items()),
        reason,
    )


def _costs(
    kind: Kind,
    batch: int,
    channels: int,
    out_channels: int,
    height: int,
    width: int,
    normalised: bool,
    direct_rate: float,
) -> dict[str, float]:
    """The modelled time of each method for a kind of convolution."""
    pairs, pixels = channels * out_channels, batch * height * width
    if kind == "upsample_conv":
        return {
            "winograd": UPSAMPLE_CONV.positions / UPSAMPLE_CONV.step**2 * pixels * pairs,
            "direct": 36.0 * pixels * pairs / direct_rate,
        }
    if kind == "downsample_conv":
        return {"direct": 9 * pairs * batch * (height // 2) * (width // 2) / direct_rate}
    tiles = batch * -(-height // OUTPUT_TILE) * -(-width // OUTPUT_TILE)
    products, norm = 9 * pairs * pixels, normalised * channels * pixels * _NORMALISE
    return {
        "winograd": CONV3X3.positions * pairs * (tiles + _READ)
        + CONV3X3.positions * (channels + out_channels) * tiles * _TRANSFORM
        + _CALL,
        "im2col": products + norm + 9 * pairs * _READ + 9 * channels * pixels * _TRANSFORM + _CALL,
        "direct": products / direct_rate + norm + 9 * pairs * _REORDER,
    }
