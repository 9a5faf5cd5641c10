"""Maps as pictures: channels in grey, three principal components as colour, statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import adaptive_avg_pool2d

from sdconv.report.features.views import Values

Pixels = NDArray[np.uint8]

BINS = 64
"""Of a map's histogram."""

FITTED = 64
"""Rows and columns at most on which directions are found."""

TAILS = 0.5
"""Percent of a picture's values at either end that may be clipped: a few large ones would leave
the rest in one shade."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of one map: each channel over space, and all values together. Not finite ones are left out.

    ``mean``, ``variance``: ``(C,)``. ``counts``: ``(BINS,)``, between ``low`` and ``high``.
    """

    mean: Values
    variance: Values
    low: float
    high: float
    counts: NDArray[np.int64]
    not_finite: int


def statistics(maps: Values) -> Statistics:
    """What is said of ``maps``, ``(C, H, W)``."""
    flat = torch.from_numpy(maps).flatten(1)
    low, high = map(float, flat.aminmax())  # NaN if any value is
    if math.isfinite(low) and math.isfinite(high):
        missing, every, mean = 0, flat, flat.mean(1)
        variance = (flat - mean[:, None]).square_().mean(1)
    else:
        finite = flat.isfinite()
        number = finite.sum(1).clamp(min=1)
        missing, every = flat.numel() - int(finite.sum()), flat[finite]
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
        not_finite=missing,
    )


def shrunk(maps: Values, side: int) -> Values:
    """``(C, h, w)`` with neither side longer than ``side``, each value the mean of what it covers;
    values that are not finite count as 0."""
    height, width = maps.shape[1:]
    if not np.isfinite(maps.sum()):
        maps = np.nan_to_num(maps, nan=0.0, posinf=0.0, neginf=0.0)
    if max(height, width) <= side:
        return maps
    factor = side / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    pooled: Values = adaptive_avg_pool2d(torch.from_numpy(maps), size).numpy()
    return pooled


def in_grey(maps: Values) -> tuple[Pixels, Values]:
    """Each channel between black and white by its own range, and these ranges.

    Maps of a single place share one range, as there is nothing to see in each alone.

    Returns:
        ``(C, H, W)`` in bytes, and ``(C, 2)``: what black and what white stand for.
    """
    flat = maps.reshape(1 if maps[0].size == 1 else len(maps), -1)
    ranges = np.percentile(flat, (TAILS, 100 - TAILS), axis=1).astype(np.float32).T
    ranges = np.ascontiguousarray(np.broadcast_to(ranges, (len(maps), 2)))
    return _scaled(maps, ranges[:, 0, None, None], ranges[:, 1, None, None]), ranges


def principal(maps: Values, like: Values | None = None) -> tuple[Values, Values, float]:
    """The three directions among the channels along which places differ most.

    Found by iterating on the places' covariance from fixed directions, so that the same maps give
    the same colours.

    Args:
        maps: ``(C, H, W)``.
        like: directions ``(C, 3)`` found before, such as at the timestep before; signs follow them.

    Returns:
        The maps along them, ``(3, H, W)``, zeros for those that there are not, all divided by one
        number; the directions ``(C, 3)``; and their share of the variance, 0 to 1.
    """
    channels = len(maps)
    places = shrunk(maps, FITTED).reshape(channels, -1).astype(np.float64)
    centre = places.mean(1, keepdims=True)
    places = places - centre
    scale = np.abs(places).max() or 1.0  # so that squares of large values stay finite
    places /= scale
    covariance = places @ places.T / places.shape[1]
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


def in_colour(components: Values) -> Pixels:
    """``(H, W, 3)``: each of ``(3, H, W)`` as one of red, green and blue, by its own range."""
    return np.ascontiguousarray(in_grey(components)[0].transpose(1, 2, 0))


def _leading(covariance: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The largest few eigenvalues and their vectors, by subspace iteration."""
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
