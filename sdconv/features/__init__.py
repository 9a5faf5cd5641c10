"""Feature maps by name: ``sdconv.features(network)`` lists the points, ``sdconv.capture`` reads
feature maps there, ``sdconv.edit`` changes them; ``sdconv.features.recipes`` are published methods
built from these."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, cast

from sdconv.features import recipes
from sdconv.features.calls import Call
from sdconv.features.capture import capture, run_until
from sdconv.features.editing import Context, edit
from sdconv.features.maps import CapturedMap, Maps, MissingMapError, Series, open_maps
from sdconv.features.points import Point, Points, points_of
from sdconv.features.reduction import pca, pool
from sdconv.features.reuse import reuse

__all__ = [
    "Call",
    "CapturedMap",
    "Context",
    "Maps",
    "MissingMapError",
    "Point",
    "Points",
    "Series",
    "capture",
    "edit",
    "open_maps",
    "pca",
    "points_of",
    "pool",
    "recipes",
    "reuse",
    "run_until",
]


class _Features(ModuleType):
    """A module that can be called, as ``sdconv.features(network)``."""

    def __call__(self, target: Any, size: int | tuple[int, int] | None = None) -> Points:
        return points_of(target, size)


sys.modules[__name__].__class__ = _Features
# `sdconv.features` is both a function and a module
features = cast(_Features, sys.modules[__name__])
