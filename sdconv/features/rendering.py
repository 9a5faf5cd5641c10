"""Feature maps rendered as images: channels in grey, three principal components as RGB, and
their statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import adaptive_avg_pool2d

from sdconv.errors import InputError
from sdconv.features.attention import PROBABILITIES

Values = NDArray[np.float32]
Pixels = NDArray[np.uint8]

BINS = 64
"""Bins of a feature map's histogram."""

PCA_SIDE = 64
"""Rows and columns, at most, of the feature map that principal components are computed on."""

CLIPPED = 0.5
"""Percent of an image's values that are clipped at either end, so that a few outliers do not leave
the rest in one shade."""


SIGNED = 0.05
"""A feature map is signed if the range on the shorter side of zero is at least this share of that
on the longer side."""


@dataclass(frozen=True, kw_only=True)
class ColourScale:
    """The values of an image's colours.

    Attributes:
        low, high: the values of the first and the last colour.
        below, above: whether there are values beyond them, which have the first or the last colour.
        diverging: the values are signed, and the middle colour is zero.
    """

    low: float
    high: float
    below: bool
    above: bool
    diverging: bool

    @property
    def extend(self) -> str:
        """The pointed ends of matplotlib's colour bar."""
        ends = {(False, False): "neither", (True, False): "min", (False, True): "max"}
        return ends.get((self.below, self.above), "both")


def is_signed(low: float, high: float) -> bool:
    """Whether values between these bounds are signed, so that zero is a value to see."""
    return min(-low, high) > SIGNED * max(-low, high)


def colour_scale(values: Values) -> ColourScale:
    """The scale for an image: ``CLIPPED`` percent of its values are beyond either end; if the rest
    is signed, the ends are symmetric around zero."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return ColourScale(low=0, high=1, below=False, above=False, diverging=False)
    low, high = (float(end) for end in np.percentile(finite, (CLIPPED, 100 - CLIPPED)))
    diverging = is_signed(low, high)
    if diverging:
        low, high = -max(-low, high), max(-low, high)
    return ColourScale(
        low=low,
        high=high,
        below=bool(finite.min() < low),
        above=bool(finite.max() > high),
        diverging=diverging,
    )


def grid_of(positions: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of the level of a network that has so many positions; None if none has.

    Args:
        positions: 1 or more.
        size: rows and columns of the network's input, or of any level above.
    """
    rows, columns = size
    while rows * columns > positions:
        rows, columns = -(-rows // 2), -(-columns // 2)  # a strided convolution rounds up
    return (rows, columns) if rows * columns == positions else None


def unit_of(name: str) -> str:
    """What the images of a hook point are of: channels, or of attention probabilities the tokens or
    the positions that are attended to."""
    return {"attn1:probs": "position", "attn2:probs": "token"}.get(
        name.rpartition(".")[2], "channel"
    )


def drawable(name: str, values: Any) -> Any:
    """What is drawn of the values at a hook point: attention probabilities ``(B, heads, queries,
    keys)`` as their mean over the heads, so that each key gets a map of the positions that attend
    to it; other values as they are."""
    of_heads = name.endswith(PROBABILITIES) and values.ndim == 4
    return values.mean(1, dtype=torch.float32) if of_heads else values


def as_maps(values: Any, size: tuple[int, int] | None = None) -> Values:
    """The first sample of a feature map as ``(C, H, W)`` in float32.

    Args:
        values: a tensor ``(B, C, H, W)``; or tokens ``(B, N, C)``, which are laid out as the rows
            and columns of a level of ``N`` positions, or else as one row; or a vector ``(B, C)``,
            which becomes feature maps of a single pixel.
        size: rows and columns of the network's input, or of any level above; None if they are not
            known, so that tokens are taken for those of a square.

    Raises:
        InputError: another number of axes, or an empty tensor.
    """
    shape = tuple(values.shape)
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise InputError(
            "not a feature map", expected="(B, C, H, W), (B, N, C) or (B, C)", got=shape
        )
    first = values[0]
    if hasattr(first, "detach"):
        first = first.detach().float().cpu().numpy()
    one: Values = np.ascontiguousarray(first, dtype=np.float32)
    if one.ndim == 1:
        return one[:, None, None]
    if one.ndim == 2:
        side = math.isqrt(len(one))
        rows, columns = grid_of(len(one), size or (side, side)) or (1, len(one))
        return np.ascontiguousarray(one.T.reshape(one.shape[1], rows, columns))
    return one


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of one feature map, without its NaN and infinite values.

    Attributes:
        mean, variance: of each channel over space, ``(C,)``.
        low, high: the smallest and the largest value.
        counts: the histogram between ``low`` and ``high``, ``(BINS,)``.
        not_finite: the number of NaN and infinite values.
    """

    mean: Values
    variance: Values
    low: float
    high: float
    counts: NDArray[np.int64]
    not_finite: int


def statistics(maps: Values) -> Statistics:
    """The statistics of ``maps``, ``(C, H, W)``."""
    flat = torch.from_numpy(maps).flatten(1)
    low, high = map(float, flat.aminmax())  # NaN if any value is NaN
    if math.isfinite(low) and math.isfinite(high):
        not_finite, every, mean = 0, flat, flat.mean(1)
        variance = (flat - mean[:, None]).square_().mean(1)
    else:
        finite = flat.isfinite()
        number = finite.sum(1).clamp(min=1)
        not_finite, every = flat.numel() - int(finite.sum()), flat[finite]
        low, high = map(float, every.aminmax()) if every.numel() else (0.0, 0.0)
        mean = flat.where(finite, 0).double().sum(1) / number
        spread = (flat.double() - mean[:, None]).where(finite, 0)
        variance = spread.square().sum(1) / number
    top = high if high > low else low + max(abs(low), 1.0) * 1e-6
    counts = torch.histc(every, BINS, low, top)
    return Statistics(
        mean=mean.float().numpy(),
        variance=variance.float().nan_to_num().numpy(),
        low=low,
        high=high,
        counts=counts.long().numpy(),
        not_finite=not_finite,
    )


def downscaled(maps: Values, side: int) -> Values:
    """Average-pool ``(C, h, w)`` to sides no longer than ``side``; NaN and infinity count as 0."""
    height, width = maps.shape[1:]
    if not np.isfinite(maps.sum()):
        maps = np.nan_to_num(maps, nan=0.0, posinf=0.0, neginf=0.0)
    if max(height, width) <= side:
        return maps
    factor = side / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    pooled: Values = adaptive_avg_pool2d(torch.from_numpy(maps), size).numpy()
    return pooled


def to_grey(maps: Values) -> tuple[Pixels, Values]:
    """Each channel as a grey image, scaled by its own range of values.

    Channels of a single pixel share one range, because each alone would show nothing.

    Returns:
        ``(C, H, W)`` in bytes, and the ranges ``(C, 2)``: the values of black and of white.
    """
    flat = maps.reshape(1 if maps[0].size == 1 else len(maps), -1)
    ranges = np.percentile(flat, (CLIPPED, 100 - CLIPPED), axis=1).astype(np.float32).T
    ranges = np.ascontiguousarray(np.broadcast_to(ranges, (len(maps), 2)))
    return _scaled(maps, ranges[:, 0, None, None], ranges[:, 1, None, None]), ranges


def principal_components(maps: Values, like: Values | None = None) -> tuple[Values, Values, float]:
    """The first three principal components over the channels.

    They are computed by subspace iteration from a fixed start, so that the same feature maps get
    the same colours.

    Args:
        maps: ``(C, H, W)``.
        like: directions ``(C, 3)`` of, say, the previous timestep; the signs follow them.

    Returns:
        The projections ``(3, H, W)``, all divided by one number (zero where there are fewer than
        three components); the directions ``(C, 3)``; and their share of the variance, 0 to 1.
    """
    channels = len(maps)
    pixels = downscaled(maps, PCA_SIDE).reshape(channels, -1).astype(np.float64)
    centre = pixels.mean(1, keepdims=True)
    pixels = pixels - centre
    scale = np.abs(pixels).max() or 1.0  # so that squares of large values stay finite
    pixels /= scale
    covariance = pixels @ pixels.T / pixels.shape[1]
    values, vectors = np.linalg.eigh(covariance) if channels <= 16 else _leading(covariance)
    order = np.argsort(values)[::-1][:3]
    directions = np.zeros((channels, 3))
    directions[:, : len(order)] = vectors[:, order]
    signs = directions[np.abs(directions).argmax(0), np.arange(3)]
    if like is not None and like.shape == directions.shape:
        signs = (like * directions).sum(0)
    directions *= np.where(signs < 0, -1, 1)
    total = float(np.trace(covariance))
    share = float(np.clip(values[order], 0, None).sum() / total) if total > 0 else 1.0
    flat = (maps.reshape(channels, -1) - centre.astype(np.float32)) / np.float32(scale)
    along = (directions.T.astype(np.float32) @ flat).reshape(3, *maps.shape[1:])
    return along, directions.astype(np.float32), min(share, 1.0)


def to_rgb(components: Values) -> Pixels:
    """Three components ``(3, H, W)`` as red, green and blue, ``(H, W, 3)``, each scaled by its own
    range."""
    return np.ascontiguousarray(to_grey(components)[0].transpose(1, 2, 0))


def _leading(covariance: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The largest few eigenvalues and their eigenvectors, by subspace iteration."""
    start = np.random.default_rng(0).standard_normal((len(covariance), 8))
    basis, _ = np.linalg.qr(start)
    for _ in range(24):
        basis, _ = np.linalg.qr(covariance @ basis)
    values, turned = np.linalg.eigh(basis.T @ covariance @ basis)
    return values, basis @ turned


def _scaled(maps: Values, low: Values, high: Values) -> Pixels:
    span = np.where(high > low, high - low, 1)
    with np.errstate(over="ignore"):
        share = np.where(high > low, (maps - low) / span, 0.5)
    return np.round(share.clip(0, 1) * 255).astype(np.uint8)
