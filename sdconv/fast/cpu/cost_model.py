"""The cost model: which method computes a 3x3 convolution on a CPU, and why.

Times are in units of one multiply-accumulate of a matrix product. They are sums of a shape's
`TERMS`, each times a constant of :mod:`sdconv.fast.cpu.cost_constants`, which ship or are fitted on
the machine where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from sdconv.fast.cpu.cost_constants import CostConstants, constants_in_force
from sdconv.fast.cpu.winograd import CONV3X3, OUTPUT_TILE, UPSAMPLE_CONV, Scheme

# A convolution with stride 1 and padding 1; the same after nearest upsampling by 2; a convolution
# with stride 2 and padding (0, 1, 0, 1).
Kind = Literal["conv3x3", "upsample_conv", "downsample_conv"]

SCHEMES: dict[Kind, Scheme] = {"conv3x3": CONV3X3, "upsample_conv": UPSAMPLE_CONV}

# batch, input channels, output channels, height and width of the input
Shape = tuple[int, int, int, int, int]


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
        normalised: whether GroupNorm and SiLU come before it, which Winograd's method applies as it
            reads its input.
        available: the methods for whose packed weights there is room; "direct" needs none.
        direct_rate: how many times as many products a time torch's kernel computes in the feature
            map's dtype as in float32, see :mod:`sdconv.fast.cpu.processor`.
    """
    shape = batch, channels, out_channels, height, width
    return plan_by(kind, shape, normalised, available, direct_rate, constants_in_force())


@lru_cache(maxsize=1024)
def plan_by(
    kind: Kind,
    shape: Shape,
    normalised: bool,
    available: tuple[str, ...],
    direct_rate: float,
    constants: CostConstants,
) -> ConvPlan:
    """`plan_conv` by given constants; ``shape``: batch, channels in and out, height and width."""
    costs = _costs(kind, shape, normalised, direct_rate, constants)
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
        packed_bytes(kind, shape[1], shape[2]).get(method, 0),
        tuple((name, float(cost)) for name, cost in costs.items()),
        reason,
    )


def _costs(
    kind: Kind, shape: Shape, normalised: bool, direct_rate: float, constants: CostConstants
) -> dict[str, float]:
    """The modelled time of each method for a kind of convolution."""
    batch, channels, out_channels, height, width = shape
    pairs, pixels = channels * out_channels, batch * height * width
    direct = constants.direct / direct_rate
    if kind == "upsample_conv":
        return {
            "winograd": UPSAMPLE_CONV.positions / UPSAMPLE_CONV.step**2 * pixels * pairs,
            "direct": 36.0 * pixels * pairs * direct,
        }
    if kind == "downsample_conv":
        return {"direct": 9 * pairs * batch * (height // 2) * (width // 2) * direct}
    prices = {
        "product": 1.0,
        "direct": direct,
        "reorder": constants.reorder,
        "read": constants.read,
        "transform": constants.transform,
        "patch": constants.patch,
        "call": constants.call,
        "normalise": constants.normalise,
        "prologue": constants.prologue,
    }
    return {
        method: sum(prices[name] * count for name, count in terms(shape, normalised).items())
        for method, terms in TERMS.items()
    }


def _winograd_terms(shape: Shape, normalised: bool) -> dict[str, float]:
    batch, channels, out_channels, height, width = shape
    tiles = batch * -(-height // OUTPUT_TILE) * -(-width // OUTPUT_TILE)
    positions, pairs = CONV3X3.positions, channels * out_channels
    return {
        "product": positions * pairs * tiles,
        "read": positions * pairs,
        "transform": positions * (channels + out_channels) * tiles,
        "prologue": normalised * channels * batch * height * width,
        "call": 1,
    }


def _im2col_terms(shape: Shape, normalised: bool) -> dict[str, float]:
    batch, channels, out_channels, height, width = shape
    pairs, pixels = channels * out_channels, batch * height * width
    return {
        "product": 9 * pairs * pixels,
        "read": 9 * pairs,
        "patch": 9 * channels * pixels,
        "normalise": normalised * channels * pixels,
        "call": 1,
    }


def _direct_terms(shape: Shape, normalised: bool) -> dict[str, float]:
    batch, channels, out_channels, height, width = shape
    pairs, pixels = channels * out_channels, batch * height * width
    return {
        "direct": 9 * pairs * pixels,
        "reorder": 9 * pairs,
        "normalise": normalised * channels * pixels,
    }


# of a 3x3 convolution with stride 1: how often each method pays each constant, by its name;
# "product" is a multiply-accumulate of a matrix product
TERMS: Mapping[str, Callable[[Shape, bool], dict[str, float]]] = {
    "winograd": _winograd_terms,
    "im2col": _im2col_terms,
    "direct": _direct_terms,
}
