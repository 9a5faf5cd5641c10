"""The cost model: which method computes a 3x3 convolution on a CPU, and why.

Times are in units of one multiply-accumulate of a matrix product. They are sums of a shape's
terms (`terms_of`), each times a constant of :mod:`sdconv.fast.cpu.cost_constants`, which ship or
are fitted on the machine where they are used.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache, lru_cache

from sdconv.fast.cpu import amx
from sdconv.fast.cpu.cost_constants import CostConstants, constants_in_force
from sdconv.fast.cpu.tiling import MULTIPLE, strips
from sdconv.fast.cpu.winograd import OUTPUT_TILE, SCHEMES, Kind

# batch, input channels, output channels, height and width of the input
Shape = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class ConvPlan:
    """How a convolution is computed.

    ``method``: "winograd" (with a weight that is transformed once and kept), "winograd_uncached"
    (with one that is transformed for each strip), "amx" (direct summation by matrix units) or
    "direct" (torch's kernel). ``packed_bytes``: bytes of the weight that the method keeps.
    ``costs``: the modelled time of each method, in multiply-accumulates. ``reason``: why this
    method, in words.
    """

    kind: Kind
    method: str
    packed_bytes: int
    costs: tuple[tuple[str, float], ...]
    reason: str


@cache
def packed_bytes(kind: Kind, channels: int, out_channels: int) -> dict[str, int]:
    """Bytes of the packed weight, for each method that packs one."""
    found = {"winograd": 4 * SCHEMES[kind].kernels * channels * out_channels}
    if kind in amx.PACK:
        found["amx"] = amx.packed_bytes(kind, channels, out_channels)
    return found


def plan_conv(
    kind: Kind,
    batch: int,
    channels: int,
    out_channels: int,
    height: int,
    width: int,
    normalised: bool = False,
    available: tuple[str, ...] = ("winograd", "winograd_uncached"),
    direct_rate: float = 1.0,
) -> ConvPlan:
    """The fastest available method for a convolution of this kind and shape.

    Args:
        height, width: of the input.
        normalised: whether GroupNorm and SiLU come before it, which Winograd's method applies as it
            reads its input.
        available: the methods to choose from: those for whose packed weights there is room, and
            that the kernels have; "direct" always is.
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
    if "amx" not in available:
        costs.pop("amx", None)
    best, *others = sorted(costs, key=lambda method: costs[method])
    method = min(
        (method for method in costs if method in available or method == "direct"),
        key=lambda method: costs[method],
    )
    if method != best and best in packed_bytes(kind, *shape[1:3]):
        reason = f"no room for the packed weight of {best}: see the limit of the weight cache"
    elif method != best:
        reason = f"{best} needs Numba"
    elif others:
        reason = f"{others[0]} would take {costs[others[0]] / costs[best]:.2f} times as long"
    else:
        reason = "the only method for stride 2 and odd sizes"
    if method == "amx" or (method == "direct" and direct_rate > 1):
        reason += "; the processor computes this dtype natively"
    return ConvPlan(
        kind,
        method,
        packed_bytes(kind, *shape[1:3]).get(method, 0),
        tuple((name, float(cost)) for name, cost in costs.items()),
        reason,
    )


def _costs(
    kind: Kind, shape: Shape, normalised: bool, direct_rate: float, constants: CostConstants
) -> dict[str, float]:
    """The modelled time of each method for a kind of convolution."""
    prices = {name: getattr(constants, name) for name in _PRICES}
    prices |= {"product": 1.0, "direct": constants.direct / direct_rate}
    return {
        method: sum(prices[name] * count for name, count in terms.items())
        for method, terms in terms_of(kind, shape, normalised).items()
    }


def terms_of(kind: Kind, shape: Shape, normalised: bool) -> dict[str, dict[str, float]]:
    """How often each method pays each constant, by its name; "product" is a multiply-accumulate of
    a matrix product. A method that cannot compute this shape is left out."""
    batch, channels, out_channels, height, width = shape
    pairs, pixels = channels * out_channels, batch * height * width
    scheme = SCHEMES[kind]
    rows, columns = (size * OUTPUT_TILE // scheme.step for size in (height, width))
    direct: dict[str, float] = {
        "direct": 9 * pairs * batch * rows * columns,
        "reorder": 9 * pairs,
        "normalise": normalised * channels * pixels,
    }
    found: dict[str, dict[str, float]] = {}
    if kind in amx.PACK and not (normalised and channels % _AMX_MULTIPLE):
        # the products of a pixel of the input are as many as the numbers in the packed weight
        products = amx.packed_bytes(kind, channels, out_channels) // 2
        found["amx"] = {
            "product": _AMX * products * pixels,
            "prologue": normalised * channels * pixels,
            "call": 1,
        }
    if kind == "downsample_conv" and (height % 2 or width % 2):
        return {"direct": direct}  # whose last row or column is no padding
    pieces = strips(scheme, rows, columns, channels, out_channels)
    positions, tiles = scheme.positions, batch * sum(piece.tiles for piece in pieces)
    winograd: dict[str, float] = {
        "product": positions * pairs * tiles,
        "transform": positions * (channels + out_channels) * tiles,
        "prologue": normalised * channels * pixels,
        "call": 1,
    }
    found["winograd"] = {**winograd, "read": batch * scheme.kernels * pairs}
    if kind != "downsample_conv" and channels % MULTIPLE == out_channels % MULTIPLE == 0:
        found["winograd_uncached"] = {
            **winograd,
            "product": _UNCACHED * winograd["product"],
            "kernel": batch * len(pieces) * pairs,
        }
    return {**found, "direct": direct}


_PRICES = [field.name for field in fields(CostConstants)]
# how many times as long products take whose panels are made anew for each strip
_UNCACHED = 9 / 8
# a multiply-accumulate of AMX's, measured on a Xeon of the fifth generation
_AMX = 1 / 6
# of channels of an input that is normalised
_AMX_MULTIPLE = 16
