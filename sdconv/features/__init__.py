"""Feature maps by name: ``sdconv.features(network)`` lists the points, ``sdconv.capture`` reads
them, ``sdconv.edit`` changes them; ``sdconv.features.recipes`` are published methods made of
these."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, cast

from sdconv.features import recipes
from sdconv.features.calls import Call
from sdconv.features.capture import capture, run_until
from sdconv.features.editing import Context, edit
from sdconv.features.maps import Entry, Maps, MissingMapError, Series
from sdconv.features.points import Point, Points, points_of
from sdconv.features.reduction import pca, pool
from sdconv.features.reuse import reuse
from sdconv.features.store import open_maps

__all__ = [
    "Call",
    "Context",
    "Entry",
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
    """A module that can be called: its name says what comes back."""

    def __call__(self, target: Any, size: int | tuple[int, int] | None = None) -> Points:
        return points_of(target, size)


sys.modules[__name__].__class__ = _Features
# what `sdconv.features` is: a call and a module at once
features = cast(_Features, sys.modules[__name__])
